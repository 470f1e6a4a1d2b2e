//! A request that fails names an error that a replica returned for it, and not one of another
//! request (O1).

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::Action;
use quorum_blk::common::report::{Report, Requester};
use quorum_blk::common::{Errno, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

/// Where each replica returns this error.
const FULL: (SectorRange, Errno) = (SectorRange { start: 8, count: 1 }, Errno(libc::ENOSPC));
const BROKEN: (SectorRange, Errno) = (
    SectorRange {
        start: 16,
        count: 1,
    },
    Errno(libc::EIO),
);
/// Where each replica returns other data.
const DIFFERENT: SectorRange = SectorRange {
    start: 24,
    count: 1,
};

/// Does all that `engine` asks for; returns the failures that it reports.
fn run(engine: &mut Engine, effects: &mut Collected) -> Vec<(SectorRange, Option<Errno>)> {
    let mut failures = Vec::new();
    while !effects.effects.is_empty() {
        for effect in std::mem::take(&mut effects.effects) {
            match effect {
                Effect::Submit(mut operation) => {
                    let Action::Read { range, into } = &mut operation.action else {
                        panic!("{operation:?}");
                    };
                    into.fill(operation.replica.0);
                    let mut errors = [FULL, BROKEN].into_iter();
                    let error = errors.find(|(place, _)| place == range);
                    let result = error.map_or(Ok(()), |(_, errno)| Err(errno));
                    engine.reply(operation.reply(result), effects);
                }
                Effect::Report(Report::Failure {
                    range,
                    requester: Requester::Guest,
                    error,
                    ..
                }) => failures.push((range, error)),
                _ => {}
            }
        }
    }
    failures
}

#[test]
fn name_their_own_error() {
    let policy = policy::plain(2);
    let shared = Arc::new(Shared::new(3, 2, 1, 64));
    let (pool, clock) = (BufferPool::default(), TurnClock::default());
    let mut engine = Engine::new(WorkerIndex(0), policy, shared, pool, clock);
    let mut effects = Collected::default();
    for round in 0..3 {
        for (number, range) in [FULL.0, BROKEN.0, DIFFERENT].into_iter().enumerate() {
            let number = 3 * round + u64::try_from(number).expect("three");
            engine.submit(tag(number), GuestRequest::Read(range), &mut effects);
        }
        let mut failures = run(&mut engine, &mut effects);
        failures.sort_by_key(|(range, _)| range.start);
        let expected = [
            (FULL.0, Some(FULL.1)),
            (BROKEN.0, Some(BROKEN.1)),
            (DIFFERENT, None),
        ];
        assert_eq!(failures, expected, "round {round}");
    }
    // Their slots are used again, with nothing of them left.
    assert!(engine.is_idle());
    engine.self_check();
}
