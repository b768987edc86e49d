//! The operations that are followed after their verdict, at most one for each domain.

use std::collections::HashMap;

use tokio_util::sync::CancellationToken;

use crate::domain::DomainRef;
use crate::operation::OperationId;

#[derive(Debug)]
pub(super) struct Followers {
    max: usize,
    by_domain: HashMap<DomainRef, (OperationId, CancellationToken)>,
}

impl Followers {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            by_domain: HashMap::new(),
        }
    }

    /// Adds the follower of a domain and returns the token that cancels it, or `None` if there
    /// are as many as allowed.
    pub(super) fn add(
        &mut self,
        domain: &DomainRef,
        id: &OperationId,
    ) -> Option<CancellationToken> {
        if self.by_domain.len() >= self.max {
            return None;
        }
        let token = CancellationToken::new();
        let follower = (id.clone(), token.clone());
        self.by_domain.insert(domain.clone(), follower);
        Some(token)
    }

    /// Cancels the follower of a domain.
    pub(super) fn cancel(&mut self, domain: &DomainRef) {
        if let Some((_, token)) = self.by_domain.remove(domain) {
            token.cancel();
        }
    }

    /// Removes a follower that ended, unless another operation has replaced it.
    pub(super) fn remove(&mut self, domain: &DomainRef, id: &OperationId) {
        let follower = self.by_domain.get(domain);
        if follower.is_some_and(|(current, _)| current == id) {
            self.by_domain.remove(domain);
        }
    }
}
