//! Tests of the set with backends in memory.

use super::*;

/// A hypervisor with one domain, or one that cannot be reached.
struct OneDomain {
    domain: Option<DomainRef>,
    events: broadcast::Sender<Notice>,
    health: watch::Sender<ConnectionState>,
    /// True if it answers nothing.
    is_silent: bool,
}

impl OneDomain {
    fn of(domain: Option<(&str, &str)>) -> Arc<Self> {
        Arc::new(Self::new(domain))
    }

    fn new(domain: Option<(&str, &str)>) -> Self {
        let state = match domain {
            Some(_) => ConnectionState::Up(1),
            None => ConnectionState::Down,
        };
        Self {
            domain: domain.map(|(name, uuid)| DomainRef::on_host(name, uuid)),
            events: broadcast::Sender::new(8),
            health: watch::Sender::new(state),
            is_silent: false,
        }
    }

    async fn domain(&self) -> Result<DomainRef, CallError> {
        if self.is_silent {
            std::future::pending::<()>().await;
        }
        let dead = || CallError::Unavailable("dead".to_owned());
        self.domain.clone().ok_or_else(dead)
    }
}

impl DomainBackend for OneDomain {
    async fn find(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        let domain = self.domain().await?;
        if domain.name == name_or_uuid || domain.uuid == name_or_uuid {
            Ok(domain)
        } else {
            Err(CallError::NotFound(name_or_uuid.to_owned()))
        }
    }

    async fn observe(&self, domain: &DomainRef, _: ObservationQuery) -> Seen {
        Seen::failed(CallError::NotFound(domain.name.clone()))
    }

    async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
        Ok(vec![DomainStats {
            id: self.domain().await?,
            state: crate::domain::DomainState::Running,
            stats: crate::domain::Stats::default(),
        }])
    }

    async fn apply(&self, domain: &DomainRef, _: &Action) -> Result<(), CallError> {
        if self.domain().await?.uuid == domain.uuid {
            Ok(())
        } else {
            Err(CallError::NotFound(domain.name.clone()))
        }
    }

    fn events(&self) -> Notices {
        Notices::new(self.events.subscribe())
    }

    fn health(&self) -> watch::Receiver<ConnectionState> {
        self.health.subscribe()
    }
}

fn launcher(pod: &str) -> ConnectionId {
    ConnectionId::launcher(pod)
}

fn set(domains: [Option<(&str, &str)>; 2]) -> ConnectionSet<OneDomain> {
    let [first, second] = domains.map(OneDomain::of);
    ConnectionSet::new(vec![(launcher("a"), first), (launcher("b"), second)])
}

#[tokio::test]
async fn name_and_uuid_on_two_connections_are_rejected_with_both() {
    let (first, second) = (Some(("web", "u")), Some(("web", "u")));
    let [first, second] = [first, second].map(OneDomain::of);
    let set = ConnectionSet::new(vec![(ConnectionId::Host, first), (launcher("b"), second)]);
    for ambiguous in ["web", "u"] {
        let error = set.find(ambiguous).await.unwrap_err().to_string();
        assert!(error.contains("host"), "{error}");
        assert!(error.contains("launcher:b"), "{error}");
    }
    let all = set.statistics().await.unwrap();
    assert_ne!(all[0].id, all[1].id);
}

#[tokio::test]
async fn uuid_of_two_launchers_is_rejected_and_names_find_each() {
    let set = set([Some(("tenant-a_web", "u")), Some(("tenant-b_web", "u"))]);
    let error = set.find("u").await.unwrap_err().to_string();
    assert!(error.contains("tenant-a/web"), "{error}");
    assert!(error.contains("tenant-b/web"), "{error}");
    for (text, pod) in [
        ("tenant-a/web", "a"),
        ("tenant-a_web", "a"),
        ("tenant-b/web", "b"),
    ] {
        assert_eq!(set.find(text).await.unwrap().connection, launcher(pod));
    }
    let error = set.find("tenant-c/web").await.unwrap_err();
    assert!(matches!(error, CallError::NotFound(_)), "{error:?}");
}

#[tokio::test]
async fn newer_launcher_has_the_name_and_the_other_is_a_conflict() {
    let set = set([None, None]);
    let [old, new] = [("ns_web", "u"), ("ns_web", "v")].map(|d| OneDomain::of(Some(d)));
    set.add(launcher("new"), new, 2);
    set.add(launcher("old"), old, 1);
    assert_eq!(set.find("ns/web").await.unwrap().uuid, "v");
    let all = set.statistics().await.unwrap();
    // The order of the answers decides whether the first reading shows it.
    assert!((1..=2).contains(&all.len()));
    let all = set.statistics().await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].id.connection, launcher("new"));
    assert_eq!(set.conflicts(), HashSet::from([launcher("old")]));
    assert_eq!(set.find("u").await.unwrap().connection, launcher("old"));

    set.remove(&launcher("new"));
    assert!(set.conflicts().is_empty());
    assert_eq!(set.find("ns/web").await.unwrap().uuid, "u");
}

