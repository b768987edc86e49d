//! The calls of the hypervisor in memory.

use tokio::sync::watch;
use tokio::time::sleep;
use virtnode::domain::Domain;
use virtnode::hotplug::{Action, Event, GuestVcpus, Ost, SlotKind};
use virtnode::hypervisor::{
    CallError, ConnectionState, DomainBackend, DomainRef, DomainStats, LiveDomain, Notices,
    ObservationQuery, Seen,
};
use virtnode::units::{Bytes, KiB};

use super::{AGENT_ANSWER, Blocks, Cpus, DIMM, FakeControl, FakeDomain, LINUX_BLOCK, MIB, PLUG};

fn failed(call: &'static str, number: u32, message: &str) -> CallError {
    CallError::Failed {
        call: call.into(),
        code: number.to_string(),
        text: message.to_owned(),
    }
}

impl DomainBackend for FakeControl {
    async fn find(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        self.question().await?;
        let domains = self.domains();
        let found = domains
            .iter()
            .find(|(name, domain)| *name == name_or_uuid || domain.uuid == name_or_uuid);
        found
            .map(|(name, domain)| domain.id(name))
            .ok_or_else(|| CallError::NotFound(name_or_uuid.to_owned()))
    }

    async fn observe(&self, domain: &DomainRef, query: ObservationQuery) -> Seen {
        query
            .observe(
                self.live(domain),
                self.domain_statistics(domain),
                self.guest_vcpus(domain),
                self.acpi_answers(domain),
            )
            .await
    }

    async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
        self.question().await?;
        let domains = self.domains();
        Ok(domains
            .iter()
            .map(|(name, domain)| DomainStats {
                id: domain.id(name),
                state: domain.state,
                stats: domain.stats(self.started),
            })
            .collect())
    }

    async fn apply(&self, domain: &DomainRef, action: &Action) -> Result<(), CallError> {
        match action {
            Action::SetVcpus { count, .. } => self.set_vcpus(domain, *count).await,
            Action::OnlineVcpus { ids } => {
                let call = format!("set-guest-vcpus {} {ids}", domain.name);
                let (name, error) = self.begin(call, domain).await?;
                self.change(&name, FakeDomain::bring_online);
                error.map_or(Ok(()), Err)
            }
            Action::ResizeVirtioMem {
                alias, requested, ..
            } => self.resize_virtio_mem(domain, alias, *requested).await,
            Action::AttachDimm { alias, size, .. } => self.attach_dimm(domain, alias, *size).await,
            Action::SetStatsPeriod { seconds, .. } => {
                let call = format!("set-stats-period {} {seconds}", domain.name);
                let (name, error) = self.begin(call, domain).await?;
                self.change(&name, |domain| domain.set_period(self.started, *seconds));
                error.map_or(Ok(()), Err)
            }
        }
    }

    fn events(&self) -> Notices {
        Notices::new(self.notices.subscribe())
    }

    fn health(&self) -> watch::Receiver<ConnectionState> {
        self.connection.subscribe()
    }
}

impl FakeControl {
    async fn live(&self, domain: &DomainRef) -> Result<LiveDomain, CallError> {
        self.question().await?;
        let (name, have) = self.find_ref(domain)?;
        let xml = have.xml(&name);
        Ok(LiveDomain {
            id: have.id(&name),
            domain: Domain::parse(&name, xml.as_bytes(), have.state).unwrap(),
            reason: have.reason,
            persistent: false,
            job: have.job,
            attached: Vec::new(),
            defined: None,
        })
    }

    async fn domain_statistics(&self, domain: &DomainRef) -> Result<DomainStats, CallError> {
        self.question().await?;
        let (name, have) = self.find_ref(domain)?;
        Ok(DomainStats {
            id: have.id(&name),
            state: have.state,
            stats: have.stats(self.started),
        })
    }

