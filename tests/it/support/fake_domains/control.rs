//! The calls of the hypervisor in memory.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use virtnode::domain::{BalloonStats, IdSet};
use virtnode::hotplug::{Event, GuestVcpus, Ost, SlotKind};
use virtnode::hypervisor::{
    CallError, Connection, DomainBackend, DomainRef, DomainStats, LiveDomain, Notices, Scope,
};
use virtnode::units::{Bytes, KiB};

use super::{Blocks, Cpus, DIMM, FakeControl, FakeDomain, LINUX_BLOCK, MIB, PLUG};

fn failed(call: &'static str, number: u32, message: &str) -> CallError {
    CallError::Failed {
        call: call.into(),
        code: number.to_string(),
        text: message.to_owned(),
    }
}

impl DomainBackend for FakeControl {
    async fn find_domain(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        self.question().await?;
        let domains = self.domains();
        let found = domains
            .iter()
            .find(|(name, domain)| *name == name_or_uuid || domain.uuid == name_or_uuid);
        found
            .map(|(name, domain)| domain.id(name))
            .ok_or_else(|| CallError::NotFound(name_or_uuid.to_owned()))
    }

    async fn domain(&self, domain: &DomainRef) -> Result<LiveDomain, CallError> {
        self.question().await?;
        let (name, have) = self.find(domain)?;
        Ok(LiveDomain {
            id: have.id(&name),
            state: have.state,
            reason: have.reason,
            persistent: false,
            xml: have.xml(&name),
            job: have.job,
        })
    }

    async fn all_domain_stats(&self) -> Result<Vec<DomainStats>, CallError> {
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

    async fn domain_stats(&self, domain: &DomainRef) -> Result<DomainStats, CallError> {
        self.question().await?;
        let (name, have) = self.find(domain)?;
        Ok(DomainStats {
            id: have.id(&name),
            state: have.state,
            stats: have.stats(self.started),
        })
    }

    async fn memory_stats(&self, domain: &DomainRef) -> Result<BalloonStats, CallError> {
        Ok(self.domain_stats(domain).await?.stats.balloon)
    }

    async fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        self.question().await?;
        let (_, have) = self.find(domain)?;
        if have.guest.agent_hangs {
            std::future::pending::<()>().await;
        }
        match have.guest.agent {
            true => Ok(GuestVcpus {
                vcpus: have.present,
                online: have.online,
            }),
            false => Err(CallError::AgentSilent {
                call: "guest-vcpus".into(),
                text: "the agent is not connected".to_owned(),
            }),
        }
    }

    async fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        self.question().await?;
        let (name, have) = self.find(domain)?;
        self.change(&name, |domain| domain.tainted = true);
        Ok(have.answers)
    }

    async fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> Result<(), CallError> {
        assert!(online, "nobody takes CPUs offline");
        let call = format!("set-guest-vcpus {} {vcpus}", domain.name);
        let (name, error) = self.begin(call, domain).await?;
        self.change(&name, FakeDomain::bring_online);
        error.map_or(Ok(()), Err)
    }

    async fn set_agent_timeout(&self, _: &DomainRef, _: Duration) -> Result<(), CallError> {
        Ok(())
    }

    async fn set_vcpus(&self, domain: &DomainRef, vcpus: u32, _: Scope) -> Result<(), CallError> {
        let (me, domain) = (self.me.upgrade().unwrap(), domain.clone());
        // What has begun goes on when nobody waits for it any more.
        let work = tokio::spawn(async move {
            let call = format!("set-vcpus {} {vcpus}", domain.name);
            let (name, error) = me.begin(call, &domain).await?;
            let (_, have) = me.find(&domain)?;
            if vcpus > 4 {
                return Err(failed(
                    "set-vcpus",
                    8,
                    "requested vcpus is greater than max",
                ));
            }
            match vcpus < have.by_libvirt {
                true => me.unplug(&name, vcpus).await?,
                false => me.plug(&name, vcpus).await,
            }
            error.map_or(Ok(()), Err)
        });
        work.await.unwrap()
    }

    async fn update_device(&self, domain: &DomainRef, _: &str, _: Scope) -> Result<(), CallError> {
        let call = format!("update-device {}", domain.name);
        self.begin(call, domain).await?;
        Ok(())
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

    async fn attach_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        _: Scope,
    ) -> Result<(), CallError> {
        let call = format!("attach-device {}", domain.name);
        let (name, error) = self.begin(call, domain).await?;
        let between = |from: &str, to: &str| {
            let begin = xml.find(from).unwrap() + from.len();
            xml[begin..].split(to).next().unwrap().to_owned()
        };
        let alias = between("<alias name='", "'");
        let size = between("<size unit='KiB'>", "<").parse::<u64>().unwrap() * 1024;
        if !size.is_multiple_of(DIMM) {
            let why = "backend memory size must be multiple of 0x200000";
            return Err(failed("attach-device", 1, why));
        }
        sleep(PLUG).await;
        let plugged = self.change(&name, |domain| {
            let slot = (0..4).find(|slot| !domain.dimms.contains_key(slot))?;
            domain.dimms.insert(slot, (alias.clone(), size));
            // Linux says yes to every DIMM.
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

    async fn detach_device(
        &self,
        domain: &DomainRef,
        alias: &str,
        _: Scope,
    ) -> Result<(), CallError> {
        let call = format!("detach-device {} {alias}", domain.name);
        let (name, error) = self.begin(call, domain).await?;
        let gone = self.change(&name, |domain| {
            let found = domain.dimms.iter().find(|(_, (have, _))| have == alias);
            let (slot, size) = found.map(|(slot, (_, size))| (*slot, *size))?;
            domain.dimms.remove(&slot);
            if domain.guest.blocks == Blocks::Onlines && size.is_multiple_of(LINUX_BLOCK) {
                domain.total -= size;
            }
            Some(domain.clone())
        });
        let Some(have) = gone.flatten() else {
            return Err(failed("detach-device", 99, "no device found with alias"));
        };
        let deleted = Event::DeviceDeleted {
            device: Some(alias.to_owned()),
            path: format!("/machine/peripheral/{alias}"),
        };
        self.tell(&name, &have, deleted);
        error.map_or(Ok(()), Err)
    }

    fn notices(&self) -> Notices {
        Notices::new(self.notices.subscribe())
    }

    fn listening(&self) -> watch::Receiver<Connection> {
        self.connection.subscribe()
    }
}
