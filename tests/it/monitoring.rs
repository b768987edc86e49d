//! `manifests/monitoring`: alerts fire under their conditions, and a real Prometheus that scrapes a real
//! daemon has every metric used by rules and dashboard.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use virtnode::hotplug::Verdict;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig};
use crate::support::kustomize::{only, render};
use crate::support::libvirtd::Libvirtd;
use crate::support::prometheus::{Prometheus, programs};

const LONG: Duration = Duration::from_secs(60);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn objects() -> anyhow::Result<Vec<Value>> {
    render(&root().join("manifests/monitoring"))
}

fn rules(objects: &[Value]) -> anyhow::Result<Vec<Value>> {
    let rules = &only(objects, "PrometheusRule")?["spec"]["groups"][0]["rules"];
    rules.as_array().cloned().context("no rules")
}

fn dashboard(objects: &[Value]) -> anyhow::Result<Value> {
    let text = only(objects, "ConfigMap")?["data"]["virtnode.json"].as_str();
    Ok(serde_json::from_str(text.context("no dashboard")?)?)
}

/// Returns the panels' expressions, each with its panel.
fn expressions(dashboard: &Value) -> Vec<(&Value, &str)> {
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    panels
        .flat_map(|panel| {
            let targets = panel["targets"].as_array().into_iter().flatten();
            targets.filter_map(move |target| Some((panel, target["expr"].as_str()?)))
        })
        .collect()
}

/// Replaces Grafana's variables, for all nodes and a scrape interval of one second.
fn filled_in(expression: &str) -> String {
    expression
        .replace("$instance", ".*")
        .replace("$__rate_interval", "15s")
        .replace("$__range", "10m")
}

/// Returns the metrics used in an expression.
fn metrics(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| {
        *word == "up" || word.starts_with("virtnode_") || word.starts_with("process_")
    })
}

