//! The connections whose domains are read: which is due, and what was read last. Without IO or clock.
//!
//! ```text
//! idle ── due ──▶ reading ──▶ idle, due after PERIOD
//!   ▲ notified: due after GATHER, at most once in MIN_PERIOD
//! ```
//!
//! The next reading of a new launcher is at a random time of the period, so that hundreds of them are
//! spread over it, and few are read at a time.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};

use crate::domain::ConnectionId;
use crate::hypervisor::{CallError, DomainStats};

/// Interval between readings of the bulk statistics without notifications: a usual scrape interval.
const PERIOD: Duration = Duration::from_secs(15);
/// Time from the first notification until the observation: a plug of several vCPUs sends many.
const GATHER: Duration = Duration::from_millis(100);
/// Minimum time between two readings, whatever notifies: guests cause notifications as they like.
const MIN_PERIOD: Duration = Duration::from_secs(1);
/// Maximum number of launchers that are read at a time.
const LAUNCHERS_AT_A_TIME: usize = 4;

#[derive(Default)]
pub(super) struct Sources(BTreeMap<ConnectionId, ConnectionReadings>);

struct ConnectionReadings {
    running: Vec<DomainStats>,
    /// Start of the last reading that succeeded.
    read: Instant,
    /// The next reading.
    next: Instant,
    /// No reading is started before.
    earliest: Instant,
    is_reading: bool,
    /// True after a reading that succeeded.
    is_known: bool,
    /// Code and text of the last reading's error.
    failure: Option<(&'static str, String)>,
}

impl Sources {
    /// Takes over the present connections. Returns those that are gone.
    pub(super) fn update(&mut self, present: &[ConnectionId], now: Instant) -> Vec<ConnectionId> {
        let all: HashSet<&ConnectionId> = present.iter().collect();
        let gone = self.0.keys().filter(|known| !all.contains(known));
        let gone: Vec<ConnectionId> = gone.cloned().collect();
        for connection in &gone {
            self.0.remove(connection);
        }
        for connection in present {
            self.0
                .entry(connection.clone())
                .or_insert_with(|| ConnectionReadings {
                    running: Vec::new(),
                    read: now,
                    next: now,
                    earliest: now,
                    is_reading: false,
                    is_known: false,
                    failure: None,
                });
        }
        gone
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// Returns the last statistics of all domains, each with the start of the reading.
    pub(super) fn running(&self) -> impl Iterator<Item = (Instant, &DomainStats)> {
        self.0.values().flat_map(|source| {
            let running = source.running.iter();
            running.map(|stats| (source.read, stats))
        })
    }

    /// Makes the connections for which `select` is true due soon.
    pub(super) fn notify(&mut self, select: impl Fn(&ConnectionId) -> bool, now: Instant) {
        for (_, source) in self
            .0
            .iter_mut()
            .filter(|(connection, _)| select(connection))
        {
            let soon = source.earliest.max(now + GATHER);
            source.next = source.next.min(soon);
        }
    }

    /// Returns the idle connection that is due first.
    fn first(&self) -> Option<(&ConnectionId, Instant)> {
        let reading = self.0.iter().filter(|(_, source)| source.is_reading);
        let launchers = reading.filter(|(connection, _)| connection.is_launcher());
        let has_room = launchers.count() < LAUNCHERS_AT_A_TIME;
        let idle = self.0.iter().filter(|(_, source)| !source.is_reading);
        let idle = idle.filter(|(connection, _)| has_room || !connection.is_launcher());
        let idle = idle.map(|(connection, source)| (connection, source.next));
        idle.min_by_key(|(_, next)| *next)
    }

    /// Starts the reading that is due first, if one is.
    pub(super) fn start_next(&mut self, now: Instant) -> Option<ConnectionId> {
        let (connection, next) = self.first()?;
        if next > now {
            return None;
        }
        let connection = connection.clone();
        let source = self.0.get_mut(&connection)?;
        source.is_reading = true;
        source.earliest = now + MIN_PERIOD;
        source.next = now + PERIOD;
        if connection.is_launcher() && !source.is_known {
            source.next = now + MIN_PERIOD + (PERIOD - MIN_PERIOD).mul_f64(fastrand::f64());
        }
        Some(connection)
    }

    /// Returns the time of the next reading.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.first().map(|(_, next)| next.max(now))
    }

    pub(super) fn set_running(
        &mut self,
        connection: &ConnectionId,
        began: Instant,
        running: Vec<DomainStats>,
    ) {
        if let Some(source) = self.0.get_mut(connection) {
            source.read = began;
            source.running = running;
            source.is_known = true;
            source.failure = None;
        }
    }

