//! The worlds that are explored, and where each rule is missed.

use crate::rules::{Rule, Rules};
use crate::world::{Budget, World};

/// Nothing happens.
const NONE: Budget = Budget {
    writes: 0,
    flushes: 0,
    failures: 0,
    evictions: 0,
    returns: 0,
    kills: 0,
    power_cuts: 0,
    sweeps: 0,
};

/// A disk with so many replicas, of which so many equal versions win, and so many sectors.
fn world([replicas, threshold, sectors]: [usize; 3], budget: Budget) -> World {
    World {
        rules: Rules {
            replicas,
            threshold,
            sectors,
            without: None,
        },
        budget,
    }
}

/// So many writes and flushes, and what else may happen.
fn with(writes: u8, flushes: u8, others: Budget) -> Budget {
    Budget {
        writes,
        flushes,
        ..others
    }
}

fn failures(failures: u8) -> Budget {
    NONE.failures(failures)
}

/// So many evictions, and as many returns.
fn evictions(evictions: u8) -> Budget {
    Budget {
        evictions,
        returns: evictions,
        ..NONE
    }
}

impl Budget {
    fn failures(self, failures: u8) -> Self {
        Self { failures, ..self }
    }

    fn kills(self, kills: u8) -> Self {
        Self { kills, ..self }
    }

    fn power_cuts(self, power_cuts: u8) -> Self {
        Self { power_cuts, ..self }
    }

    fn sweeps(self, sweeps: u8) -> Self {
        Self { sweeps, ..self }
    }
}

/// What is explored in some seconds each.
pub(crate) fn small() -> Vec<World> {
    let one = |replicas, threshold, budget| world([replicas, threshold, 1], budget);
    let two = |replicas, threshold, budget| world([replicas, threshold, 2], budget);
    vec![
        one(1, 1, with(2, 1, NONE.kills(1).power_cuts(1).sweeps(1))),
        // Two replicas, of which one may go on alone.
        one(2, 1, with(1, 1, evictions(1).power_cuts(2).sweeps(1))),
        one(2, 1, with(1, 1, failures(1).kills(1).power_cuts(1))),
        one(2, 1, with(2, 0, evictions(2).kills(1))),
        one(2, 1, with(1, 1, failures(2).power_cuts(1))),
        two(2, 1, with(2, 1, failures(1).power_cuts(1))),
        // Two that both have to agree.
        one(
            2,
            2,
            with(2, 1, failures(1).kills(1).power_cuts(1).sweeps(1)),
        ),
        two(2, 2, with(2, 1, failures(1).power_cuts(1))),
        one(2, 2, with(1, 0, NONE.power_cuts(2))),
        one(2, 2, with(1, 2, failures(2).power_cuts(1))),
        one(2, 2, with(1, 0, failures(2).kills(1).power_cuts(1))),
        // Three, with a majority.
        one(3, 2, with(1, 1, failures(1).power_cuts(1))),
        one(3, 2, with(2, 1, failures(1).power_cuts(1))),
        one(3, 2, with(1, 1, failures(2).kills(1))),
        one(3, 2, with(1, 1, failures(2).power_cuts(1))),
        one(3, 2, with(2, 0, failures(2).kills(1))),
        one(3, 2, with(2, 0, evictions(1).kills(1))),
        one(3, 2, with(2, 0, NONE.power_cuts(2))),
        one(
            3,
            2,
            with(
                1,
                0,
                Budget {
                    evictions: 1,
                    ..failures(1)
                }
                .kills(1)
                .power_cuts(1),
            ),
        ),
        // Three, with other thresholds.
        one(3, 1, with(1, 1, evictions(1).power_cuts(1))),
        one(3, 3, with(1, 1, failures(1).power_cuts(1))),
        // One that has returned without a vote is evicted again.
        one(2, 1, with(2, 0, evictions(2).failures(1))),
    ]
}

/// What takes minutes.
pub(crate) fn large() -> Vec<World> {
    vec![
        world([3, 2, 1], with(2, 0, evictions(1).power_cuts(1))),
        world([3, 2, 1], with(1, 1, evictions(1).power_cuts(1).sweeps(1))),
        world(
            [2, 1, 1],
            with(2, 1, evictions(1).failures(1).power_cuts(1)),
        ),
        world([2, 1, 2], with(2, 1, evictions(1).power_cuts(1))),
    ]
}

/// A small world that violates a property if its daemon is without the rule.
pub(crate) fn that_misses(rule: Rule) -> World {
    let place = match rule {
        Rule::AnswerAfterRecords
        | Rule::FailedFlushIsStale
        | Rule::FailedFlushTaints
        | Rule::FailedIsStale
        | Rule::FlushNeedsHolders
        | Rule::LoserIsStale
        | Rule::MarkBeforeWrite
        | Rule::RecordWeak
        | Rule::RefuseWhatOthersKnow
        | Rule::StaleIsNotCovered => 2,
        Rule::ClearAfterExactStaleness => 1,
        Rule::AgreeWhenBound
        | Rule::KeepProposals
        | Rule::NoNeededEviction
        | Rule::RecordsNeedIt => 3,
        Rule::ClearAfterFlush => 6,
        Rule::SettleByFlushing => 8,
        Rule::FailedRepairIsStale => 9,
        Rule::FailedWriteIsUndecided
        | Rule::FlushNeedsThreshold
        | Rule::SettleByWriting
        | Rule::WriteNeedsThreshold => 11,
        Rule::OutMeansStale | Rule::RefuseWithoutOnlyCopy => 13,
        Rule::AgreeInTwoRounds
        | Rule::EvictedIsStale
        | Rule::ReturnIsDrained
        | Rule::ReturnIsStale => 16,
        Rule::WriteNeedsVotes => 21,
    };
    let mut world = small().swap_remove(place);
    world.rules.without = Some(rule);
    world
}
