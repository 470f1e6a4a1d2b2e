//! The disk, and the rules of the protocol, one of which may be left out. Each must be missed: a
//! property is violated then.

use crate::sets::{self, Set};

/// A disk of some replicas, and what its daemon keeps to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) replicas: usize,
    pub(crate) threshold: usize,
    pub(crate) sectors: usize,
    pub(crate) without: Option<Rule>,
}

impl Rules {
    pub(crate) fn members(&self) -> Set {
        sets::first(self.replicas)
    }

    pub(crate) fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

/// A rule of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// S4: a sector is marked before it is written.
    MarkBeforeWrite,
    /// S4: a mark goes only when all replicas have flushed what was written there.
    ClearAfterFlush,
    /// S4: and when the records say exactly where each member is stale.
    ClearAfterExactStaleness,
    /// S2: the guest has its answer when the records know who has missed the write.
    AnswerAfterRecords,
    /// S2: what was stale and is written again is stale after a power cut until it is flushed.
    RecordWeak,
    /// S3: a table is proposed before it is agreed upon.
    AgreeInTwoRounds,
    /// S3: a table is agreed upon only if those that hold it keep the others from going on.
    AgreeWhenBound,
    /// W6: no replica is evicted without which no table could be agreed upon.
    RecordsNeedIt,
    /// S3: a start is refused where those that are missing could have gone on alone.
    RefuseWhatOthersKnow,
    /// S3: a start is refused where only those that are missing have a good copy.
    RefuseWithoutOnlyCopy,
    /// S3: a start adds the tables that were proposed, and may have been agreed upon.
    KeepProposals,
    /// S3: one that was out of service is stale wherever something is marked.
    OutMeansStale,
    /// S5: where too few hold the winner, it is written to the others before it counts.
    SettleByWriting,
    /// S5: and flushed.
    SettleByFlushing,
    /// S5: what a failed write has left in a page cache does not count after a failed flush.
    FailedRepairIsStale,
    /// S5, W7: what did not hold the winner is stale.
    LoserIsStale,
    /// W3: a write needs t replicas.
    WriteNeedsThreshold,
    /// W3: it does not count on one that had no vote, and may lose it.
    WriteNeedsVotes,
    /// W3: what has failed it is stale.
    FailedIsStale,
    /// W5: a flush needs t replicas that hold all it covers.
    FlushNeedsThreshold,
    /// W5: each sector needs them.
    FlushNeedsHolders,
    /// W5: what a failed flush may have lost is stale.
    FailedFlushIsStale,
    /// W5: also what is being written then.
    FailedFlushTaints,
    /// W5: what was stale when a flush began is not covered by it.
    StaleIsNotCovered,
    /// W6: no replica is evicted that is needed.
    NoNeededEviction,
    /// W6: what was not flushed is stale from the eviction on.
    EvictedIsStale,
    /// W7: a failed write is decided by a vote.
    FailedWriteIsUndecided,
    /// W6: a replica returns stale.
    ReturnIsStale,
    /// W6: and only when nothing of it is in flight.
    ReturnIsDrained,
}

impl Rule {
    /// All of them.
    pub(crate) const ALL: [Self; 29] = [
        Self::MarkBeforeWrite,
        Self::ClearAfterFlush,
        Self::ClearAfterExactStaleness,
        Self::AnswerAfterRecords,
        Self::RecordWeak,
        Self::AgreeInTwoRounds,
        Self::AgreeWhenBound,
        Self::RecordsNeedIt,
        Self::RefuseWhatOthersKnow,
        Self::RefuseWithoutOnlyCopy,
        Self::KeepProposals,
        Self::OutMeansStale,
        Self::SettleByWriting,
        Self::SettleByFlushing,
        Self::FailedRepairIsStale,
        Self::LoserIsStale,
        Self::WriteNeedsThreshold,
        Self::WriteNeedsVotes,
        Self::FailedIsStale,
        Self::FlushNeedsThreshold,
        Self::FlushNeedsHolders,
        Self::FailedFlushIsStale,
        Self::FailedFlushTaints,
        Self::StaleIsNotCovered,
        Self::NoNeededEviction,
        Self::EvictedIsStale,
        Self::FailedWriteIsUndecided,
        Self::ReturnIsStale,
        Self::ReturnIsDrained,
    ];
}
