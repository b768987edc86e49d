//! Events that QEMU and libvirt report during an operation.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::Bytes;

/// Maximum size of an event's details in bytes. QEMU's are below 300.
const MAX_DETAILS: usize = 64 * 1024;

/// An event of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// The guest answered a plug or unplug request through ACPI.
    Ost(Ost),
    /// QEMU removed a device or a part of one.
    #[serde(rename_all = "camelCase")]
    DeviceDeleted {
        /// The device's alias. QEMU omits it for parts, such as a vCPU's interrupt controller.
        device: Option<String>,
        /// The path in QEMU's object tree: `/machine/peripheral/vcpu2/lapic`.
        path: String,
    },
    /// The guest did not release a device (QEMU's `DEVICE_UNPLUG_GUEST_ERROR` and
    /// `MEM_UNPLUG_ERROR`, libvirt's failed device removal).
    UnplugFailed {
        device: String,
    },
    /// The guest took or returned memory of a virtio-mem device. QEMU reports at most one per
    /// second.
    MemorySize {
        device: String,
        /// The guest's share of the device after the change.
        size: Bytes,
    },
    /// The guest was reset. It finds plugged devices at boot, and QEMU completes pending removals
    /// (qapi/qdev.json).
    Reset,
    /// The domain ended or moved to another node, with libvirt's reason.
    Stopped(String),
    Paused,
    Resumed,
}

/// A guest's answer through ACPI's `_OST`, as QEMU forwards it (qapi/acpi.json).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ost {
    /// The device's alias; `None` once QEMU has removed the device.
    pub device: Option<String>,
    /// A vCPU's number or a DIMM's slot.
    pub slot: u32,
    pub kind: SlotKind,
    /// The request that the guest answers: 1 for a device check, 3 or 0x103 for an eject.
    pub source: u32,
    pub status: u32,
}

impl Ost {
    /// Parses QEMU's answer to `query-acpi-ospm-status`, which has an entry for each slot. Slots
    /// about which the guest never reported anything (0, 0) are skipped.
    ///
    /// # Errors
    /// Another text than QEMU's answer, or QEMU's own error.
    pub fn from_query(answer: &str) -> Result<Vec<Self>, NotAnEvent> {
        const QUERY: &str = "query-acpi-ospm-status";
        let answer: QueryAnswer = read(QUERY, answer)?;
        let slots = match (answer.slots, answer.error) {
            (Some(slots), _) => slots,
            (None, error) => {
                let problem = error.map_or("no answer".to_owned(), |error| error.desc);
                return Err(NotAnEvent {
                    event: QUERY,
                    problem,
                });
            }
        };
        let answers = slots
            .into_iter()
            .filter(|slot| (slot.source, slot.status) != (0, 0))
            .map(|slot| ost(QUERY, slot));
        Ok(answers
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect())
    }

    /// True if both answers are about the same slot.
    pub(super) fn is_of_slot(&self, other: &Self) -> bool {
        (self.kind, self.slot) == (other.kind, other.slot)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotKind {
    Cpu,
    Dimm,
}

/// The meaning of an [`Ost`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcpiAnswer {
    /// The guest added the device. It may still not use it: a Linux that drops a CPU because of
    /// `nr_cpus` answers the same (measured).
    Added,
    NotAdded,
    /// The guest has started to release the device.
    Leaving,
    /// The guest released the device.
    Gone,
    /// The guest keeps the device.
    Kept,
}

impl Ost {
    /// Returns the meaning (Linux: include/linux/acpi.h, `acpi_device_hotplug` in
    /// drivers/acpi/scan.c); `None` for sources that no supported guest uses.
    pub fn answer(&self) -> Option<AcpiAnswer> {
        Some(match (self.source, self.status) {
            (0 | 1, 0) => AcpiAnswer::Added,
            (0 | 1, _) => AcpiAnswer::NotAdded,
            (3 | 0x103, 0) => AcpiAnswer::Gone,
            (3 | 0x103, 0x84) => AcpiAnswer::Leaving,
            (3 | 0x103, _) => AcpiAnswer::Kept,
            _ => return None,
        })
    }

    pub fn status_text(&self) -> &'static str {
        match self.status {
            0 => "success",
            1 => "failure",
            2 => "unknown notification",
            0x80 => "not supported",
            0x81 => "in use",
            0x82 => "busy",
            0x83 => "something that depends on it is busy",
            0x84 => "in progress",
            _ => "a status of no known meaning",
        }
    }
}

