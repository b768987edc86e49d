//! A node of KubeVirt as an operator sees it: a daemon with the settings of the overlay, imitated
//! launchers, and a client that changes their virtual machines as KubeVirt does.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::label_documents::write_documents;
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::guest::Host as _;
use crate::support::launchers::vm::Vm;
use crate::support::launchers::{Launchers, pod_uid};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// Runs a command of virtnode and returns what it prints.
fn virtnode(arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    let output = command.env_clear().args(arguments).output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {complaint}");
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test]
async fn hotplug_by_another_client_is_verified_for_each_virtual_machine_by_name()
-> anyhow::Result<()> {
    let node = Launchers::new()?;
    let launchers = node.start_all(&[pod_uid(1), pod_uid(2)]).await?;
    let web = Vm {
        namespace: "shop",
        name: "web",
        words: "lab.cpus=online",
        ..Vm::default()
    };
    let old = Vm {
        namespace: "legacy",
        name: "old",
        words: "nr_cpus=1",
        ..Vm::default()
    };
    let _web = launchers[0].guest(&web).await?;
    let _old = launchers[1].guest(&old).await?;

    let documents = tempfile::tempdir()?;
    write_documents(documents.path(), |arguments| launchers[0].virsh(arguments))?;
    let config = documents.path().join("config.yaml");
    fs::write(
        &config,
        format!(
            "connect: none\nlabels: {{documents: {}}}\n\
             launchers: {{enabled: true, directory: {}}}\nexternalChanges: {{enabled: true}}\n",
            documents.path().display(),
            node.pods().display()
        ),
    )?;
    let config = config.to_string_lossy();
    let daemon = Daemon::start("none", &["--config", &config]).await?;
    daemon.ready().await?;
    assert!(daemon.labels()?.contains_key("virtnode.io/qemu-version"));
    // Both were seen before the change.
    eventually(LONG, async || {
        let metrics = daemon.get("/metrics")?.text();
        let vcpus = metrics.lines().filter(|line| {
            line.starts_with("virtnode_domain_vcpus") && line.contains("state=\"online\"")
        });
        ensure!(vcpus.count() == 2, "{metrics}");
        Ok(())
    })
    .await?;

    for (launcher, vm) in launchers.iter().zip([&web, &old]) {
        let set = ["setvcpus", &vm.domain(), "3", "--live", "--config"];
        launcher.virsh(&set)?;
    }
    let socket = daemon.socket();
    let socket = socket.to_str().context("a path")?;
    let operations = ["operations", "--external", "--socket", socket];
    let printed = eventually(LONG, async || {
        let printed = virtnode(&operations)?;
        let has = |name: &str, verdict: &str| {
            let mut lines = printed.lines();
            lines.any(|line| line.contains(name) && line.contains(verdict))
        };
        ensure!(has("shop/web", "Verified"), "{printed}");
        ensure!(has("legacy/old", "GuestRefused"), "{printed}");
        Ok(printed)
    })
    .await?;
    println!("{printed}");
    let not_taken = "virtnode_domain_change_not_taken{domain=\"legacy_old\",name=\"old\",\
                     namespace=\"legacy\",resource=\"vcpus\"}";
    assert_eq!(daemon.metric(not_taken)?, 1.0);
    let metrics = daemon.get("/metrics")?.text();
    for line in metrics
        .lines()
        .filter(|line| line.starts_with("virtnode_domain_"))
    {
        println!("{line}");
    }
    Ok(())
}
