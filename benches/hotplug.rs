//! Figures of verified hotplug, each measured in the same run as its comparison.
//!
//! The output has the format of `benches/daemon.rs`. A run takes about twenty minutes, most of it for
//! ten thousand readings of the statistics. Arguments (`verdicts`, `external`, `readings`, `growth`,
//! `requests`, `scrapes`) select parts.

#[allow(dead_code, reason = "no benchmark uses all of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the integration tests"
)]
mod support;

use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use virtnode::daemon::Metrics;
use virtnode::executor::{AskedBy, Executor, Listener, Options, Order, Record};
use virtnode::external::{ExternalChanges, ServiceOptions};
use virtnode::hotplug::{HotplugRequest, Patience, Require, Verdict};
use virtnode::hypervisor::{ConnectionState, DomainBackend as _, Libvirt, LibvirtConfig};
use virtnode::journal::Journal;
use virtnode::monitor::Monitor;
use virtnode::units::Bytes;

use parts::{KillOnDrop, Memory, curl, free_port, median, ms, progress, report, scrape_time};
use support::eventually;
use support::guest::{Guest, GuestConfig};
use support::libvirtd::Libvirtd;

/// Number of domains without a guest: QEMU's firmware finds nothing to boot.
const DOMAINS: usize = 50;
/// Maximum number of vCPUs of each. The firmware never releases a vCPU, so each request adds one.
const MAXIMUM: u32 = 64;
/// Number of domains for single requests, with three requests per round.
const SINGLE_DOMAINS: usize = 8;
const SINGLE_ROUNDS: u32 = 16;
/// Number of rounds in which the daemon, then virsh, hotplugs all domains.
const BULK_ROUNDS: u32 = 5;
const READINGS: usize = 40;
/// Number of readings that must not grow the memory, after those that fill the caches.
const LONG_RUN: usize = 10_000;
const WARM_UP: usize = 500;
const SCRAPES: usize = 200;
const MANY_DOMAINS: usize = 500;
/// Number of vCPUs, added one by one to a real guest, and of memory increases.
const PROOFS: u32 = 15;

/// Maximum time for steps that normally take moments.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

async fn measure() -> anyhow::Result<()> {
    let named: Vec<String> = env::args()
        .skip(1)
        .filter(|name| !name.starts_with('-'))
        .collect();
    let wanted = |part: &str| named.is_empty() || named.iter().any(|name| name == part);
    progress("starting libvirt");
    let libvirtd = Arc::new(Libvirtd::start()?);
    if wanted("verdicts") {
        verdicts(&libvirtd).await?;
    }
    if wanted("external") {
        external(&libvirtd).await?;
    }
    if ["readings", "growth", "requests"].into_iter().any(wanted) {
        progress(&format!("starting {DOMAINS} domains"));
        blocking(&libvirtd, start_domains).await?;
    }
    if wanted("readings") {
        readings(&libvirtd).await?;
    }
    if wanted("growth") {
        growth(&libvirtd).await?;
    }
    if wanted("requests") {
        let daemon = Daemon::start(&libvirtd.uri()).await?;
        let socket = daemon.socket.clone();
        blocking(&libvirtd, move |libvirtd| {
            all_at_once(libvirtd, &socket)?;
            single_requests(libvirtd, &socket)
        })
        .await?;
    }
    if wanted("scrapes") {
        scrapes().await?;
    }
    Ok(())
}

/// Runs blocking work on another thread, so that the runtime still handles signals.
async fn blocking<T: Send + 'static>(
    libvirtd: &Arc<Libvirtd>,
    work: impl FnOnce(&Libvirtd) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let libvirtd = Arc::clone(libvirtd);
    tokio::task::spawn_blocking(move || work(&libvirtd)).await?
}

fn name(domain: usize) -> String {
    format!("tiny-{domain}")
}

fn start_domains(libvirtd: &Libvirtd) -> anyhow::Result<()> {
    for domain in 0..DOMAINS {
        let xml = format!(
            "<domain type='qemu'><name>{}</name><memory unit='MiB'>32</memory>\
             <vcpu current='1'>{MAXIMUM}</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
             <devices><controller type='usb' model='none'/></devices></domain>",
            name(domain)
        );
        let file = libvirtd.directory().join(format!("{}.xml", name(domain)));
        fs::write(&file, xml)?;
        libvirtd.virsh(&["create", &file.to_string_lossy()])?;
    }
    Ok(())
}