/// A monitor event whose details are not in QEMU's format.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the details of {event} are not in QEMU's format: {problem}")]
pub struct NotAnEvent {
    event: &'static str,
    problem: String,
}

#[derive(Deserialize)]
struct OstDetails {
    info: OstInfo,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct OstInfo {
    device: Option<String>,
    slot: String,
    slot_type: String,
    source: u32,
    status: u32,
}

#[derive(Deserialize)]
struct QueryAnswer {
    #[serde(rename = "return")]
    slots: Option<Vec<OstInfo>>,
    error: Option<QueryError>,
}

#[derive(Deserialize)]
struct QueryError {
    desc: String,
}

#[derive(Deserialize)]
struct DeviceDetails {
    device: Option<String>,
    path: Option<String>,
}

#[derive(Deserialize)]
struct SizeDetails {
    id: Option<String>,
    size: u64,
}

impl Event {
    /// The QEMU monitor events that [`Event::from_monitor`] parses.
    pub const MONITOR: [&'static str; 8] = [
        "ACPI_DEVICE_OST",
        "DEVICE_DELETED",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "MEM_UNPLUG_ERROR",
        "MEMORY_DEVICE_SIZE_CHANGE",
        "RESET",
        "STOP",
        "RESUME",
    ];

    /// Parses a QEMU monitor event; `None` for events that do not matter here.
    ///
    /// # Errors
    /// Details of a known event that cannot be parsed.
    pub fn from_monitor(name: &str, details: Option<&str>) -> Result<Option<Self>, NotAnEvent> {
        let details = details.unwrap_or("{}");
        Ok(match name {
            "ACPI_DEVICE_OST" => {
                let OstDetails { info } = read("ACPI_DEVICE_OST", details)?;
                ost("ACPI_DEVICE_OST", info)?.map(Self::Ost)
            }
            "DEVICE_DELETED" => {
                let DeviceDetails { device, path } = read("DEVICE_DELETED", details)?;
                Some(Self::DeviceDeleted {
                    device,
                    path: path.unwrap_or_default(),
                })
            }
            "DEVICE_UNPLUG_GUEST_ERROR" => unplug_failed("DEVICE_UNPLUG_GUEST_ERROR", details)?,
            "MEM_UNPLUG_ERROR" => unplug_failed("MEM_UNPLUG_ERROR", details)?,
            "MEMORY_DEVICE_SIZE_CHANGE" => {
                let SizeDetails { id, size } = read("MEMORY_DEVICE_SIZE_CHANGE", details)?;
                id.map(|device| Self::MemorySize {
                    device,
                    size: Bytes::new(size),
                })
            }
            "RESET" => Some(Self::Reset),
            "STOP" => Some(Self::Paused),
            "RESUME" => Some(Self::Resumed),
            _ => None,
        })
    }
}

fn ost(event: &'static str, info: OstInfo) -> Result<Option<Ost>, NotAnEvent> {
    let kind = match info.slot_type.as_str() {
        "CPU" => SlotKind::Cpu,
        "DIMM" => SlotKind::Dimm,
        _ => return Ok(None),
    };
    let slot = info.slot.parse().map_err(|_| NotAnEvent {
        event,
        problem: "the slot is not a number".to_owned(),
    })?;
    Ok(Some(Ost {
        device: info.device,
        slot,
        kind,
        source: info.source,
        status: info.status,
    }))
}

fn unplug_failed(event: &'static str, details: &str) -> Result<Option<Event>, NotAnEvent> {
    let DeviceDetails { device, path } = read(event, details)?;
    let from_path = || {
        let path = path.as_deref()?.strip_prefix("/machine/peripheral/")?;
        Some(path.split('/').next()?.to_owned())
    };
    let device = device.or_else(from_path);
    Ok(device.map(|device| Event::UnplugFailed { device }))
}

fn read<'d, T: Deserialize<'d>>(event: &'static str, details: &'d str) -> Result<T, NotAnEvent> {
    let wrong = |problem: String| NotAnEvent { event, problem };
    if details.len() > MAX_DETAILS {
        return Err(wrong("they are too long".to_owned()));
    }
    serde_json::from_str(details).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn monitor(name: &str, details: &str) -> Option<Event> {
        Event::from_monitor(name, Some(details)).unwrap()
    }

    /// Recorded from QEMU 10.0.2.
    #[test]
    fn qemu_monitor_events_are_parsed() {
        let added = monitor(
            "ACPI_DEVICE_OST",
            r#"{"info":{"device":"vcpu1","source":1,"status":0,"slot":"1","slot-type":"CPU"}}"#,
        );
        let Some(Event::Ost(ost)) = added else {
            panic!("{added:?}");
        };
        assert_eq!((ost.device.as_deref(), ost.slot), (Some("vcpu1"), 1));
        assert_eq!(
            (ost.kind, ost.answer()),
            (SlotKind::Cpu, Some(AcpiAnswer::Added))
        );

        let gone = r#"{"info":{"source":3,"status":0,"slot":"2","slot-type":"CPU"}}"#;
        let gone = monitor("ACPI_DEVICE_OST", gone);
        assert!(
            matches!(gone, Some(Event::Ost(ref ost)) if ost.answer() == Some(AcpiAnswer::Gone))
        );

        let part = r#"{"path":"/machine/peripheral/vcpu2/lapic"}"#;
        assert_eq!(
            monitor("DEVICE_DELETED", part),
            Some(Event::DeviceDeleted {
                device: None,
                path: "/machine/peripheral/vcpu2/lapic".to_owned()
            })
        );
        let size = r#"{"size":536870912,"qom-path":"/machine/peripheral/ua-mem0","id":"ua-mem0"}"#;
        assert_eq!(
            monitor("MEMORY_DEVICE_SIZE_CHANGE", size),
            Some(Event::MemorySize {
                device: "ua-mem0".to_owned(),
                size: Bytes::from_mib(512).unwrap()
            })
        );
        assert_eq!(Event::from_monitor("RESET", None), Ok(Some(Event::Reset)));
        assert_eq!(
            Event::from_monitor("NIC_RX_FILTER_CHANGED", Some("!")),
            Ok(None)
        );
    }

    /// Recorded from QEMU 10.0.2 after a DIMM and a vCPU were plugged.
    #[test]
    fn qemu_ospm_status_is_parsed() {
        let answer = r#"{"return":[
            {"device":"ua-d128","source":1,"status":0,"slot":"0","slot-type":"DIMM"},
            {"source":0,"status":0,"slot":"1","slot-type":"DIMM"},
            {"source":0,"status":0,"slot":"0","slot-type":"CPU"},
            {"device":"vcpu1","source":1,"status":0,"slot":"1","slot-type":"CPU"},
            {"source":3,"status":130,"slot":"2","slot-type":"CPU"}],"id":"libvirt-503"}"#;
        let answers = Ost::from_query(answer).unwrap();
        let read: Vec<_> = answers
            .iter()
            .map(|ost| (ost.kind, ost.slot, ost.answer().unwrap()))
            .collect();
        assert_eq!(
            read,
            [
                (SlotKind::Dimm, 0, AcpiAnswer::Added),
                (SlotKind::Cpu, 1, AcpiAnswer::Added),
                (SlotKind::Cpu, 2, AcpiAnswer::Kept)
            ]
        );
        let error = r#"{"id":"libvirt-3","error":{"class":"GenericError","desc":"no ACPI"}}"#;
        let error = Ost::from_query(error).unwrap_err().to_string();
        assert!(error.contains("no ACPI"), "{error}");
        for wrong in ["", "{}", "[]", r#"{"return":[{"slot":"x"}]}"#] {
            assert!(Ost::from_query(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_eject_success_means_released() {
        let answer = |source, status| {
            Ost {
                device: None,
                slot: 2,
                kind: SlotKind::Cpu,
                source,
                status,
            }
            .answer()
        };
        assert_eq!(answer(3, 132), Some(AcpiAnswer::Leaving));
        assert_eq!(answer(0x103, 0), Some(AcpiAnswer::Gone));
        for refused in [1, 0x80, 0x81, 0x82, 0x83] {
            assert_eq!(answer(3, refused), Some(AcpiAnswer::Kept));
        }
        assert_eq!(answer(1, 0x82), Some(AcpiAnswer::NotAdded));
        assert_eq!(answer(7, 0), None);
    }

    #[test]
    fn failed_unplug_names_device() {
        let failed = Some(Event::UnplugFailed {
            device: "dimm0".to_owned(),
        });
        let path = r#"{"path":"/machine/peripheral/dimm0"}"#;
        assert_eq!(monitor("DEVICE_UNPLUG_GUEST_ERROR", path), failed);
        let named = r#"{"device":"dimm0","msg":"no"}"#;
        assert_eq!(monitor("MEM_UNPLUG_ERROR", named), failed);
    }

    proptest! {
        #[test]
        fn no_details_panic(name in proptest::sample::select(&Event::MONITOR[..]), details in ".{0,80}") {
            drop(Event::from_monitor(name, Some(&details)));
        }
    }
}
