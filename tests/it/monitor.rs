//! The metrics of real running domains, from their start to their end.

use std::time::Duration;

use anyhow::ensure;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn metrics_follow_domains_of_any_name() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let file = libvirtd.directory().join("odd.xml");
    std::fs::write(
        &file,
        "<domain type='qemu'><name>a \"b\" \\n 'c'</name><memory unit='MiB'>16</memory>\
         <vcpu current='1'>2</vcpu><os><type machine='q35'>hvm</type></os>\
         <features><acpi/><apic/></features></domain>",
    )?;
    let (name, escaped) = (r#"a "b" \n 'c'"#, r#"a \"b\" \\n 'c'"#);
    let vcpus = |state| {
        format!(
            "virtnode_domain_vcpus{{connection=\"host\",domain=\"{escaped}\",state=\"{state}\"}}"
        )
    };
    let shows = async |wanted: &[(String, f64)]| {
        eventually(LONG, async || {
            for (series, value) in wanted {
                let shown = daemon.metric(series)?;
                ensure!(shown == *value, "{series} is {shown}, not {value}");
            }
            Ok(())
        })
        .await
    };
    let state = |state| format!("virtnode_domains{{state=\"{state}\"}}");

    libvirtd.virsh(&["create", "--paused", &file.to_string_lossy()])?;
    shows(&[
        (state("paused"), 1.0),
        (vcpus("maximum"), 2.0),
        (vcpus("plugged"), 1.0),
    ])
    .await?;
    libvirtd.virsh(&["setvcpus", name, "2", "--live"])?;
    shows(&[(vcpus("plugged"), 2.0)]).await?;
    libvirtd.virsh(&["resume", name])?;
    shows(&[(state("paused"), 0.0), (state("running"), 1.0)]).await?;

    libvirtd.end_domain(name)?;
    shows(&[(state("running"), 0.0)]).await?;
    let text = daemon.get("/metrics")?.text();
    assert!(!text.contains(escaped), "{text}");
    Ok(())
}