/// The daemon to measure, with its own files.
struct Daemon {
    _process: KillOnDrop,
    directory: TempDir,
    socket: PathBuf,
    metrics: String,
}

impl Daemon {
    async fn start(uri: &str) -> anyhow::Result<Self> {
        let directory = TempDir::with_prefix("virtnode-figures-")?;
        let port = free_port()?;
        let socket = directory.path().join("virtnode.sock");
        let log = File::create(directory.path().join("log"))?;
        let child = Command::new(parts::virtnode())
            .args(["run", "--publish", "file", "--connect", uri])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--probe-interval", "3600"])
            .arg("--state-directory")
            .arg(directory.path().join("state"))
            .arg("--features-directory")
            .arg(directory.path().join("features.d"))
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let daemon = Self {
            _process: KillOnDrop(child),
            directory,
            socket,
            metrics: format!("http://127.0.0.1:{port}/metrics"),
        };
        let ready = daemon.metrics.replace("/metrics", "/readyz");
        eventually(PATIENCE, async || curl(&["--fail", &ready]))
            .await
            .with_context(|| daemon.log())?;
        Ok(daemon)
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        format!("the daemon's log:\n{log}")
    }
}

/// Requests a vCPU count from the daemon and waits until libvirt has accepted it.
fn request(socket: &Path, domain: &str, count: u32) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let body = format!(r#"{{"count":{count},"require":"accepted","timeoutSeconds":60}}"#);
    let path = format!("/v1/domains/{domain}/vcpus");
    let length = body.len();
    let mut record = send(
        socket,
        &format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ),
    )?;
    // The daemon delays the response only briefly, so the operation may not be done yet.
    while record["state"] != "done" {
        let id = record["id"].as_str().context("record without an id")?;
        let path = format!("/v1/operations/{id}/progress");
        let get = format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n");
        record = send(socket, &get)?;
    }
    ensure!(record["verdict"] == "Verified", "{record:#}");
    Ok(started.elapsed())
}

/// Sends a request and returns the last JSON line of the response body.
fn send(socket: &Path, request: &str) -> anyhow::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no response")?;
    let last = body.lines().rfind(|line| line.starts_with('{'));
    let last = last.with_context(|| format!("no record in {answer}"))?;
    Ok(serde_json::from_str(last)?)
}

fn process(command: &mut Command) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let output = command.output()?;
    let took = started.elapsed();
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(took)
}

fn virsh(libvirtd: &Libvirtd, arguments: &[&str]) -> anyhow::Result<Duration> {
    let mut command = Command::new("virsh");
    process(
        command
            .args(["--quiet", "--connect", &libvirtd.uri()])
            .args(arguments),
    )
}

fn setvcpus(libvirtd: &Libvirtd, domain: &str, count: u32) -> anyhow::Result<Duration> {
    virsh(
        libvirtd,
        &["setvcpus", domain, &count.to_string(), "--live"],
    )
}

/// Adds one vCPU at a time, in turn with virsh, a request to the daemon, and the command.
fn single_requests(libvirtd: &Libvirtd, socket: &Path) -> anyhow::Result<()> {
    let rounds = SINGLE_ROUNDS as usize * SINGLE_DOMAINS;
    progress(&format!("{rounds} rounds of three requests"));
    let (mut by_virsh, mut by_request, mut by_command) = (Vec::new(), Vec::new(), Vec::new());
    let program = parts::virtnode();
    for round in 0..SINGLE_ROUNDS {
        for domain in (0..SINGLE_DOMAINS).map(name) {
            let count = 1 + 2 * BULK_ROUNDS + 3 * round;
            by_virsh.push(setvcpus(libvirtd, &domain, count + 1)?);
            by_request.push(request(socket, &domain, count + 2)?);
            let mut command = Command::new(&program);
            command
                .arg("--socket")
                .arg(socket)
                .args(["hotplug", "vcpus", &domain]);
            command.args([&(count + 3).to_string(), "--require", "accepted"]);
            by_command.push(process(&mut command)?);
        }
    }
    let [by_virsh, by_request, by_command] =
        [by_virsh, by_request, by_command].map(|mut times| median(&mut times));
    let comparison = format!(
        "virsh setvcpus --live: {}, each {rounds} times",
        ms(by_virsh)
    );
    report(
        "vCPU request until accepted by libvirt",
        &ms(by_request),
        &format!("<= {}", ms(by_virsh)),
        by_request <= by_virsh,
        &comparison,
    );
    // Without a goal: the command adds the start of a process.
    parts::print(&format!(
        "  with the command in its own process\t{}\t\t\t{comparison}",
        ms(by_command)
    ));
    Ok(())
}

