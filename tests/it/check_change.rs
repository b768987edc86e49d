//! `virtnode check --domain NAME --vcpus N`, `--memory SIZE` on domains of a real libvirt.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::support::libvirtd::Libvirtd;

const DOMAIN: &str = "<domain type='qemu'><name>room</name>
  <maxMemory slots='1' unit='MiB'>1024</maxMemory><memory unit='MiB'>64</memory>
  <vcpu current='1'>3</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu mode='custom'><model>qemu64</model><topology sockets='3' cores='1' threads='1'/>
    <numa><cell id='0' cpus='0-2' memory='64' unit='MiB'/></numa></cpu>
  <devices><controller type='pci' model='pcie-root'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/></devices></domain>";

const DIMM: &str = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target>
  </memory>";

fn virtio_mem(mib: u64) -> String {
    format!(
        "<memory model='virtio-mem'><target><size unit='MiB'>{mib}</size><node>0</node>
         <block unit='MiB'>2</block><requested unit='MiB'>0</requested></target></memory>"
    )
}

/// A libvirtd with the domain.
struct Node(Libvirtd);

impl Node {
    fn start() -> Self {
        let node = Self(Libvirtd::start().unwrap());
        let file = node.file("room", DOMAIN);
        node.0.virsh(&["create", &file]).unwrap();
        node
    }

    fn file(&self, name: &str, xml: &str) -> String {
        let file = self.0.directory().join(format!("{name}.xml"));
        fs::write(&file, xml).unwrap();
        file.to_string_lossy().into_owned()
    }

    fn attach(&self, name: &str, xml: &str) {
        let file = self.file(name, xml);
        self.0
            .virsh(&["attach-device", "room", &file, "--live"])
            .unwrap();
    }

    /// Returns the exit code, standard output and standard error.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
            .env_clear()
            .args(["check", "--connect", &self.0.uri(), "--domain", "room"])
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    fn check(&self, arguments: &[&str]) -> (i32, Value) {
        let (code, out, err) = self.run(&[arguments, &["-o", "json"]].concat());
        let answer = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{code}: {err}"));
        (code, answer)
    }
}

#[test]
fn total_of_a_running_domain_is_answered_by_the_preflight_of_hotplug() {
    let node = Node::start();
    let (code, answer) = node.check(&["--vcpus", "3"]);
    assert_eq!(code, 0, "{answer:#}");
    assert_eq!(answer["answer"], "feasible");
    let change = &answer["changes"][0];
    assert_eq!(change["before"]["vcpus"], 1);
    assert_eq!(change["requested"]["vcpus"], 3);
    assert_eq!(answer["headroom"]["vcpus"]["pluggable"], "1-2");
    let list = answer["notChecked"].to_string();
    assert!(
        list.contains("the guest") && list.contains("without KVM"),
        "{list}"
    );

    let (code, text, err) = node.run(&["--vcpus", "3"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let headline = "Feasible: hotplug can give domain room 3 vCPUs now (it has 1 vCPU)\n";
    assert!(text.starts_with(headline), "{text}");
    assert!(text.contains("\nNot checked:\n  * the guest: "), "{text}");

    let (code, answer) = node.check(&["--vcpus", "4", "--memory", "192MiB"]);
    assert_eq!(code, 4, "{answer:#}");
    assert_eq!(answer["changes"][0]["code"], "above-maximum-vcpus");
    assert_eq!(answer["changes"][1]["answer"], "feasible");

    let (code, text, _) = node.run(&["--memory", "2GiB"]);
    assert_eq!(code, 4);
    let headline = "Not feasible: hotplug cannot give domain room 2GiB of memory now \
                    (it has 64MiB of memory)\n  * 2GiB are more than the domain can reach";
    assert!(text.starts_with(headline), "{text}");

    node.0.virsh(&["suspend", "room"]).unwrap();
    let (code, answer) = node.check(&["--vcpus", "2"]);
    assert_eq!(code, 4, "{answer:#}");
    let message = answer["changes"][0]["message"].as_str().unwrap();
    assert!(message.contains("resume it"), "{message}");
}

/// The remedies, followed literally.
#[test]
fn device_that_the_remedy_names_can_be_attached_while_the_domain_runs() {
    let node = Node::start();
    node.attach("dimm", DIMM);
    let (code, answer) = node.check(&["--memory", "320MiB"]);
    assert_eq!(code, 4, "{answer:#}");
    assert_eq!(answer["changes"][0]["code"], "no-slot");
    let message = answer["changes"][0]["message"].as_str().unwrap();
    assert!(
        message.contains("of up to 768MiB to a free PCI slot while it runs"),
        "{message}"
    );

    node.attach("first", &virtio_mem(256));
    let (code, answer) = node.check(&["--memory", "320MiB"]);
    assert_eq!(code, 0, "{answer:#}");
    assert_eq!(answer["headroom"]["memory"]["reachable"], "448MiB");
    let (code, answer) = node.check(&["--memory", "704MiB"]);
    assert_eq!(code, 4, "{answer:#}");
    let message = answer["changes"][0]["message"].as_str().unwrap();
    assert!(
        message.contains("another virtio-mem device of up to 512MiB"),
        "{message}"
    );

    node.attach("second", &virtio_mem(512));
    let (code, answer) = node.check(&["--memory", "704MiB"]);
    assert_eq!(code, 0, "{answer:#}");
    // The same room without a request.
    let (_, answer) = node.check(&[]);
    let memory = &answer["headroom"]["memory"];
    assert_eq!(memory["reachable"], "960MiB");
    assert_eq!(
        (&memory["freeSlots"], &memory["forDevices"]),
        (&0.into(), &"64MiB".into())
    );
}

#[test]
fn total_that_cannot_be_asked_about_is_a_usage_error() {
    let node = Node::start();
    for (arguments, words) in [
        (vec!["--vcpus", "2", "--try"], "cannot try hotplug"),
        (vec!["--vcpus", "2", "--cores", "2"], "cannot be used with"),
        (
            vec!["--vcpus", "2", "--libvirt-version", "11.3.0"],
            "--domain needs this node's libvirt",
        ),
    ] {
        let (code, out, err) = node.run(&arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{err}");
        assert!(err.contains(words), "{err}");
    }
    node.0.virsh(&["destroy", "room"]).unwrap();
    let (code, _, err) = node.run(&["--vcpus", "2"]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("is not running here"), "{err}");
}