#[test]
fn alerts_fire_under_their_conditions_and_not_on_an_idle_node() -> anyhow::Result<()> {
    let promtool = programs()?.join("promtool");
    let directory = tempfile::tempdir()?;
    let objects = objects()?;
    let spec = &only(&objects, "PrometheusRule")?["spec"];
    fs::write(directory.path().join("rules.yaml"), spec.to_string())?;
    let tests = fs::read_to_string(root().join("tests/prometheus/alerts.yaml"))?;
    fs::write(directory.path().join("alerts.yaml"), &tests)?;
    for arguments in [
        ["check", "rules", "rules.yaml"],
        ["test", "rules", "alerts.yaml"],
    ] {
        let mut command = Command::new(&promtool);
        let output = command
            .args(arguments)
            .current_dir(directory.path())
            .output()?;
        ensure!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // Every alert fires in at least one test, and does not fire on the idle node.
    let tests: Value = serde_saphyr::from_str(&tests)?;
    let tested = |test: &Value, fires: bool| -> BTreeSet<String> {
        let checks = test["alert_rule_test"].as_array().into_iter().flatten();
        checks
            .filter(|check| check["exp_alerts"].is_array() == fires)
            .filter_map(|check| check["alertname"].as_str().map(str::to_owned))
            .collect()
    };
    let tests = tests["tests"].as_array().context("no tests")?;
    let fire: BTreeSet<String> = tests.iter().flat_map(|test| tested(test, true)).collect();
    let runbook = fs::read_to_string(root().join("docs/runbook.md"))?;
    for rule in rules(&objects)? {
        let alert = rule["alert"].as_str().context("no alert")?;
        assert!(fire.contains(alert), "{alert} fires in no test");
        assert!(
            tested(&tests[0], false).contains(alert),
            "{alert} is not tested on the idle node"
        );
        let anchor = format!(
            "https://virtnode.io/docs/runbook.md#{}",
            alert.to_lowercase()
        );
        assert_eq!(rule["annotations"]["runbook_url"], anchor);
        assert!(
            runbook.contains(&format!("\n## {alert}\n")),
            "no section {alert} in the runbook"
        );
    }
    Ok(())
}

/// The alert would miss a verdict that is classified as neither success nor failure.
#[test]
fn every_verdict_is_judged_by_the_alert_and_the_dashboard() -> anyhow::Result<()> {
    let objects = objects()?;
    let rules = rules(&objects)?;
    let failing = rules
        .iter()
        .find(|rule| rule["alert"] == "VirtnodeHotplugFailing");
    let failing = failing
        .and_then(|rule| rule["expr"].as_str())
        .context("no such alert")?;
    let dashboard = dashboard(&objects)?;
    let mut panels = expressions(&dashboard).into_iter();
    let excluded = panels.find_map(|(_, expression)| expression.split("verdict!~\"").nth(1));
    let verdicts = |list: &str| -> BTreeSet<String> {
        let list = list.split('"').next().unwrap_or_default();
        list.split('|').map(str::to_owned).collect()
    };
    let failing = verdicts(failing.split("verdict=~\"").nth(1).context("no verdicts")?);
    let mut judged = verdicts(excluded.context("no verdicts")?);
    assert!(judged.is_disjoint(&failing));
    judged.extend(failing);
    judged.insert(Verdict::Verified.as_str().to_owned());
    let all = Verdict::ALL.map(|verdict| verdict.as_str().to_owned());
    assert_eq!(judged, all.into());
    Ok(())
}

/// If `VIRTNODE_DASHBOARD` names a file, the test exercises more and writes the panels' data to that file,
/// for scripts/dashboard-picture.py.
#[tokio::test]
async fn real_prometheus_has_all_metrics_of_rules_and_dashboard() -> anyhow::Result<()> {
    let objects = objects()?;
    let rules = rules(&objects)?;
    let dashboard = dashboard(&objects)?;
    let mut libvirtd = Libvirtd::start()?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.yaml");
    fs::write(
        &config,
        "externalChanges: {enabled: true, graceSeconds: 5}\n",
    )?;
    let config = config.to_string_lossy();
    let arguments = ["--config", &config, "--probe-interval", "5"];
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    let spec = &only(&objects, "PrometheusRule")?["spec"];
    let prometheus = Prometheus::start(daemon.address(), spec).await?;
    if let Some(file) = std::env::var_os("VIRTNODE_DASHBOARD") {
        let started = now(&prometheus)?;
        let _guests = exercise(&mut libvirtd, &daemon).await?;
        let data = record(&prometheus, &dashboard, started)?;
        fs::write(file, data.to_string())?;
        return Ok(());
    }

    // Paused, so that the number of online vCPUs is unknown.
    libvirtd.start_domain("vm")?;
    // A change that its guest does not take.
    let narrow = GuestConfig {
        name: "narrow",
        words: "nr_cpus=1",
        ..Default::default()
    };
    let _narrow = Guest::start(&libvirtd, &narrow).await?;
    eventually(LONG, async || {
        ensure!(
            prometheus.names()?.contains("virtnode_domain_vcpus"),
            "no domain yet"
        );
        Ok(())
    })
    .await?;
    libvirtd.virsh(&["setvcpus", "narrow", "2", "--live"])?;
    eventually(LONG, async || {
        let metric = "virtnode_domain_change_not_taken";
        ensure!(prometheus.names()?.contains(metric), "taken, or no verdict");
        Ok(())
    })
    .await?;
    let known = prometheus.names()?;
    for (panel, expression) in expressions(&dashboard) {
        for metric in metrics(expression) {
            assert!(
                known.contains(metric),
                "{metric} of the panel {}",
                panel["title"]
            );
        }
        // Panels that filter out zero would be empty here, so the filter is relaxed.
        let expression = filled_in(expression)
            .replace("> 0", ">= -1e10")
            .replace("state=\"online\"", "state=\"plugged\"");
        let result = prometheus.query(&expression)?;
        ensure!(
            result.as_array().is_some_and(|series| !series.is_empty()),
            "nothing in the panel {} by {expression}",
            panel["title"]
        );
    }
    for rule in &rules {
        for metric in metrics(rule["expr"].as_str().context("no expression")?) {
            assert!(known.contains(metric), "{metric} of {}", rule["alert"]);
        }
    }
    // The node is healthy, and every rule can be evaluated.
    let evaluated = prometheus.get("/api/v1/rules")?;
    let evaluated = evaluated["groups"][0]["rules"]
        .as_array()
        .context("no rules")?;
    assert_eq!(evaluated.len(), rules.len());
    for rule in evaluated {
        assert_eq!(rule["health"], "ok", "{rule}");
        // The doctor may report errors about the machine that runs the tests, and a guest has not taken
        // a change.
        let names = [
            "VirtnodeDoctorError",
            "VirtnodeChangeNotTaken",
            "VirtnodeGuestLags",
        ];
        let may_wait = names.iter().any(|name| rule["name"] == *name);
        let states: &[&str] = if may_wait {
            &["inactive", "pending"]
        } else {
            &["inactive"]
        };
        let state = rule["state"].as_str().context("no state")?;
        assert!(states.contains(&state), "{rule}");
    }
    Ok(())
}

fn now(prometheus: &Prometheus) -> anyhow::Result<f64> {
    let now = prometheus.query("time()")?;
    now[0].as_f64().context("no time")
}

/// Exercises the node: hotplug of two guests, one of which uses only one vCPU, and an outage of libvirt.
async fn exercise<'l>(
    libvirtd: &'l mut Libvirtd,
    daemon: &Daemon,
) -> anyhow::Result<[Guest<'l>; 2]> {
    let hotplug = |arguments: &[&str]| -> anyhow::Result<()> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
        command
            .env_clear()
            .arg("--socket")
            .arg(daemon.socket())
            .arg("hotplug")
            .args(arguments);
        // The dashboard shows any verdict; only invalid usage has none.
        let output = command.output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() != Some(2), "{error}");
        Ok(())
    };
    libvirtd.kill()?;
    eventually(LONG, async || {
        ensure!(
            daemon.metric("virtnode_hypervisor_connected")? == 0.0,
            "still connected"
        );
        Ok(())
    })
    .await?;
    libvirtd.restart()?;
    let libvirtd = &*libvirtd;
    let web = GuestConfig {
        name: "web",
        words: "lab.blocks=online",
        ..Default::default()
    };
    let web = Guest::start(libvirtd, &web).await?;
    let old = GuestConfig {
        name: "old",
        words: "nr_cpus=1",
        ..Default::default()
    };
    let old = Guest::start(libvirtd, &old).await?;
    let vcpus = [
        ("web", "2"),
        ("web", "3"),
        ("old", "2"),
        ("web", "4"),
        ("web", "9"),
    ];
    for (domain, vcpus) in vcpus {
        hotplug(&["vcpus", domain, vcpus, "--online", "--timeout", "20"])?;
    }
    for size in ["1GiB", "1536MiB", "2GiB", "1GiB"] {
        hotplug(&["memory", "web", size, "--timeout", "20"])?;
    }
    hotplug(&["vcpus", "web", "3", "--timeout", "20"])?;
    let seen = daemon.metric("virtnode_probe_attempts_total{source=\"host\"}")?;
    eventually(LONG, async || {
        let probes = daemon.metric("virtnode_probe_attempts_total{source=\"host\"}")?;
        ensure!(probes >= seen + 3.0, "fewer than three idle probes");
        Ok(())
    })
    .await?;
    Ok([web, old])
}

/// Returns the data of each panel from `from` until now.
fn record(prometheus: &Prometheus, dashboard: &Value, from: f64) -> anyhow::Result<Value> {
    let to = now(prometheus)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let panels: Vec<Value> = panels
        .iter()
        .map(|panel| {
            let targets = panel["targets"].as_array().into_iter().flatten();
            let series = targets
                .map(|target| {
                    let expression = filled_in(target["expr"].as_str().context("no expression")?);
                    let result = prometheus.query_range(&expression, from, to, 1.0)?;
                    Ok(json!({"legend": target["legendFormat"], "result": result}))
                })
                .collect::<anyhow::Result<Vec<_>>>()?;
            let unit = &panel["fieldConfig"]["defaults"]["unit"];
            let stack = &panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"];
            Ok(json!({
                "title": panel["title"], "type": panel["type"], "at": panel["gridPos"],
                "unit": unit, "stack": stack, "targets": series,
            }))
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(json!({"from": from, "to": to, "panels": panels}))
}
