//! Operations that are only recorded, for tests of the local API.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use virtnode::daemon::api::OperationService;
use virtnode::executor::SubmitError;
use virtnode::hotplug::Verdict;
use virtnode::operation::{OperationId, Order, Record, State};
use virtnode::units::Timestamp;

/// Time of all operations.
pub(crate) fn now() -> Timestamp {
    Timestamp::from_millis(1_795_260_166_250)
}

/// Operations in memory, whose progress a test controls.
#[derive(Default)]
pub(crate) struct InMemory(Mutex<Vec<(Order, watch::Sender<Record>)>>);

impl InMemory {
    fn all(&self) -> MutexGuard<'_, Vec<(Order, watch::Sender<Record>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the submitted orders.
    pub(crate) fn orders(&self) -> Vec<Order> {
        self.all().iter().map(|(order, _)| order.clone()).collect()
    }

    /// Changes the newest operation.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Record)) {
        self.all().last().unwrap().1.send_modify(change);
    }
}

impl OperationService for InMemory {
    async fn submit(self: &Arc<Self>, order: Order) -> Result<OperationId, SubmitError> {
        if order.domain.as_str() == "full" {
            return Err(SubmitError::TooMany(256));
        }
        let mut all = self.all();
        let known = all.iter().find(|(known, _)| {
            order.idempotency_key.is_some() && known.idempotency_key == order.idempotency_key
        });
        if let Some((known, record)) = known {
            let id = record.borrow().id.clone();
            return if known.request == order.request && known.domain == order.domain {
                Ok(id)
            } else {
                Err(SubmitError::KeyReused(id))
            };
        }
        let id = OperationId::new(u64::try_from(all.len()).unwrap_or(0), 7);
        let mut record = Record::new(id.clone(), &order, now());
        match order.domain.as_str() {
            "nobody" => record.end(Verdict::DomainNotFound, "there is no such domain", now()),
            "done" => record.end(Verdict::Infeasible, "8 are more than 4", now()),
            _ => {
                record.state = State::Running;
                record.awaits("the guest", now());
            }
        }
        all.push((order, watch::Sender::new(record)));
        Ok(id)
    }

    fn operation(&self, id: &OperationId) -> Option<Record> {
        let records = self.operations();
        records.into_iter().find(|record| record.id == *id)
    }

    fn operations(&self) -> Vec<Record> {
        let all = self.all();
        all.iter().rev().map(|(_, r)| r.borrow().clone()).collect()
    }

    fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        let all = self.all();
        let found = all.iter().find(|(_, record)| record.borrow().id == *id);
        found.map(|(_, record)| record.subscribe())
    }
}