#[tokio::test(start_paused = true)]
async fn launcher_that_never_answers_delays_questions_to_all_by_its_bound() {
    let set = set([Some(("ns_web", "u")), Some(("ns_db", "v"))]);
    let silent = Arc::new(OneDomain {
        is_silent: true,
        ..OneDomain::new(None)
    });
    set.add(launcher("c"), silent, 0);
    let began = tokio::time::Instant::now();
    assert_eq!(set.statistics().await.unwrap().len(), 2);
    assert_eq!(began.elapsed(), LAUNCHER_WAIT);
    // Its domains are unknown: it is asked for a UUID, which may be that of several, and not for a
    // name that a launcher is known to have.
    let began = tokio::time::Instant::now();
    assert_eq!(set.find("ns/web").await.unwrap().uuid, "u");
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(set.find("u").await.unwrap().name, "ns_web");
    assert_eq!(began.elapsed(), LAUNCHER_WAIT);
    let began = tokio::time::Instant::now();
    assert!(set.statistics_of(&launcher("a")).await.is_ok());
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn members_come_and_go_with_their_events_and_health() {
    let set = ConnectionSet::new(Vec::new());
    assert!(set.statistics().await.unwrap().is_empty());
    let mut health = set.health();
    assert_eq!(*health.borrow(), ConnectionState::Down);
    let mut notices = set.events();
    let backend = OneDomain::of(Some(("ns_web", "u")));
    set.add(launcher("a"), Arc::clone(&backend), 0);
    let is_up = |state: &ConnectionState| *state != ConnectionState::Down;
    health.wait_for(is_up).await.unwrap();
    let gap = notices.next().await.unwrap();
    assert!(gap.is_gap_of(&launcher("a")) && !gap.is_gap_of(&launcher("b")));
    let domain = set.find("ns/web").await.unwrap();
    assert_eq!(set.up().len(), 1);

    set.remove(&launcher("a"));
    health.wait_for(|state| !is_up(state)).await.unwrap();
    assert!(notices.next().await.unwrap().is_gap_of(&launcher("a")));
    let error = set.find_again(&domain).await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
    assert_eq!(
        *set.health_of(&launcher("a")).borrow(),
        ConnectionState::Down
    );
    // Nothing of it is forwarded afterward.
    backend.events.send(Notice::GAP).ok();
    set.add(launcher("b"), OneDomain::of(None), 0);
    assert!(notices.next().await.unwrap().is_gap_of(&launcher("b")));
}

#[tokio::test]
async fn launchers_domain_is_changed_only_if_allowed() {
    let host = (ConnectionId::Host, OneDomain::of(Some(("web", "h"))));
    let in_launcher = (launcher("a"), OneDomain::of(Some(("ns_web", "u"))));
    let set = ConnectionSet::new(vec![host, in_launcher]);
    let action = Action::SetVcpus {
        count: 1,
        persist: false,
    };
    let domain = set.find("ns/web").await.unwrap();
    let error = set.apply(&domain, &action).await.unwrap_err();
    assert!(matches!(error, CallError::Denied { .. }), "{error:?}");
    let of_host = set.find("web").await.unwrap();
    set.apply(&of_host, &action).await.unwrap();
    let set = set.with_launcher_changes(true);
    set.apply(&domain, &action).await.unwrap();
}

#[tokio::test]
async fn dead_connection_hides_nothing_of_the_other() {
    let set = set([None, Some(("web", "u"))]).with_launcher_changes(true);
    let domain = set.find("web").await.unwrap();
    assert_eq!(domain.connection, launcher("b"));
    assert_eq!(set.statistics().await.unwrap().len(), 1);
    let persist = false;
    let action = Action::SetVcpus { count: 1, persist };
    set.apply(&domain, &action).await.unwrap();
    let error = set.find("other").await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
    let dead = DomainRef {
        connection: launcher("a"),
        ..domain
    };
    assert!(set.apply(&dead, &action).await.is_err());
}

#[tokio::test]
async fn events_carry_their_connection() {
    let second = OneDomain::of(Some(("web", "u")));
    let set = ConnectionSet::new(vec![(launcher("b"), Arc::clone(&second))]);
    let mut notices = set.events();
    let change = Notice::Change {
        domain: DomainRef::on_host("web", "u"),
        at: std::time::Instant::now(),
        change: crate::hypervisor::Change::Started,
    };
    second.events.send(change).unwrap();
    let Some(Notice::Change { domain, .. }) = notices.next().await else {
        panic!("no change");
    };
    assert_eq!(domain.connection, launcher("b"));
}

#[tokio::test(start_paused = true)]
async fn flood_of_a_launchers_events_becomes_a_gap_of_that_launcher() {
    let flooding = OneDomain::of(Some(("ns_web", "u")));
    let set = ConnectionSet::new(vec![(launcher("a"), Arc::clone(&flooding))]);
    let mut notices = set.events();
    let counting = async {
        let (mut changes, mut gaps) = (0, 0);
        for _ in 0..10_000 {
            flooding
                .events
                .send(Notice::Change {
                    domain: DomainRef::on_host("ns_web", "u"),
                    at: std::time::Instant::now(),
                    change: crate::hypervisor::Change::Defined,
                })
                .ok();
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(FLOOD_WINDOW).await;
        while let Ok(Some(notice)) = timeout(FLOOD_WINDOW, notices.next()).await {
            if notice.is_gap_of(&launcher("a")) {
                assert!(!notice.is_gap_of(&ConnectionId::Host));
                gaps += 1;
            } else {
                changes += 1;
            }
        }
        (changes, gaps)
    };
    let (changes, gaps) = counting.await;
    assert!((250..300).contains(&changes), "{changes} changes");
    assert!((1..3).contains(&gaps), "{gaps} gaps");
}
