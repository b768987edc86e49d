//! Tests of the launchers' states.

use super::*;

const POD: &str = "pod";

fn socket(inode: u64) -> SocketFile {
    SocketFile {
        device: 1,
        inode,
        changed: (i64::try_from(inode).unwrap(), 0),
    }
}

/// A table with the present time of tokio's clock.
struct Fixture(Table);

impl Fixture {
    fn new() -> Self {
        Self(Table::new(2))
    }

    fn scan(&mut self, found: &[(&str, SocketSighting)]) -> Vec<String> {
        let found = found.iter().map(|(pod, seen)| ((*pod).to_owned(), *seen));
        self.0.scanned(&found.collect(), Instant::now())
    }

    fn see(&mut self, sighting: SocketSighting) -> Vec<String> {
        self.scan(&[(POD, sighting)])
    }

    fn opens(&mut self) -> Option<String> {
        self.0.open_next(Instant::now())
    }

    fn ended(&mut self, result: Result<SocketFile, OpenFailure>) -> NextStep {
        self.0.opened(POD, result, Instant::now())
    }

    fn state(&self) -> Option<LauncherState> {
        self.0.state(POD)
    }

    /// Returns a table with one launcher that is up.
    fn up() -> Self {
        let mut table = Self::new();
        table.see(SocketSighting::Socket(socket(1)));
        assert_eq!(table.opens().as_deref(), Some(POD));
        assert_eq!(table.ended(Ok(socket(1))), NextStep::Use);
        assert_eq!(table.state(), Some(LauncherState::Up));
        table
    }
}

