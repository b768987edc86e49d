//! Changes that other clients make to a domain, judged by the rules of an operation. Pure.
//!
//! ```text
//!            baseline ── event, statistics ──▶ look ── other amount, lost device ──▶ watch
//!               ▲                               │                                     │
//!               └──────── nothing changed ◀─────┘       looks at 0.5, 1, 2, 5, 15, 30 s
//!                                                       and at the end of the grace   │
//!               ┌── correction ◀── later looks ◀── not Verified ◀── verdict ◀─────────┘
//! ```
//!
//! * [`DomainChanges`] is the state of one domain: the baseline, the events since, and the open
//!   watches, at most one for vCPUs, one for memory and [`MAX_DETACHES`] for devices.
//! * The request of a watch is what the hypervisor now has. A further change within the grace period
//!   sets another target and starts the grace period again; there is one verdict, for the last target.
//! * The [`GraceClock`](clock::GraceClock) stands still while the guest cannot act: the domain is
//!   paused, a job or an operation of virtnode holds it, it boots, or it cannot be observed.
//! * A domain whose guest lacks something when it is seen for the first time is judged in the same
//!   way, and the change counts as [found](ExternalChange::found).
//! * A changed amount that belongs to an operation of virtnode ([`OwnChanges`]) is no external change,
//!   also if the guest follows after the verdict.
//!
//! # Ownership
//! The caller owns the clock, the calls and the records. It makes a look when [`DomainChanges::next_look`]
//! is due, passes on every event, and takes [`DomainChanges::news`].
//!
//! # Failures
//! A look that fails stops the grace period and is repeated. Only an observation that was started after
//! the grace period counts against a guest that did nothing.

mod change;
mod clock;
mod detach;
mod domain;
mod own;
mod standstill;
mod target;
mod watch;

pub use change::{ChangeNumber, ChangedResource, ExternalAction, ExternalChange};
pub use domain::{DomainChanges, ExternalOptions, LookResult, MAX_DETACHES};
pub use own::{OwnChange, OwnChanges};