/// Hotplugs all domains at once with the daemon, and one after another with virsh.
fn all_at_once(libvirtd: &Libvirtd, socket: &Path) -> anyhow::Result<()> {
    progress(&format!(
        "{BULK_ROUNDS} rounds of {DOMAINS} domains at once"
    ));
    let (mut by_daemon, mut by_virsh) = (Vec::new(), Vec::new());
    for round in 0..BULK_ROUNDS {
        let count = 1 + 2 * round;
        let started = Instant::now();
        thread::scope(|scope| {
            let requests: Vec<_> = (0..DOMAINS)
                .map(|domain| scope.spawn(move || request(socket, &name(domain), count + 1)))
                .collect();
            requests.into_iter().try_for_each(|request| {
                let joined = request.join();
                joined.map_or_else(
                    |_| anyhow::bail!("a request panicked"),
                    |took| took.map(drop),
                )
            })
        })?;
        by_daemon.push(started.elapsed());
        let started = Instant::now();
        for domain in (0..DOMAINS).map(name) {
            setvcpus(libvirtd, &domain, count + 2)?;
        }
        by_virsh.push(started.elapsed());
    }
    let (by_daemon, by_virsh) = (median(&mut by_daemon), median(&mut by_virsh));
    report(
        &format!("{DOMAINS} domains hotplugged at once, proof required: accepted"),
        &ms(by_daemon),
        &format!("<= {}", ms(by_virsh / 2)),
        by_daemon <= by_virsh / 2,
        &format!("one after another by virsh: {}", ms(by_virsh)),
    );
    Ok(())
}

/// Compares one reading of the daemon's monitor with `virsh domstats`.
async fn readings(libvirtd: &Arc<Libvirtd>) -> anyhow::Result<()> {
    progress(&format!("{READINGS} readings of the statistics"));
    let mut monitor = monitor(libvirtd).await?;
    let (mut ours, mut all, mut same) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..READINGS {
        let started = Instant::now();
        monitor.refresh().await?;
        ours.push(started.elapsed());
        all.push(virsh(libvirtd, &["domstats"])?);
        same.push(virsh(
            libvirtd,
            &["domstats", "--state", "--vcpu", "--balloon", "--nowait"],
        )?);
    }
    let [ours, all, same] = [ours, all, same].map(|mut times| median(&mut times));
    report(
        &format!("statistics of {DOMAINS} domains read"),
        &ms(ours),
        &format!("<= {}", ms(all / 2)),
        ours <= all / 2,
        &format!(
            "virsh domstats: {}; of the same three groups: {}",
            ms(all),
            ms(same)
        ),
    );
    Ok(())
}

/// Starts a monitor and reads all domains once.
async fn monitor(libvirtd: &Libvirtd) -> anyhow::Result<Monitor<Libvirt>> {
    let metrics = Arc::new(Metrics::new());
    let control = Arc::new(connect(libvirtd, &metrics).await?);
    let mut monitor = Monitor::new(control, Arc::clone(&metrics.inventory));
    monitor.refresh().await?;
    ensure!(
        metrics.inventory.domains().len() == DOMAINS,
        "domains are missing"
    );
    Ok(monitor)
}

/// Measures the memory growth over very many readings.
async fn growth(libvirtd: &Libvirtd) -> anyhow::Result<()> {
    progress(&format!("{LONG_RUN} readings of the statistics"));
    let mut monitor = monitor(libvirtd).await?;
    for _ in 0..WARM_UP {
        monitor.refresh().await?;
    }
    let before = Memory::of(std::process::id())?;
    for _ in 0..LONG_RUN {
        monitor.refresh().await?;
    }
    let after = Memory::of(std::process::id())?;
    let grown = after.anonymous - before.anonymous;
    report(
        &format!("memory growth over {LONG_RUN} readings"),
        &format!("{grown:+.2} MB"),
        "< 0.1 MB",
        grown < 0.1,
        &format!("{:.1} MB anonymous before", before.anonymous),
    );
    Ok(())
}

