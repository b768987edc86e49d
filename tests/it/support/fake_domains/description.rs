//! What the hypervisor in memory reports about a domain.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use virtnode::domain::{BalloonStats, Stats, VcpuStats};
use virtnode::hypervisor::DomainRef;
use virtnode::units::Bytes;

use super::{BOOT, FakeDomain};
use crate::support::guest::{MorePossible, Statistics};

/// The start of the hypervisor, by both clocks: tokio's may advance at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Started(Instant, SystemTime);

impl Started {
    pub(super) fn now() -> Self {
        Self(Instant::now(), SystemTime::now())
    }

    /// Seconds since 1970 by the host's clock, which advances with tokio's.
    pub(super) fn wall_clock(self) -> u64 {
        let start = self.1.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        (start + (Instant::now() - self.0)).as_secs()
    }
}

impl FakeDomain {
    pub(super) fn set_period(&mut self, started: Started, seconds: u32) {
        if self.period > 0 {
            self.report = (self.total, started.wall_clock());
        }
        self.period = seconds;
    }

    pub(super) fn bring_online(&mut self) {
        let now = Instant::now();
        for id in self.present.iter() {
            self.online_since.entry(id).or_insert(now);
        }
        self.online = self.present.clone();
    }

    pub(super) fn id(&self, name: &str) -> DomainRef {
        DomainRef::on_host(name, self.uuid.clone())
    }

    /// The live XML, of what matters.
    pub(super) fn xml(&self, name: &str) -> String {
        let channel = if self.guest.agent {
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' \
                 state='connected'/></channel>"
        } else {
            ""
        };
        let boot = BOOT / 1024;
        let virtio_mem = self.guest.memory == MorePossible::VirtioMem;
        let (maximum, cpu) = match self.guest.memory {
            MorePossible::No => (String::new(), String::new()),
            _ => (
                "<maxMemory slots='4' unit='KiB'>4194304</maxMemory>".to_owned(),
                format!(
                    "<cpu><numa><cell id='0' cpus='0-3' memory='{boot}' unit='KiB'/></numa></cpu>"
                ),
            ),
        };
        let mut devices = if virtio_mem {
            format!(
                "<memory model='virtio-mem'><target><size unit='KiB'>2097152</size>\
                 <node>0</node><block unit='KiB'>2048</block>\
                 <requested unit='KiB'>{}</requested><current unit='KiB'>{}</current></target>\
                 <alias name='ua-mem0'/></memory>",
                self.requested / 1024,
                self.taken / 1024,
            )
        } else {
            String::new()
        };
        for (slot, (alias, size)) in &self.dimms {
            let size = size / 1024;
            write!(
                devices,
                "<memory model='dimm'><target><size unit='KiB'>{size}</size><node>0</node></target>\
                 <alias name='{alias}'/><address type='dimm' slot='{slot}'/></memory>"
            )
            .unwrap();
        }
        let balloon = match (self.guest.statistics, self.period) {
            (Statistics::NoBalloon, _) => Statistics::NoBalloon,
            (_, 0) => Statistics::Off,
            (_, period) => Statistics::Every(period),
        };
        let balloon = balloon.xml();
        let dimms: u64 = self.dimms.values().map(|(_, size)| size / 1024).sum();
        let yes_no = |yes| if yes { "yes" } else { "no" };
        let vcpu = |id: u32| {
            let (enabled, hotpluggable) = (yes_no(id < self.by_libvirt), yes_no(id > 0));
            format!("<vcpu id='{id}' enabled='{enabled}' hotpluggable='{hotpluggable}'/>")
        };
        let vcpus: String = (0..4).map(vcpu).collect();
        format!(
            "<domain type='qemu' id='{}'><name>{name}</name><uuid>{}</uuid>\
             {maximum}<memory unit='KiB'>{}</memory><vcpu current='{}'>4</vcpu>\
             <vcpus>{vcpus}</vcpus><os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
             <features><acpi/></features>\
             {cpu}<devices>{devices}{channel}\
             {balloon}</devices></domain>",
            self.number,
            self.uuid,
            boot + dimms + if virtio_mem { 2_097_152 } else { 0 },
            self.by_libvirt,
        )
    }

    pub(super) fn plugged_dimms(&self) -> u64 {
        self.dimms.values().map(|(_, size)| size).sum()
    }

    pub(super) fn stats(&self, started: Started) -> Stats {
        let now = Instant::now();
        let ran = |id: u32| {
            let since = self.online_since.get(&id);
            let since = since.filter(|_| self.online.contains(id));
            let ran = since.map_or(Duration::ZERO, |since| now - *since);
            // in ticks of 10 ms, as libvirt counts
            u64::try_from(ran.as_millis()).unwrap() / 10 * 10_000_000
        };
        let (total, told) = match self.period {
            0 => self.report,
            _ => (self.total, started.wall_clock()),
        };
        let told = if self.guest.statistics == Statistics::NoBalloon {
            0
        } else {
            told
        };
        Stats {
            vcpu_count: Some(self.by_libvirt),
            vcpus: (0..self.by_libvirt)
                .map(|id| {
                    let stats = VcpuStats {
                        time: Some(ran(id)),
                        exits: None,
                    };
                    (id, stats)
                })
                .collect(),
            balloon: BalloonStats {
                current: Some(Bytes::new(BOOT + self.taken + self.plugged_dimms())),
                total: Some(Bytes::new(total)),
                usable: None,
                updated: Some(told),
            },
        }
    }
}
