//! Faults of the API server's answers that the client detects itself.

use std::error::Error;
use std::time::Duration;

use thiserror::Error;

/// Reason why an answer was not read to its end.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum AnswerFault {
    #[error("its answer is longer than {} KiB", .max / 1024)]
    TooLarge { max: usize },
    #[error("its answer did not end within {after:?}")]
    Late { after: Duration },
    #[error(
        "the watch ended after {} ms; a watch lasts for minutes unless the API server stops, or a proxy in front of it does not support watches",
        .after.as_millis()
    )]
    WatchEnded { after: Duration },
}

impl AnswerFault {
    /// Returns the fault in the chain of an error's causes.
    pub(super) fn find<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(fault) = error.downcast_ref() {
                return Some(fault);
            }
            cause = error.source();
        }
        None
    }
}