async fn connect(libvirtd: &Libvirtd, metrics: &Metrics) -> anyhow::Result<Libvirt> {
    let control = Libvirt::start(
        LibvirtConfig::new(libvirtd.uri()),
        Arc::clone(&metrics.hypervisor),
    );
    let mut listening = control.health();
    let up = listening.wait_for(|state| matches!(state, ConnectionState::Up(_)));
    timeout(PATIENCE, up).await??;
    Ok(control)
}

/// Measures `/metrics` of a daemon with many domains of libvirt's test driver.
async fn scrapes() -> anyhow::Result<()> {
    progress(&format!("{SCRAPES} scrapes with {MANY_DOMAINS} domains"));
    let directory = TempDir::with_prefix("virtnode-figures-")?;
    let file = directory.path().join("domains.xml");
    let mut xml = "<node>".to_owned();
    for domain in 0..MANY_DOMAINS {
        // The test driver creates the domains anew for each connection, so the UUIDs must be fixed.
        write!(
            xml,
            "<domain type='test'><name>vm-{domain}</name>\
             <uuid>00000000-0000-4000-8000-{domain:012}</uuid><memory unit='MiB'>64</memory>\
             <vcpu current='2'>4</vcpu><os><type>hvm</type></os></domain>"
        )?;
    }
    fs::write(&file, xml + "</node>")?;
    let daemon = Daemon::start(&format!("test://{}", file.display())).await?;
    let of_domains = |text: &str| {
        let lines = text.lines();
        lines
            .filter(|line| line.starts_with("virtnode_domain_"))
            .count()
    };
    let calls = |text: &str| -> f64 {
        let counts = text.lines().filter_map(|line| {
            line.strip_prefix("virtnode_hypervisor_call_duration_seconds_count")
        });
        counts
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    };
    let series = eventually(PATIENCE, async || {
        let series = of_domains(&curl(&["--fail", &daemon.metrics])?);
        ensure!(series >= 5 * MANY_DOMAINS, "{series} series of domains");
        Ok(series)
    })
    .await?;
    // A reading of the monitor meanwhile also calls libvirt, so such a round is repeated.
    for _ in 0..20 {
        let before = calls(&curl(&["--fail", &daemon.metrics])?);
        let mut times = Vec::new();
        for _ in 0..SCRAPES {
            times.push(scrape_time(&daemon.metrics)?);
        }
        let calls = calls(&curl(&["--fail", &daemon.metrics])?) - before;
        if calls > 0.0 {
            sleep(Duration::from_millis(500)).await;
            continue;
        }
        let median = median(&mut times);
        report(
            &format!("/metrics with {series} series of {MANY_DOMAINS} domains, by curl"),
            &format!("{}, {calls} libvirt calls", ms(median)),
            "<= 5 ms, 0 calls",
            median <= Duration::from_millis(5),
            "",
        );
        return Ok(());
    }
    anyhow::bail!("every round overlapped a reading of the monitor");
}

/// Times from the last event or observation to each verdict.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Duration>>>);

impl Listener for Spans {
    fn changed(&self, _: &Record) {}

    fn concluded_after(&self, span: Duration) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(span);
    }

    fn journal_failed(&self) {}
}

