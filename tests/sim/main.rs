//! The engine in the simulator: many random runs, each checked against the contract.
//!
//! `make sim SEEDS=n` runs n seeds, `make sim SEED=s` replays one and prints what happens.

mod blkverify;
mod failed_flush;
mod failed_requests;
mod failed_write;
mod fifo;
mod flapping;
mod hung_question;
mod late_reply;
mod missing;
mod mutant_patches;
mod partly_stale;
mod preferred;
mod progress;
mod range_sets;
mod record_writes;
mod shared_flush;
mod slow_replica;
mod small_disk;
mod unclean_end;
mod unfinished_repair;
mod unreadable_blocks;
mod unrecorded;

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use quorum_blk::sim::crash_states::{Case, explore_all};
use quorum_blk::sim::runner::{Batch, fresh_seed, replay, run_batch};
use quorum_blk::sim::statistics::Statistics;

/// After so many seeds each kind of start has happened.
const SEEDS_FOR_ALL: u64 = 20_000;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
    )
}

/// `QUORUM_BLK_SIM_SEED` replays one seed. Otherwise `QUORUM_BLK_SIM_SEEDS` seeds run, or as many
/// as `QUORUM_BLK_SIM_SECONDS` allow, from `QUORUM_BLK_SIM_FIRST` on or from a fresh one, until
/// `QUORUM_BLK_SIM_FAILURES` have failed.
#[test]
fn keeps_the_contract() {
    if let Some(seed) = variable("QUORUM_BLK_SIM_SEED") {
        if let Err(failure) = replay(seed) {
            panic!("{failure}");
        }
        return;
    }
    let seeds = variable("QUORUM_BLK_SIM_SEEDS");
    let seconds = variable("QUORUM_BLK_SIM_SECONDS").unwrap_or(if seeds.is_some() {
        u64::MAX >> 32
    } else {
        60
    });
    let first = variable("QUORUM_BLK_SIM_FIRST").unwrap_or_else(fresh_seed);
    println!("seeds from {first} on");
    let began = Instant::now();
    let summary = run_batch(Batch {
        first,
        seeds: seeds.unwrap_or(u64::MAX),
        time: Duration::from_secs(seconds),
        failures: usize::try_from(variable("QUORUM_BLK_SIM_FAILURES").unwrap_or(1)).unwrap(),
    });
    let per_second = summary.seeds as f64 / began.elapsed().as_secs_f64();
    println!(
        "{} seeds, {per_second:.0} a second; {:?}",
        summary.seeds, summary.statistics
    );
    for failure in &summary.failures {
        println!("{failure}");
    }
    assert!(summary.failures.is_empty(), "a rule was broken");
    if summary.seeds >= SEEDS_FOR_ALL {
        let Statistics {
            subsets,
            refused,
            found,
            put_back,
            forced,
            clean_ends,
            edited,
            adopted,
            lost,
            ..
        } = summary.statistics;
        let returns = [subsets, refused, found, put_back, forced];
        let all = [&returns[..], &[clean_ends, edited, adopted, lost]].concat();
        assert!(!all.contains(&0), "something has never happened: {all:?}");
    }
}

/// All histories of up to three requests on two sectors, with records: whichever of one to four
/// replicas are started after a crash, as many as may start, nothing is undecided, nothing stale
/// is believed, and nothing flushed is lost. With at most one operation that the first replica
/// fails. Of four replicas, histories of up to two requests; `all_crash_states_of_four_replicas`
/// has those of three.
#[test]
fn crash_states_of_small_histories() {
    let all = (1..=4).flat_map(|replicas| (1..=replicas).map(move |t| (replicas, t)));
    for (replicas, threshold) in all {
        explore(
            replicas,
            threshold,
            if replicas < 4 { 1..=3 } else { 1..=2 },
        );
    }
    explore(5, 3, 1..=2);
}

/// The rest of the histories of `crash_states_of_small_histories`.
#[test]
#[ignore = "takes minutes"]
fn all_crash_states_of_four_replicas() {
    (1..=4).for_each(|threshold| explore(4, threshold, 3..=3));
}

fn explore(replicas: usize, threshold: usize, lengths: RangeInclusive<u32>) {
    for length in lengths {
        let failures = (0..usize::try_from(length).unwrap()).map(Some);
        for fails in failures.chain([None]) {
            let case = Case {
                replicas,
                threshold,
                fails,
            };
            match explore_all(case, length) {
                Ok(found) => println!("{case:?}, {length} requests: {found:?}"),
                Err(violation) => panic!("{violation}"),
            }
        }
    }
}