    /// Records a failure, and logs the first of several with the same code. Returns its text if no
    /// connection was read since it failed.
    pub(super) fn fail(&mut self, connection: &ConnectionId, error: &CallError) -> Option<String> {
        let source = self.0.get_mut(connection)?;
        let failure = (error.code(), error.to_string());
        let before = source.failure.replace(failure);
        let is_new = before.is_none_or(|(code, _)| code != error.code());
        // The state of a launcher is logged by whoever connects to it.
        if is_new && !connection.is_launcher() {
            warn!(%error, "cannot read the running domains; retrying");
        } else {
            debug!(%connection, %error, "cannot read the running domains");
        }
        let all_fail = self.0.values().all(|source| source.failure.is_some());
        all_fail.then(|| error.to_string())
    }

    /// Records the end of a reading.
    pub(super) fn end(&mut self, connection: &ConnectionId, now: Instant) {
        if let Some(source) = self.0.get_mut(connection) {
            source.is_reading = false;
            source.earliest = source.earliest.max(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launchers(count: usize) -> Vec<ConnectionId> {
        let pods = (0..count).map(|pod| ConnectionId::launcher(format!("{pod:03}")));
        pods.collect()
    }

    /// Reads whatever is due; returns the connections.
    fn read(sources: &mut Sources) -> Vec<ConnectionId> {
        let now = Instant::now();
        let mut read = Vec::new();
        while let Some(connection) = sources.start_next(now) {
            sources.set_running(&connection, now, Vec::new());
            sources.end(&connection, now);
            read.push(connection);
        }
        read
    }

    #[tokio::test(start_paused = true)]
    async fn readings_of_launchers_are_spread_over_the_period() {
        let mut sources = Sources::default();
        sources.update(&launchers(250), Instant::now());
        assert_eq!(read(&mut sources).len(), 250);
        let mut at_once = Vec::new();
        for _ in 0..3 * PERIOD.as_secs() {
            tokio::time::advance(Duration::from_secs(1)).await;
            at_once.push(read(&mut sources).len());
        }
        assert_eq!(at_once[..15].iter().sum::<usize>(), 250, "{at_once:?}");
        assert!(at_once.iter().all(|count| *count < 60), "{at_once:?}");
        assert_eq!(at_once[15..30], at_once[30..45]);
    }

    #[tokio::test(start_paused = true)]
    async fn few_launchers_are_read_at_a_time_and_the_host_beside_them() {
        let mut sources = Sources::default();
        let mut all = launchers(9);
        all.push(ConnectionId::Host);
        sources.update(&all, Instant::now());
        let mut started = Vec::new();
        while let Some(connection) = sources.start_next(Instant::now()) {
            started.push(connection);
        }
        assert_eq!(started.len(), LAUNCHERS_AT_A_TIME + 1);
        assert!(started.contains(&ConnectionId::Host));
        // Those that hang keep their places, and the next one waits only for one that ends.
        assert_eq!(sources.next_due(Instant::now()), None);
        let launcher = started.iter().find(|connection| connection.is_launcher());
        sources.end(launcher.unwrap(), Instant::now());
        assert!(sources.start_next(Instant::now()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn notifications_are_gathered_and_read_once_a_second() {
        let mut sources = Sources::default();
        let host = [ConnectionId::Host];
        sources.update(&host, Instant::now());
        assert_eq!(read(&mut sources), host);
        let mut readings = 0;
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(50)).await;
            sources.notify(ConnectionId::is_host, Instant::now());
            readings += read(&mut sources).len();
        }
        assert_eq!(readings, 5);
        // Without one it is read once in the period.
        tokio::time::advance(PERIOD / 2).await;
        assert!(read(&mut sources).is_empty());
        tokio::time::advance(PERIOD / 2).await;
        assert_eq!(read(&mut sources), host);
    }

    #[tokio::test(start_paused = true)]
    async fn failure_of_one_connection_is_none_of_all() {
        let mut sources = Sources::default();
        let host = ConnectionId::Host;
        let launcher = ConnectionId::launcher("a");
        sources.update(&[host.clone(), launcher.clone()], Instant::now());
        let error = CallError::Unavailable("gone".to_owned());
        assert_eq!(sources.fail(&launcher, &error), None);
        assert!(sources.fail(&host, &error).is_some());
        sources.set_running(&launcher, Instant::now(), Vec::new());
        assert_eq!(sources.fail(&host, &error), None);
        assert_eq!(
            sources.update(std::slice::from_ref(&host), Instant::now()),
            [launcher]
        );
        assert!(sources.fail(&host, &error).is_some());
    }
}
