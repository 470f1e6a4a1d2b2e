//! Says in the log, now and then, that requests of a guest are rejected.

use std::time::Duration;

use log::warn;

use crate::device::request::Status;

/// The least time between two lines: a guest can send any number of such requests.
const INTERVAL: Duration = Duration::from_secs(10);

/// The rejected requests that no line has reported yet.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    count: u64,
    next_line: Duration,
}

impl Rejections {
    /// A request was rejected with this status.
    pub(super) fn note(&mut self, status: Status, now: Duration) {
        if let Some(count) = self.due(now) {
            let reason = match status {
                Status::Unsupported => "unsupported",
                _ => "invalid: malformed, misaligned or beyond the end of the disk",
            };
            warn!(count, reason; "requests of the guest were rejected");
        }
    }

    /// How many requests a line now reports, if it is time for one.
    fn due(&mut self, now: Duration) -> Option<u64> {
        self.count += 1;
        if now < self.next_line {
            return None;
        }
        self.next_line = now + INTERVAL;
        Some(std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_reported_at_once_and_the_others_together() {
        let mut rejections = Rejections::default();
        let second = Duration::from_secs;
        assert_eq!(rejections.due(second(100)), Some(1));
        assert_eq!(rejections.due(second(101)), None);
        assert_eq!(rejections.due(second(109)), None);
        assert_eq!(rejections.due(second(110)), Some(3));
        assert_eq!(rejections.due(second(110)), None);
    }
}
