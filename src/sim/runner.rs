//! Many seeds on all cores, and what is printed when one fails.

use std::fmt;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::random::Random;
use super::statistics::Statistics;
use super::{Violation, pools, run};

/// Which seeds to run, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// The first seed; the others follow it.
    pub first: u64,
    /// The number of seeds, at most.
    pub seeds: u64,
    /// The duration, at most.
    pub time: Duration,
    /// The batch ends with this many failing seeds.
    pub failures: usize,
}

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// The first rule that it broke.
    pub violation: Violation,
    /// The number of steps until then: the shortest run is the easiest to read.
    pub steps: u64,
    /// The last events on the sectors concerned.
    pub last_events: Vec<String>,
    /// The number of seeds that had been started by then.
    pub after: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {} after {} steps: {}",
            self.seed, self.steps, self.violation
        )?;
        for event in &self.last_events {
            writeln!(f, "  {event}")?;
        }
        write!(f, "  replay: make sim SEED={}", self.seed)
    }
}

/// The result of a batch.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// Those that failed, in the order in which they were started.
    pub failures: Vec<Failure>,
    /// Sums over all runs.
    pub statistics: Statistics,
}

/// A seed from the clock.
pub fn fresh_seed() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Random::new(since.as_secs() ^ u64::from(since.subsec_nanos()) << 32).bits() >> 16
}

/// Runs a batch on all cores.
pub fn run_batch(batch: Batch) -> Summary {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let deadline = Instant::now() + batch.time;
    let summary = Mutex::new(Summary::default());
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| run_some(batch, &next, &stop, deadline, &summary));
        }
    });
    summary.into_inner().unwrap_or_default()
}

fn run_some(
    batch: Batch,
    next: &AtomicU64,
    stop: &AtomicBool,
    deadline: Instant,
    summary: &Mutex<Summary>,
) {
    let pools = pools();
    let mut own = Summary::default();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let stopped = stop.load(Ordering::Relaxed) || Instant::now() >= deadline;
        if number >= batch.seeds || stopped {
            break;
        }
        let seed = batch.first.wrapping_add(number);
        let outcome = run(seed, &pools, false);
        own.seeds += 1;
        own.statistics.add(outcome.statistics);
        if let Err(violation) = outcome.result {
            let again = run(seed, &pools, true);
            assert_eq!(
                again.result.as_ref(),
                Err(&violation),
                "seed {seed} does not replay"
            );
            own.failures.push(Failure {
                seed,
                violation,
                steps: outcome.statistics.steps,
                last_events: again.last_events,
                after: number + 1,
            });
            if own.failures.len() >= batch.failures {
                stop.store(true, Ordering::Relaxed);
            }
        }
    }
    if let Ok(mut summary) = summary.lock() {
        summary.seeds += own.seeds;
        summary.statistics.add(own.statistics);
        summary.failures.append(&mut own.failures);
        summary.failures.sort_by_key(|failure| failure.after);
    }
}

/// Replays a seed and prints what happens.
///
/// # Errors
/// The rule that it breaks.
pub fn replay(seed: u64) -> Result<(), Failure> {
    let outcome = run(seed, &pools(), true);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("seed {seed}: {:?}", outcome.statistics);
    outcome.result.map_err(|violation| Failure {
        seed,
        violation,
        steps: outcome.statistics.steps,
        last_events: outcome.last_events,
        after: 1,
    })
}
