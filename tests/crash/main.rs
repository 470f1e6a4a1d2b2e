//! The crash laboratory: what is on a disk after a power cut at any moment, whatever each replica
//! has kept. docs/crash.md explains it.
//!
//! QUORUM_BLK_CRASH_SECONDS says how long to look for failures, QUORUM_BLK_CRASH_SEED which trace
//! to repeat, QUORUM_BLK_CRASH_CLASS of which kind of disk, and QUORUM_BLK_CRASH_STATE which state
//! that was kept to judge once more.

mod case;
mod files;
mod filesystem;
mod history;
mod judge;
mod laboratory;
mod operator;
mod report;
mod trace;
mod workload;

use std::collections::BTreeMap;
use std::env;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use testkit::images::Random;
use testkit::mounts;

use self::case::Case;
use self::laboratory::{Class, Work, judge_trace};
use self::report::Figures;

/// States that are taken from a trace, and in `make test`, where each class has one trace.
const STATES: usize = 12;
const STATES_SHORT: usize = 3;
/// The seed of `make test`: what fails there is what was changed.
const SEED: u64 = 1;
/// Traces that are made, and judged, at the same time: most of the time of each is waiting.
const THREADS: usize = 12;

const fn class(work: Work, replicas: usize, has_records: bool) -> Class {
    Class {
        work,
        replicas,
        has_records,
        has_fault: false,
        has_operator: false,
        lies: false,
    }
}

fn classes() -> Vec<Class> {
    let blocks = |replicas, has_records| class(Work::Blocks, replicas, has_records);
    let fault = |replicas| Class {
        has_fault: true,
        ..blocks(replicas, true)
    };
    let operator = Class {
        has_operator: true,
        ..blocks(3, true)
    };
    let operator_fault = Class {
        has_fault: true,
        ..operator
    };
    let files_fault = Class {
        has_fault: true,
        ..class(Work::Files("ext4"), 3, true)
    };
    vec![
        blocks(3, true),
        operator,
        class(Work::Files("ext4"), 3, true),
        blocks(2, true),
        fault(3),
        operator_fault,
        blocks(3, false),
        class(Work::Files("xfs"), 3, true),
        blocks(1, true),
        blocks(2, false),
        blocks(4, true),
        class(Work::Files("ext4"), 2, true),
        files_fault,
        blocks(5, true),
        fault(4),
        blocks(4, false),
        blocks(5, false),
        blocks(1, false),
    ]
}

fn setting(name: &str) -> Option<String> {
    let value = env::var(format!("QUORUM_BLK_CRASH_{name}")).ok();
    value.filter(|value| !value.is_empty())
}

#[test]
fn nothing_flushed_is_lost() {
    if let Some(state) = setting("STATE") {
        return judge_again(Path::new(&state));
    }
    let seconds = setting("SECONDS").map(|text| text.parse().expect("SECONDS is a number"));
    let seed: Option<u64> = setting("SEED").map(|text| text.parse().expect("SEED is a number"));
    let wanted = setting("CLASS");
    let classes: Vec<Class> = classes()
        .into_iter()
        .filter(|class| wanted.as_ref().is_none_or(|wanted| *wanted == class.name()))
        .collect();
    assert!(!classes.is_empty(), "no such class: {wanted:?}");
    let is_short = seconds.is_none() && seed.is_none();
    let states = if is_short { STATES_SHORT } else { STATES };
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    // How many traces are made, if not as many as there is time for.
    let traces = match seed {
        Some(_) => Some(1),
        None => is_short.then_some(classes.len()),
    };
    let totals = Mutex::new(BTreeMap::<String, Figures>::new());
    let first = match (seed, is_short) {
        (Some(seed), _) => seed,
        (None, true) => SEED,
        (None, false) => Random::from_environment().number() >> 40,
    };
    // Which class has a turn first: there need not be time for all.
    let turn = if traces.is_some() {
        0
    } else {
        usize::try_from(first).expect("24 bits")
    };
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (classes, totals) = (&classes, &totals);
            scope.spawn(move || {
                mounts::separate();
                let is_over = || end.is_some_and(|end| traces.is_none() && Instant::now() >= end);
                for number in (thread..traces.unwrap_or(usize::MAX)).step_by(THREADS) {
                    let class = classes[turn.wrapping_add(number) % classes.len()];
                    let figures = judge_trace(class, first + number as u64, states, &is_over);
                    let mut totals = totals.lock().expect("another thread failed");
                    *totals.entry(class.name()).or_default() += figures;
                    if is_over() {
                        break;
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().expect("a thread failed");
    for (class, figures) in &totals {
        println!("{}", figures.line(class));
    }
    let failures: usize = totals.values().map(|figures| figures.failures).sum();
    let states: usize = totals.values().map(|figures| figures.states).sum();
    assert!(states > 0, "nothing was judged");
    assert_eq!(failures, 0, "states that broke a promise");
}

/// The figures of one state after the other, until they are enough.
fn figures_until(class: Class, is_enough: fn(&Figures) -> bool) -> Figures {
    /// Far more than it takes.
    const ROUNDS: u64 = 40;
    let mut totals = Figures::default();
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            mounts::separate();
            for seed in 0..ROUNDS {
                totals += judge_trace(class, seed, 5, &|| false);
                if is_enough(&totals) {
                    break;
                }
            }
        });
        work.join().expect("a trace failed");
    });
    totals
}

/// What records are for; and the laboratory sees it.
#[test]
fn a_disk_of_two_without_records_has_sectors_that_cannot_be_read() {
    let figures = figures_until(class(Work::Blocks, 2, false), |figures| {
        figures.unreadable > 0
    });
    assert!(figures.unreadable > 0, "{figures:?}");
    assert_eq!(figures.failures, 0, "{figures:?}");
}

/// If images lose what was synced, the laboratory says so.
#[test]
fn images_that_lose_what_was_synced_are_found_out() {
    for work in [Work::Blocks, Work::Files("ext4")] {
        let lies = Class {
            lies: true,
            ..class(work, 3, true)
        };
        let figures = figures_until(lies, |figures| figures.failures > 0);
        assert!(figures.failures > 0, "{figures:?}");
    }
}

fn judge_again(state: &Path) {
    mounts::separate();
    let case = Case::load(state).expect("reading a state");
    let images = judge::scratch();
    let outcome = judge::judge(&case, images.path());
    assert!(outcome.problems.is_empty(), "{:#?}", outcome.problems);
}