    async fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        self.question().await?;
        let (_, have) = self.find_ref(domain)?;
        if have.guest.agent_hangs {
            sleep(AGENT_ANSWER).await;
            return Err(CallError::AgentSilent {
                call: "guest-vcpus".into(),
                text: "guest agent command timed out".to_owned(),
            });
        }
        if have.guest.agent {
            Ok(GuestVcpus {
                vcpus: have.present,
                online: have.online,
            })
        } else {
            Err(CallError::AgentSilent {
                call: "guest-vcpus".into(),
                text: "the agent is not connected".to_owned(),
            })
        }
    }

    async fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        self.question().await?;
        let (name, have) = self.find_ref(domain)?;
        self.change(&name, |domain| domain.tainted = true);
        Ok(have.answers)
    }

    async fn set_vcpus(&self, domain: &DomainRef, vcpus: u32) -> Result<(), CallError> {
        let (me, domain) = (self.me.upgrade().unwrap(), domain.clone());
        // A call continues if its caller stops waiting.
        let work = tokio::spawn(async move {
            let call = format!("set-vcpus {} {vcpus}", domain.name);
            let (name, error) = me.begin(call, &domain).await?;
            let (_, have) = me.find_ref(&domain)?;
            if vcpus > 4 {
                return Err(failed(
                    "set-vcpus",
                    8,
                    "requested vcpus is greater than max",
                ));
            }
            if vcpus < have.by_libvirt {
                me.unplug(&name, vcpus).await?
            } else {
                me.plug(&name, vcpus).await
            }
            error.map_or(Ok(()), Err)
        });
        work.await.unwrap()
    }

    async fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
    ) -> Result<(), CallError> {
        assert_eq!(alias, "ua-mem0");
        let requested = Bytes::from(requested).get();
        let call = format!("resize-virtio-mem {} {}", domain.name, requested / MIB);
        let (name, error) = self.begin(call, domain).await?;
        sleep(PLUG).await;
        let size = self.change(&name, |domain| {
            let before = domain.taken;
            domain.requested = requested;
            match domain.guest.blocks {
                Blocks::NoDriver => return None,
                Blocks::GivesHalfBack if requested < before => {
                    domain.taken = before - (before - requested) / 2;
                }
                _ => domain.taken = requested,
            }
            if domain.guest.blocks != Blocks::LeavesOffline {
                domain.total = domain.total - before + domain.taken;
            }
            Some((domain.taken, domain.clone()))
        });
        if let Some(Some((taken, have))) = size {
            let event = Event::MemorySize {
                device: "ua-mem0".to_owned(),
                size: Bytes::new(taken),
            };
            self.tell(&name, &have, event);
        }
        error.map_or(Ok(()), Err)
    }

    async fn attach_dimm(
        &self,
        domain: &DomainRef,
        alias: &str,
        size: KiB,
    ) -> Result<(), CallError> {
        let call = format!("attach-device {}", domain.name);
        let (name, error) = self.begin(call, domain).await?;
        let (alias, size) = (alias.to_owned(), Bytes::from(size).get());
        if !size.is_multiple_of(DIMM) {
            let why = "backend memory size must be multiple of 0x200000";
            return Err(failed("attach-device", 1, why));
        }
        sleep(PLUG).await;
        let plugged = self.change(&name, |domain| {
            let slot = (0..4).find(|slot| !domain.dimms.contains_key(slot))?;
            domain.dimms.insert(slot, (alias.clone(), size));
            // Linux confirms every DIMM.
            if domain.guest.blocks == Blocks::Onlines && size.is_multiple_of(LINUX_BLOCK) {
                domain.total += size;
            }
            Some((slot, domain.clone()))
        });
        let Some((slot, have)) = plugged.flatten() else {
            return Err(failed("attach-device", 1, "no free slot"));
        };
        if have.guest.cpus != Cpus::Silent {
            let ost = Ost {
                device: Some(alias),
                slot,
                kind: SlotKind::Dimm,
                source: 1,
                status: 0,
            };
            self.answer(&name, &have, ost);
        }
        error.map_or(Ok(()), Err)
    }
}
