//! Histories of a disk, all small ones and many random ones: crashes in the middle of each write of
//! a record, starts of every subset, forced starts, old images. [`super::model`] asserts that
//! nothing stale votes, that nothing that was acknowledged is lost, and that no two histories are
//! served together.

use super::choices::Choices;
use super::model::{EXTENTS, Killed, World};

/// What a history may contain.
#[derive(Clone, Copy)]
struct Kinds {
    runs: usize,
    operations: usize,
    kills: bool,
    force: bool,
    restore: bool,
    modify: bool,
    failed_flushes: bool,
    thresholds: bool,
}

fn subset(world: &mut World<'_>) -> Vec<usize> {
    let replicas = world.replicas.len();
    // All of them first.
    let bits = (1 << replicas) - 1 - world.choices.of((1 << replicas) - 1);
    (0..replicas)
        .filter(|place| bits & (1 << place) != 0)
        .collect()
}

/// One run of the daemon with these replicas, until it ends or is killed.
fn run(world: &mut World<'_>, there: &[usize], kinds: Kinds) -> Result<(), Killed> {
    let mut served = match world.serve(there, false)? {
        Some(served) => served,
        None if kinds.force && world.choices.chance(2) => match world.serve(there, true)? {
            Some(served) => served,
            None => return Ok(()),
        },
        None => return Ok(()),
    };
    let replicas = world.replicas.len();
    for _ in 0..kinds.operations {
        if kinds.restore && world.copy.is_none() && world.choices.chance(3) {
            world.copy(true);
        }
        match world.choices.of(if kinds.failed_flushes { 6 } else { 5 }) {
            0 => {
                let index = world.choices.of(EXTENTS);
                let failing = world.choices.of(replicas + 1).checked_sub(1);
                world.write(&mut served, index, failing)?;
            }
            1 => {
                let place = world.choices.of(replicas);
                if world.active(&served).contains(&place) {
                    world.evict(&mut served, place)?;
                }
            }
            2 => {
                let place = world.choices.of(replicas);
                world.rejoin(&mut served, place)?;
            }
            3 => return world.end(&mut served),
            5 => {
                let index = world.choices.of(EXTENTS);
                world.fail_flush(&mut served, index)?;
            }
            _ => return Err(Killed),
        }
    }
    Err(Killed)
}

fn history(choices: &mut Choices, replicas: usize, votes: u8, kinds: Kinds) {
    let mut world = World::new(choices, replicas, votes);
    world.kills = kinds.kills;
    world.thresholds = kinds.thresholds;
    let all: Vec<usize> = (0..replicas).collect();
    for number in 0..kinds.runs {
        let there = if number == 0 {
            all.clone()
        } else {
            subset(&mut world)
        };
        let _ = run(&mut world, &there, kinds);
        if kinds.restore && world.copy.is_none() && world.choices.chance(3) {
            world.copy(false);
        }
        if kinds.modify && world.choices.chance(4) {
            let place = world.choices.of(replicas);
            let record = world.replicas[place].record.as_ref();
            if record.is_some_and(|record| record.clean) {
                world.modify(place);
            }
        }
    }
    world.kills = false;
    if world.restore() {
        let _ = world.serve(&all, false);
    }
    // Whatever has happened, every subset is right or refused.
    if !kinds.restore {
        let there = subset(&mut world);
        let _ = world.serve(&there, false);
    }
}

fn explore_all(replicas: usize, votes: u8, kinds: Kinds) {
    /// More than a test should try.
    const MOST: usize = 1_000_000;
    let mut choices = Choices::all();
    for number in 1..MOST {
        history(&mut choices, replicas, votes, kinds);
        if !choices.advance() {
            println!("{number} histories of {replicas} replicas, threshold {votes}");
            return;
        }
    }
    panic!("more than {MOST} histories of {replicas} replicas");
}

fn explore_random(replicas: usize, votes: u8, kinds: Kinds, count: u64) {
    let variable = |name| {
        let value = std::env::var(name).ok();
        value.and_then(|value| value.parse::<u64>().ok())
    };
    let count = count * variable("QUORUM_BLK_TEST_TIMES").unwrap_or(1);
    let first = variable("QUORUM_BLK_TEST_SEED");
    for seed in first.map_or(1..count, |seed| seed..seed + 1) {
        let mut choices = Choices::random(seed);
        let run = || history(&mut choices, replicas, votes, kinds);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        assert!(
            result.is_ok(),
            "{replicas} replicas, threshold {votes}, seed {seed}"
        );
    }
}

const SMALL: Kinds = Kinds {
    runs: 2,
    operations: 1,
    kills: true,
    force: false,
    restore: false,
    modify: false,
    failed_flushes: false,
    thresholds: false,
};

/// Two runs of up to two replicas; of more, one run that is killed anywhere, or two that are not
/// killed in the middle of anything. Then a start of each subset.
#[test]
fn all_small_histories() {
    let one_run = Kinds { runs: 1, ..SMALL };
    let whole_steps = Kinds {
        kills: false,
        ..SMALL
    };
    let failed_flushes = Kinds {
        runs: 1,
        operations: 3,
        kills: false,
        failed_flushes: true,
        ..SMALL
    };
    for replicas in 1..=4 {
        for votes in 1..=u8::try_from(replicas).unwrap() {
            if replicas <= 3 {
                explore_all(replicas, votes, failed_flushes);
            }
            if replicas <= 2 {
                explore_all(replicas, votes, SMALL);
            } else {
                explore_all(replicas, votes, one_run);
                explore_all(replicas, votes, whole_steps);
            }
        }
    }
}

#[test]
fn random_histories() {
    let kinds = Kinds {
        runs: 4,
        operations: 3,
        ..SMALL
    };
    for replicas in 1..=4 {
        for votes in 1..=replicas {
            let votes = u8::try_from(votes).unwrap();
            explore_random(replicas, votes, kinds, 2000);
            let failed_flushes = Kinds {
                operations: 5,
                failed_flushes: true,
                ..kinds
            };
            explore_random(replicas, votes, failed_flushes, 6000);
            let force = Kinds {
                force: true,
                ..kinds
            };
            explore_random(replicas, votes, force, 2000);
            let thresholds = Kinds {
                thresholds: true,
                ..kinds
            };
            explore_random(replicas, votes, thresholds, 4000);
            let modify = Kinds {
                modify: true,
                ..kinds
            };
            explore_random(replicas, votes, modify, 1000);
            // An image alone, or as many as decide, is as good as a disk that was restored.
            if votes > 1 {
                let restore = Kinds {
                    restore: true,
                    ..kinds
                };
                explore_random(replicas, votes, restore, 2000);
            }
        }
    }
}