/// Measures the time from the last evidence of a real guest to the verdict, including the journal.
async fn verdicts(libvirtd: &Libvirtd) -> anyhow::Result<()> {
    progress(&format!("{} verdicts on a real guest", 2 * PROOFS));
    let config = GuestConfig {
        words: "lab.cpus=online lab.blocks=online",
        maximum: PROOFS + 1,
        ..GuestConfig::default()
    };
    let _guest = Guest::start(libvirtd, &config).await?;
    let state = TempDir::with_prefix("virtnode-figures-")?;
    let metrics = Arc::new(Metrics::new());
    let control = Arc::new(connect(libvirtd, &metrics).await?);
    let spans = Spans::default();
    let journal = Journal::open(state.path())?;
    let executor = Executor::start(control, journal, Options::default(), spans.clone())?;
    for more in 1..=PROOFS {
        let size = Bytes::new((512 + 128 * u64::from(more)) << 20);
        for request in [
            HotplugRequest::Vcpus {
                count: 1 + more,
                online: false,
            },
            HotplugRequest::Memory { size, force: false },
        ] {
            let order = Order {
                domain: config.name.parse()?,
                request,
                require: Require::Online,
                persistent: false,
                timeout: PATIENCE,
                idempotency_key: None,
                asked_by: AskedBy::Local { uid: 0 },
            };
            let id = executor.submit(order).await?;
            let mut records = executor.watch(&id).context("unknown operation")?;
            let record = records.wait_for(Record::is_done).await?.clone();
            ensure!(record.verdict == Some(Verdict::Verified), "{record:#?}");
        }
    }
    executor.stop().await;
    let mut spans = spans
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    ensure!(spans.len() == 2 * PROOFS as usize, "verdicts are missing");
    let median = median(&mut spans);
    let slowest = spans.last().copied().unwrap_or_default();
    report(
        "last evidence to verdict, with a real guest",
        &format!("{}, at most {}", ms(median), ms(slowest)),
        "<= 20 ms",
        median <= Duration::from_millis(20),
        &format!("{} operations", spans.len()),
    );
    Ok(())
}

/// Measures the time from a guest's own report of a vCPU that virsh plugged to the verdict.
async fn external(libvirtd: &Arc<Libvirtd>) -> anyhow::Result<()> {
    progress(&format!("{PROOFS} changes by virsh on a real guest"));
    let config = GuestConfig {
        name: "external",
        words: "lab.cpus=online",
        maximum: PROOFS + 1,
        ..GuestConfig::default()
    };
    let guest = Guest::start(libvirtd, &config).await?;
    let metrics = Arc::new(Metrics::new());
    let backend = Arc::new(connect(libvirtd, &metrics).await?);
    let monitor = Monitor::new(Arc::clone(&backend), Arc::clone(&metrics.inventory));
    let options = ServiceOptions {
        grace: PATIENCE,
        patience: Patience::default(),
    };
    let service = ExternalChanges::new(
        backend,
        options,
        monitor.sightings(),
        Arc::default(),
        Arc::clone(&metrics.external),
    );
    let stop = CancellationToken::new();
    let running = [
        tokio::spawn(monitor.run(stop.clone())),
        tokio::spawn(service.run(stop.clone())),
    ];
    // The first look.
    sleep(Duration::from_secs(3)).await;
    let (mut after_guest, mut after_call) = (Vec::new(), Vec::new());
    for count in 2..=PROOFS + 1 {
        let called = Instant::now();
        let client = Arc::clone(libvirtd);
        let call = tokio::task::spawn_blocking(move || {
            let count = count.to_string();
            client.virsh(&["setvcpus", "external", &count, "--live"])
        });
        call.await??;
        let cpus = format!("0-{}", count - 1);
        let mut has_it = None;
        let judged = loop {
            if has_it.is_none() && guest.witness().is_ok_and(|sees| sees.online == cpus) {
                has_it = Some(Instant::now());
            }
            let newest = metrics.external.log.records().into_iter().next();
            let judged = newest.is_some_and(|record| {
                let requested = record.change.requested.map(|amount| amount.to_string());
                record.change.verdict == Some(Verdict::Verified)
                    && requested == Some(count.to_string())
            });
            if judged && has_it.is_some() {
                break Instant::now();
            }
            ensure!(
                called.elapsed() < PATIENCE,
                "no verdict about {count} vCPUs"
            );
            sleep(Duration::from_millis(5)).await;
        };
        after_guest.push(judged.duration_since(has_it.unwrap_or(judged)));
        after_call.push(judged.duration_since(called));
        // The next change is one of its own.
        sleep(Duration::from_secs(1)).await;
    }
    stop.cancel();
    for task in running {
        task.await?;
    }
    let (median_guest, median_call) = (median(&mut after_guest), median(&mut after_call));
    let slowest = after_guest.last().copied().unwrap_or_default();
    report(
        "change by virsh to verdict, after the guest's own report",
        &format!("{}, at most {}", ms(median_guest), ms(slowest)),
        "<= 2 s",
        slowest <= Duration::from_secs(2),
        &format!(
            "{PROOFS} vCPUs; {} after the call of virsh",
            ms(median_call)
        ),
    );
    Ok(())
}
