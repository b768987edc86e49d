//! What every call has in common, on whatever lane it is made.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::lane::Job;
use super::session::Session;
use crate::hypervisor::CallError;

/// How a call ended, and how long libvirt took.
pub(super) type Answer<T> = (Result<T, CallError>, Duration);

/// A job that does `work`, and where its answer will be. `held` is kept until the work is done,
/// also when nobody waits for it any more, and let go before the answer is there.
pub(super) fn job<T, W, H>(
    call: &'static str,
    work: W,
    held: H,
) -> (Job, oneshot::Receiver<Answer<T>>)
where
    T: Send + 'static,
    W: FnOnce(&mut Session) -> Result<T, CallError> + Send + 'static,
    H: Send + 'static,
{
    static IDS: AtomicU64 = AtomicU64::new(0);
    let id = IDS.fetch_add(1, Ordering::Relaxed);
    let (reply, answer) = oneshot::channel();
    let run = Box::new(move |session: Result<&mut Session, CallError>| {
        // The caller went away while this waited for its turn.
        if reply.is_closed() {
            return;
        }
        let started = Instant::now();
        let outcome = session.and_then(|session| unpanicked(call, || work(session)));
        drop(held);
        // Nobody to take it: the caller was told of a timeout.
        drop(reply.send((outcome, started.elapsed())));
    });
    (Job { id, run }, answer)
}

/// A panic of the crate `virt` is an error of this call, not the end of the lane.
fn unpanicked<T>(
    call: &'static str,
    work: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, CallError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(CallError::Failed {
            call: call.into(),
            code: virt::sys::VIR_ERR_INTERNAL_ERROR.to_string(),
            text: "the call panicked".to_owned(),
        })
    })
}

/// The answer of a lane that will give none.
pub(super) fn gone() -> CallError {
    CallError::Unavailable("the thread that makes the calls ended".to_owned())
}
