//! Carries hotplug requests out by virsh, as the core says, and nothing more: enough to hold the
//! core's judgement against real guests.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use virtnode::domain::{Domain, DomainState, Stats};
use virtnode::hotplug::{
    Action, Agent, Contact, Event, GuestVcpus, History, Host, HotplugRequest, Moment, Observation,
    Outcome, Patience, Preflight, Rejection, Require, Return, Step, Terms, judge, preflight,
};

use super::libvirtd::Libvirtd;

/// How often a domain is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// One domain, reached by virsh.
pub(crate) struct ByVirsh<'l> {
    libvirtd: &'l Libvirtd,
    name: String,
    began: (Instant, i64),
    events: Receiver<(Instant, Event)>,
    watcher: Child,
}

/// How a request ended, and its history if it came so far.
pub(crate) enum Ended {
    Rejected(Rejection),
    Judged(Box<(Outcome, History)>),
}

impl Ended {
    /// The outcome of a request that was not rejected.
    pub(crate) fn outcome(&self) -> &Outcome {
        match self {
            Self::Rejected(rejection) => panic!("rejected: {rejection}"),
            Self::Judged(judged) => &judged.0,
        }
    }
}

impl<'l> ByVirsh<'l> {
    /// Begins to listen to the domain's events.
    pub(crate) fn new(libvirtd: &'l Libvirtd, name: &str) -> anyhow::Result<Self> {
        let mut watcher = Command::new("virsh")
            .args(["--quiet", "--connect", &libvirtd.uri()])
            .args(["qemu-monitor-event", name, "--loop"])
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()?;
        let lines = BufReader::new(watcher.stdout.take().context("no output")?).lines();
        let (send, events) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(event) = event_of(&line)
                    && send.send((Instant::now(), event)).is_err()
                {
                    return;
                }
            }
        });
        let wall = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok(Self {
            libvirtd,
            name: name.to_owned(),
            began: (Instant::now(), i64::try_from(wall.as_millis())?),
            events,
            watcher,
        })
    }

    fn moment(&self, instant: Instant) -> Moment {
        let since = instant.saturating_duration_since(self.began.0);
        Moment::from_millis(self.began.1).after(since)
    }

    fn now(&self) -> Moment {
        self.moment(Instant::now())
    }

    /// Looks at the domain from all sides.
    pub(crate) fn observe(&self) -> anyhow::Result<Observation> {
        let at = self.now();
        let virsh = |arguments: &[&str]| self.libvirtd.virsh(arguments);
        let state = match virsh(&["domstate", &self.name])?.trim() {
            "running" => DomainState::Running,
            "paused" => DomainState::Paused,
            "shut off" => DomainState::ShutOff,
            _ => DomainState::Unknown,
        };
        let xml = virsh(&["dumpxml", &self.name])?;
        let domain = Domain::parse("live XML", xml.as_bytes(), state)?;
        let stats = virsh(&["domstats", &self.name, "--vcpu", "--balloon", "--nowait"])?;
        let stats = Stats::from_parameters(stats.lines().filter_map(|line| {
            let (name, value) = line.trim().split_once('=')?;
            Some((name, value.parse().ok()?))
        }));
        let agent = match domain.agent.may_answer() {
            false => Agent::NotAsked,
            true => match virsh(&["guestvcpus", &self.name]) {
                Err(error) => Agent::Silent(error.to_string()),
                Ok(table) => {
                    let field = |name: &str| {
                        let line = table.lines().find(|line| line.starts_with(name));
                        line.and_then(|line| line.split_once(':'))
                            .map_or("", |(_, value)| value.trim())
                    };
                    Agent::Answered(GuestVcpus::from_libvirt(field("vcpus"), field("online"))?)
                }
            },
        };
        Ok(Observation {
            at,
            domain,
            persistent: false,
            stats: Some(stats),
            agent,
            job: None,
        })
    }

    /// Carries a request out to its verdict.
    pub(crate) fn carry_out(
        &self,
        request: HotplugRequest,
        require: Require,
        within: Duration,
    ) -> anyhow::Result<Ended> {
        let terms = Terms {
            require,
            deadline: self.now().after(within),
            patience: Patience::default(),
        };
        let before = self.observe()?;
        let plan = match preflight(&request, &before, &Host::default()) {
            Preflight::Ready(plan) => plan,
            Preflight::Rejected(rejection) => return Ok(Ended::Rejected(rejection)),
            Preflight::Blocked(why) => bail!("blocked by {why}"),
        };
        let mut history = History::new(request, terms, plan, before, true);
        let (send, returns) = mpsc::channel();
        loop {
            match judge(&history, self.now()) {
                Step::Done(outcome) => {
                    ensure!(
                        self.now() <= terms.deadline.after(Duration::from_secs(3)),
                        "the verdict came after the deadline"
                    );
                    return Ok(Ended::Judged(Box::new((*outcome, history))));
                }
                Step::Call(action) => {
                    let mut command = self.command(&action)?;
                    history.called(self.now(), action);
                    let send = send.clone();
                    thread::spawn(move || send.send(returned(&mut command)));
                }
                Step::Wait { .. } => {
                    let until = Instant::now() + LOOK;
                    loop {
                        let rest = until.saturating_duration_since(Instant::now());
                        match self.events.recv_timeout(rest) {
                            Ok((at, event)) => history.happened(self.moment(at), event),
                            Err(RecvTimeoutError::Timeout) => break,
                            Err(RecvTimeoutError::Disconnected) => thread::sleep(rest),
                        }
                    }
                    while let Ok(how) = returns.try_recv() {
                        history.returned(self.now(), how);
                    }
                    match self.observe() {
                        Ok(seen) => history.observed(seen),
                        Err(error) if error.to_string().contains("failed to get domain") => {
                            history.out_of_contact(self.now(), Contact::Absent);
                        }
                        Err(error) => {
                            let why = Contact::Unreachable(error.to_string());
                            history.out_of_contact(self.now(), why);
                        }
                    }
                }
            }
        }
    }

    fn command(&self, action: &Action) -> anyhow::Result<Command> {
        let mut command = Command::new("virsh");
        command.args(["--quiet", "--connect", &self.libvirtd.uri()]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        match action {
            Action::SetVcpus { count, .. } => {
                command.args(["setvcpus", &self.name, &count.to_string(), "--live"]);
            }
            Action::OnlineVcpus { ids } => {
                let list = ids.to_string();
                command.args(["guestvcpus", &self.name, "--enable", "--cpulist", &list]);
            }
            Action::ResizeVirtioMem { alias, requested } => {
                let size = format!("{}KiB", requested.get());
                command.args(["update-memory-device", &self.name, "--alias", alias]);
                command.args(["--requested-size", &size, "--live"]);
            }
            Action::AttachDimm { alias, size, node } => {
                let node = node.map_or_else(String::new, |node| format!("<node>{node}</node>"));
                let xml = format!(
                    "<memory model='dimm'><target><size unit='KiB'>{}</size>{node}</target>\
                     <alias name='{alias}'/></memory>",
                    size.get()
                );
                let file = self.libvirtd.directory().join(format!("{alias}.xml"));
                fs::write(&file, xml)?;
                command
                    .args(["attach-device", &self.name])
                    .arg(file)
                    .arg("--live");
            }
        }
        Ok(command)
    }
}

impl Drop for ByVirsh<'_> {
    fn drop(&mut self) {
        self.watcher.kill().ok();
        self.watcher.wait().ok();
    }
}

/// virsh does not print libvirt's error number, but its words for it.
fn returned(command: &mut Command) -> Return {
    match command.output() {
        Ok(output) if output.status.success() => Return::Done,
        Ok(output) => {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let number = match message.contains("Timed out during operation") {
                true => 68,
                false => 1,
            };
            Return::Failed { number, message }
        }
        Err(_) => Return::Lost,
    }
}

/// `event NAME at 1795265044.713113 for domain 'vm': {…}`.
fn event_of(line: &str) -> Option<Event> {
    let (_, rest) = line.split_once("event ")?;
    let (name, rest) = rest.split_once(" at ")?;
    let (_, details) = rest.rsplit_once("': ")?;
    let details = Some(details).filter(|details| details.starts_with('{'));
    Event::from_monitor(name, details).expect("an event of QEMU can be read")
}
