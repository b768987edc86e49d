//! Hostile domain names, from a real libvirt through the daemon to logs, metrics, the local API,
//! the journal and the command line.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use quick_xml::escape::escape;
use serde_json::Value;
use virtnode::domain::is_plain;

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

const BREAKS: [char; 2] = ['\n', '\r'];

/// Names that libvirt accepts for a transient domain: anything but a slash (measured: 11.3; `define`
/// rejects line feeds). XML has no NUL and no escape.
fn names() -> Vec<String> {
    let mut names: Vec<String> = [
        r#"a "b" \n 'c' <&> ${HOME} `d`; % {} {0}"#,
        // Each in the syntax of one reader.
        r#"vm" verdict="Forged" forged="yes"#,
        r#"vm","verdict":"Forged","forged":"yes"#,
        r#"vm"} 1 virtnode_forged{x=""#,
        "--help",
        " vm ",
        // 18 bytes: libvirt cuts longer ones after 20 for a file's name, also through a character.
        "虚拟 ü 🐧 a\u{301}",
        "vm\n{\"message\":\"operation finished\",\"forged\":\"yes\"}\nvirtnode_forged 1\n",
        // A tab, a carriage return, and line breaks and a turned order as Unicode has them.
        "a\tb\rc\u{85}d\u{2028}e\u{202e}txt.f",
    ]
    .map(str::to_owned)
    .into();
    // libvirt's files have this name with a suffix.
    names.push("ü".repeat(120));
    names
}

fn definition(name: &str) -> String {
    let name = escape(name).replace('\r', "&#13;");
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>\
         <vcpu current='1'>2</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <features><acpi/><apic/></features></domain>"
    )
}

fn percent_encoded(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        write!(path, "%{byte:02X}").expect("a string takes all");
        path
    })
}

/// Returns the value of `domain` in each series of a metric; an invalid line is an error.
fn domains_in(metrics: &str, metric: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for line in metrics.split('\n').filter(|line| line.starts_with(metric)) {
        let rest = line[metric.len()..].strip_prefix("{connection=\"host\",domain=\"");
        let mut characters = rest
            .with_context(|| format!("no domain in {line}"))?
            .chars();
        let mut value = String::new();
        loop {
            match characters.next().context("a value without an end")? {
                '"' => break,
                '\\' => value.push(match characters.next() {
                    Some('n') => '\n',
                    Some(c @ ('\\' | '"')) => c,
                    other => anyhow::bail!("{other:?} is escaped in {line}"),
                }),
                c => value.push(c),
            }
        }
        let rest = characters.as_str();
        let rest = rest.strip_prefix(",state=\"plugged\"} ");
        if let Some(figure) = rest {
            figure.parse::<f64>()?;
            found.push(value);
        }
    }
    found.sort();
    Ok(found)
}

#[tokio::test]
async fn hostile_domain_name_stays_data_everywhere() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--log", "debug"]).await?;
    daemon.ready().await?;
    let socket = daemon.socket();
    let mut names = names();
    names.sort();
    for name in &names {
        libvirtd.create(&definition(name)).unwrap();
    }
    libvirtd.create(&definition("a/b")).unwrap_err();

    // The local API returns every name unchanged.
    let listed = eventually(LONG, async || {
        let listed = daemon.api("GET", "/v1/domains", "")?;
        let domains = listed["domains"].as_array().context("a list")?;
        let uuid = |domain: &Value| {
            let text = |key: &str| domain[key].as_str().map(str::to_owned);
            Some((text("name")?, text("uuid")?))
        };
        let listed: BTreeMap<_, _> = domains.iter().filter_map(uuid).collect();
        ensure!(listed.len() == names.len(), "{listed:?}");
        Ok(listed)
    })
    .await?;
    assert!(listed.keys().eq(&names), "{listed:?}");
    for name in &names {
        let path = format!("/v1/domains/{}", percent_encoded(name));
        // A request with a line break in the name is rejected: use the UUID of such a domain.
        if name.contains(BREAKS) {
            assert!(daemon.api("GET", &path, "").is_err())
        } else {
            assert_eq!(daemon.api("GET", &path, "")?["name"], *name)
        }
    }

    // Each domain is changed, and the report is well-formed.
    for (name, uuid) in &listed {
        let hotplug = ["hotplug", "vcpus", "--require", "accepted", "--"];
        if name.contains(BREAKS) {
            let (code, out, err) = run(&socket, &[&hotplug[..], &[name, "2"]].concat())?;
            assert_eq!((code, out.as_str()), (2, ""), "{err}");
            assert!(err.contains("line break"), "{err}");
        }
        let called = if name.contains(BREAKS) { uuid } else { name };
        let (code, out, err) = run(&socket, &[&hotplug[..], &[called, "2"]].concat())?;
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        assert!(out.starts_with("Verified: "), "{out}");
        assert!(
            out.split('\n').all(|line| line.chars().all(is_plain)),
            "{out:?}"
        );
        let of_domain = out.lines().filter(|line| line.starts_with("  domain  "));
        assert_eq!(of_domain.count(), 1, "{out}");
    }
    let (code, out, _) = run(&socket, &["operations"])?;
    assert_eq!((code, out.lines().count()), (0, names.len() + 1), "{out}");
    assert!(
        out.split('\n').all(|line| line.chars().all(is_plain)),
        "{out:?}"
    );
    let (_, out, _) = run(&socket, &["operations", "--output", "json"])?;
    let operations: Value = serde_json::from_str(&out)?;
    let operations = operations["operations"].as_array().context("a list")?;
    for operation in operations {
        let id = operation["id"].as_str().context("an id")?.parse()?;
        let kept = &daemon.journal(&id)?["entry"]["record"];
        assert_eq!(kept["domain"], operation["domain"]);
    }
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let done = operations
        .iter()
        .filter_map(|it| text(&it["domain"]["name"]));
    assert_eq!(sorted(done.collect()), names);

    // Metrics: one series for each domain, and none that is forged.
    eventually(LONG, async || {
        let metrics = daemon.get("/metrics")?.text();
        let forged = metrics
            .split('\n')
            .find(|line| line.starts_with("virtnode_forged"));
        ensure!(forged.is_none(), "{forged:?}");
        let shown = domains_in(&metrics, "virtnode_domain_vcpus")?;
        ensure!(shown == names, "{shown:?}");
        Ok(())
    })
    .await?;

    // Log: one record per line, and each verdict names its domain.
    let log = daemon.log();
    let verdicts = log.iter().filter(|line| !line["verdict"].is_null());
    let verdicts = verdicts.filter_map(|line| {
        assert_eq!(line["verdict"], "Verified", "{line}");
        assert_eq!(line["message"], "operation finished", "{line}");
        text(&line["span"]["domain"])
    });
    assert_eq!(sorted(verdicts.collect()), names);
    for line in &log {
        assert!(line.is_object(), "no record: {line}");
        assert!(line["forged"].is_null(), "{line}");
    }
    Ok(())
}
