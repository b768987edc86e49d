//! Whether there is a connection: told to those who watch, to the metrics and to the log, once
//! for each change.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use super::LibvirtConfig;
use super::notices::Announcer;
use crate::hypervisor::{CallError, Connection};
use crate::telemetry::Metrics;

/// What a connection is for.
#[derive(Clone)]
pub(super) enum Role {
    /// It is *the* connection: of it speak the metrics and the log.
    Main,
    /// Events are told over it, to these; and calls that wait for no domain.
    Events(Announcer),
    /// It is opened when there is a call to make. Nobody watches it.
    OnDemand,
}

/// The state of the connection, shared by all lanes that have the same role.
#[derive(Clone)]
pub(super) struct Link(Arc<Shared>);

struct Shared {
    config: LibvirtConfig,
    metrics: Arc<Metrics>,
    role: Role,
    connection: watch::Sender<Connection>,
    numbers: AtomicU64,
    status: Mutex<Status>,
}

struct Status {
    up: Option<u64>,
    was_up: bool,
    /// Since when it is as it is.
    since: Instant,
    /// Whether the log knows that there is no connection.
    told: bool,
}

impl Link {
    pub(super) fn new(config: LibvirtConfig, metrics: Arc<Metrics>, role: Role) -> Self {
        if matches!(role, Role::Main) {
            metrics.hypervisor_connected.set(0);
        }
        Self(Arc::new(Shared {
            config,
            metrics,
            role,
            connection: watch::Sender::new(Connection::Down),
            numbers: AtomicU64::new(0),
            status: Mutex::new(Status {
                up: None,
                was_up: false,
                since: Instant::now(),
                told: false,
            }),
        }))
    }

    pub(super) fn config(&self) -> &LibvirtConfig {
        &self.0.config
    }

    /// Whether a lane waits for a job before it opens a connection.
    pub(super) fn is_on_demand(&self) -> bool {
        matches!(self.0.role, Role::OnDemand)
    }

    /// Who is told of events over this connection.
    pub(super) fn notices(&self) -> Option<&Announcer> {
        match &self.0.role {
            Role::Events(announcer) => Some(announcer),
            Role::Main | Role::OnDemand => None,
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Connection> {
        self.0.connection.subscribe()
    }

    /// A number for a connection about to be opened, larger than all before.
    pub(super) fn next_number(&self) -> u64 {
        self.0.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Writes down how a call ended and how long libvirt took.
    pub(super) fn call_ended<T>(
        &self,
        call: &'static str,
        took: Duration,
        outcome: &Result<T, CallError>,
    ) {
        self.0.metrics.call_ended(call, took, outcome);
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This connection is open.
    pub(super) fn up(&self, number: u64) {
        let mut status = self.status();
        match &self.0.role {
            Role::OnDemand => return,
            // Whatever happened since the last one was not told.
            Role::Events(announcer) => announcer.gap(),
            Role::Main if status.was_up => {
                self.0.metrics.hypervisor_reconnects.inc();
                info!(away = ?status.since.elapsed(), "connected to libvirt again");
            }
            Role::Main => info!(uri = self.0.config.uri, "connected to libvirt"),
        }
        *status = Status {
            up: Some(number),
            was_up: true,
            since: Instant::now(),
            told: false,
        };
        self.show_connected(1);
        self.0.connection.send_replace(Connection::Up(number));
    }

    /// This connection is over; nothing new if that is known, or if another one is open.
    pub(super) fn down(&self, number: u64, reason: &dyn fmt::Display) {
        let status = self.status();
        if status.up == Some(number) {
            self.lose(status, reason);
        }
    }

    /// The connection in use, if there is one, is given up.
    pub(super) fn give_up(&self, reason: &dyn fmt::Display) {
        let status = self.status();
        if status.up.is_some() {
            self.lose(status, reason);
        }
    }

    fn lose(&self, mut status: MutexGuard<'_, Status>, reason: &dyn fmt::Display) {
        status.up = None;
        status.since = Instant::now();
        status.told = true;
        match self.0.role {
            Role::Main => warn!(%reason, "connection to libvirt lost; trying until it is back"),
            _ => warn!(%reason, "libvirt tells no events; trying until it does"),
        }
        self.show_connected(0);
        self.0.connection.send_replace(Connection::Down);
    }

    fn show_connected(&self, connected: i64) {
        if matches!(self.0.role, Role::Main) {
            self.0.metrics.hypervisor_connected.set(connected);
        }
    }

    /// A try to connect failed.
    pub(super) fn still_down(&self, reason: &CallError) {
        let mut status = self.status();
        if matches!(self.0.role, Role::Main) && !status.told {
            status.told = true;
            warn!(
                uri = self.0.config.uri,
                "{reason}; trying until there is one"
            );
        }
    }
}
