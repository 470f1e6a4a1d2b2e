//! Many seeds on all cores, and what to say when one fails.

use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::random::Random;
use super::world::Statistics;
use super::{Violation, pools, run};
use crate::engine::mutant::{self, Mutant};

/// Which seeds to run, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Seeds are drawn from this one, so that a batch can be repeated too.
    pub first: u64,
    /// How many seeds, at most.
    pub seeds: u64,
    /// For how long, at most.
    pub time: Duration,
    /// How many failing seeds are enough.
    pub failures: usize,
    /// The rule that is broken.
    pub mutant: Option<Mutant>,
}

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What it showed.
    pub violation: Violation,
    /// After how many steps: the shortest is the easiest to read.
    pub steps: u64,
    /// The number of seeds that had been started by then.
    pub after: u64,
}

/// What came of a batch.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// Those that failed, in the order in which they were found.
    pub failures: Vec<Failure>,
    /// Sums over all runs.
    pub statistics: Statistics,
}

/// A seed that no run had before.
pub fn fresh_seed() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Random::new(since.as_secs() ^ u64::from(since.subsec_nanos()) << 32).bits() >> 16
}

/// Runs a batch on all cores.
pub fn run_batch(batch: Batch) -> Summary {
    let (next, deadline) = (AtomicU64::new(0), Instant::now() + batch.time);
    let summary = Mutex::new(Summary::default());
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| run_some(batch, &next, deadline, &summary));
        }
    });
    summary.into_inner().unwrap_or_default()
}

fn run_some(batch: Batch, next: &AtomicU64, deadline: Instant, summary: &Mutex<Summary>) {
    mutant::breaks(batch.mutant);
    let pools = pools();
    let mut own = Summary::default();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= batch.seeds || Instant::now() >= deadline {
            break;
        }
        let seed = batch.first.wrapping_add(number);
        let outcome = run(seed, &pools, false);
        own.seeds += 1;
        own.statistics.add(outcome.statistics);
        if let Err(violation) = outcome.result {
            own.failures.push(Failure {
                seed,
                violation,
                steps: outcome.statistics.steps,
                after: number + 1,
            });
            if own.failures.len() >= batch.failures {
                next.store(batch.seeds, Ordering::Relaxed);
            }
        }
    }
    mutant::breaks(None);
    if let Ok(mut summary) = summary.lock() {
        summary.seeds += own.seeds;
        summary.statistics.add(own.statistics);
        summary.failures.append(&mut own.failures);
        summary.failures.sort_by_key(|failure| failure.after);
    }
}

/// Replays a seed, with this rule broken, and prints what happens.
///
/// # Errors
/// The violation that it shows.
pub fn replay(seed: u64, broken: Option<Mutant>) -> Result<(), Violation> {
    mutant::breaks(broken);
    let outcome = run(seed, &pools(), true);
    mutant::breaks(None);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("seed {seed}: {:?}", outcome.statistics);
    outcome.result
}