#[tokio::test(start_paused = true)]
async fn one_attempt_at_a_time_with_growing_pauses() {
    let mut table = Fixture::new();
    let seen = SocketSighting::Socket(socket(1));
    let mut at = Vec::new();
    let began = Instant::now();
    for second in 0..200 {
        table.see(seen);
        if table.opens().is_some() {
            at.push(second);
            assert_eq!(table.state(), Some(LauncherState::Opening));
            assert_eq!(table.opens(), None);
            let next = table.ended(Err(OpenFailure::Gone));
            let is_first = at.len() == 1;
            assert_eq!(next == NextStep::Report, is_first);
            assert_eq!(table.state(), Some(LauncherState::Lost));
        }
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(at, [0, 1, 2, 4, 8, 16, 32, 62, 92, 122, 152, 182]);
    // A new socket is tried at once, and the pauses begin at the minimum.
    let other = SocketSighting::Socket(socket(2));
    table.see(other);
    assert!(table.opens().is_some());
    table.ended(Err(OpenFailure::Refused));
    assert_eq!(table.state(), Some(LauncherState::Refused));
    assert_eq!(table.0.next_due(), Some(Instant::now() + MIN_PAUSE));
    assert!(began.elapsed() > Duration::from_secs(100));
}

#[tokio::test(start_paused = true)]
async fn late_attempt_keeps_its_place_and_is_used_if_it_succeeds() {
    let mut table = Fixture::new();
    table.see(SocketSighting::Socket(socket(1)));
    table.opens();
    table.0.late(POD);
    assert_eq!(table.state(), Some(LauncherState::Unresponsive));
    // Even with another socket there is no second attempt meanwhile.
    table.see(SocketSighting::Socket(socket(2)));
    tokio::time::advance(Duration::from_secs(600)).await;
    assert_eq!(table.opens(), None);
    assert_eq!(table.0.next_due(), None);
    table.see(SocketSighting::Socket(socket(1)));
    assert_eq!(table.ended(Ok(socket(1))), NextStep::Use);
    assert_eq!(table.state(), Some(LauncherState::Up));
}

#[tokio::test(start_paused = true)]
async fn connection_to_an_earlier_socket_is_closed_before_the_next_is_opened() {
    let mut table = Fixture::up();
    assert_eq!(table.see(SocketSighting::Socket(socket(2))), [POD]);
    assert_eq!(table.opens(), None);
    table.0.closed(POD, Instant::now());
    assert!(table.opens().is_some());
    // The socket is exchanged during the attempt.
    table.see(SocketSighting::Socket(socket(3)));
    assert_eq!(table.ended(Ok(socket(2))), NextStep::Close);
    table.0.closed(POD, Instant::now());
    assert!(table.opens().is_some());
    assert_eq!(table.ended(Ok(socket(3))), NextStep::Use);
}

#[tokio::test(start_paused = true)]
async fn lost_connection_is_closed_and_opened_after_a_pause() {
    let mut table = Fixture::up();
    assert!(table.0.lost(POD, Instant::now()));
    assert!(!table.0.lost(POD, Instant::now()));
    table.0.closed(POD, Instant::now());
    assert_eq!(table.opens(), None);
    tokio::time::advance(MIN_PAUSE).await;
    assert!(table.opens().is_some());
    table.ended(Ok(socket(1)));
    // A daemon that is terminated removes its socket: the launcher stays known.
    assert!(table.see(SocketSighting::Missing).is_empty());
    table.0.lost(POD, Instant::now());
    table.0.closed(POD, Instant::now());
    tokio::time::advance(MAX_PAUSE).await;
    assert_eq!(table.opens(), None);
    assert_eq!(table.state(), Some(LauncherState::Lost));
    table.see(SocketSighting::Socket(socket(2)));
    assert!(table.opens().is_some());
}

#[tokio::test(start_paused = true)]
async fn pod_that_is_gone_is_removed_once_its_connection_is_closed() {
    let mut table = Fixture::up();
    assert_eq!(table.scan(&[]), [POD]);
    assert_eq!(table.state(), Some(LauncherState::Gone));
    table.0.closed(POD, Instant::now());
    assert_eq!(table.state(), None);

    // During an attempt that hangs and fails.
    table.see(SocketSighting::Socket(socket(1)));
    table.opens();
    assert!(table.scan(&[]).is_empty());
    assert_eq!(table.state(), Some(LauncherState::Gone));
    assert_eq!(table.ended(Err(OpenFailure::Silent)), NextStep::Nothing);
    assert_eq!(table.state(), None);

    // During an attempt that succeeds.
    table.see(SocketSighting::Socket(socket(1)));
    table.opens();
    table.scan(&[]);
    assert_eq!(table.ended(Ok(socket(1))), NextStep::Close);
    table.0.closed(POD, Instant::now());
    assert_eq!(table.state(), None);
}

#[tokio::test(start_paused = true)]
async fn link_in_the_place_of_a_socket_is_odd_and_never_opened() {
    let mut table = Fixture::new();
    table.see(SocketSighting::Odd);
    tokio::time::advance(MAX_PAUSE).await;
    assert_eq!(table.opens(), None);
    assert_eq!(table.state(), Some(LauncherState::Odd));
    let mut table = Fixture::up();
    assert_eq!(table.see(SocketSighting::Odd), [POD]);
    table.0.closed(POD, Instant::now());
    assert_eq!(table.opens(), None);
    table.see(SocketSighting::Socket(socket(1)));
    assert!(table.opens().is_some());
    // Exchanged between the scan and the attempt.
    table.ended(Err(OpenFailure::Odd));
    assert_eq!(table.state(), Some(LauncherState::Odd));
}

#[tokio::test(start_paused = true)]
async fn known_launchers_are_taken_before_others_up_to_the_maximum() {
    let mut table = Fixture::new();
    let seen = SocketSighting::Socket(socket(1));
    table.scan(&[("c", seen), ("d", seen)]);
    table.scan(&[("a", seen), ("b", seen), ("c", seen), ("d", seen)]);
    let pods: Vec<&str> = table.0.states().map(|(pod, _)| pod).collect();
    assert_eq!(pods, ["c", "d"]);
    assert_eq!(table.0.surplus(), ["a", "b"]);
    table.scan(&[("a", seen), ("b", seen), ("d", seen)]);
    let pods: Vec<&str> = table.0.states().map(|(pod, _)| pod).collect();
    assert_eq!(pods, ["a", "d"]);
    assert_eq!(table.0.surplus(), ["b"]);
}

#[tokio::test(start_paused = true)]
async fn launcher_that_cannot_be_examined_stays_as_it_is() {
    let mut table = Fixture::up();
    assert!(table.see(SocketSighting::Unknown).is_empty());
    assert_eq!(table.state(), Some(LauncherState::Up));
    table.scan(&[
        (POD, SocketSighting::Unknown),
        ("other", SocketSighting::Unknown),
    ]);
    assert_eq!(table.0.state("other"), None);
}
