//! The loop of every client: keeps the requests of a load in flight on one queue and times each.

use std::ops::Range;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::interrupt::{self, Interrupted};
use super::requests::{Kind, Request, Requests};

/// The longest latency that the histogram distinguishes.
const LATENCY_MAX: Duration = Duration::from_secs(60);

/// A server of requests. Each request uses a slot, and each slot has memory.
pub trait Queue {
    /// Queues a request; [`Self::run`] submits it.
    fn push(&mut self, slot: usize, request: Request);

    /// Submits the queued requests, waits for at least one completion, and adds the slots of all
    /// completed requests to `completed`.
    fn run(&mut self, completed: &mut Vec<usize>) -> Result<(), Interrupted>;
}

/// Latencies, in nanoseconds.
pub type Latencies = Histogram<u64>;

/// An empty histogram.
pub fn latencies() -> Latencies {
    let max = nanoseconds(LATENCY_MAX);
    Histogram::new_with_bounds(1, max, 3).expect("bounds in order")
}

/// Drives `queue` from now to the end of `window`. Returns the latency of each request that was
/// completed within the window, from its submission to the moment its completion was seen.
pub fn drive(
    queue: &mut impl Queue,
    requests: &mut Requests,
    depth: usize,
    window: &Range<Instant>,
) -> Result<Latencies, Interrupted> {
    let mut latencies = latencies();
    let mut free: Vec<usize> = (0..depth).collect();
    let mut completed = Vec::with_capacity(depth);
    let mut submitted = vec![Instant::now(); depth];
    let mut in_flight = 0;
    loop {
        let now = Instant::now();
        if now < window.end && interrupt::check().is_ok() {
            in_flight += free.len();
            for slot in free.drain(..) {
                let request = requests.next(slot);
                // A flush belongs to the write before it: the two count as one request.
                if request.kind != Kind::Flush {
                    submitted[slot] = now;
                }
                queue.push(slot, request);
            }
        }
        if in_flight == 0 {
            interrupt::check()?;
            return Ok(latencies);
        }
        queue.run(&mut completed)?;
        let now = Instant::now();
        in_flight -= completed.len();
        for slot in completed.drain(..) {
            if window.contains(&now) && requests.is_whole(slot) {
                latencies.saturating_record(nanoseconds(now - submitted[slot]));
            }
            free.push(slot);
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
