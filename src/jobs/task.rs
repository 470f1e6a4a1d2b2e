//! What a job has left to do, and how it is cut into chunks.

use std::time::Duration;

use super::holes::{HoleSizes, Holes};
use super::{ChunkEnd, SkipPurpose, Work};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, SectorRange};
use crate::quorum::health::Health;

/// In which units the work is done, in sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    /// The longest chunk that reads.
    pub(super) most: u64,
    pub(super) block_sectors: u64,
    pub(super) holes: HoleSizes,
}

/// What is left to do.
#[derive(Debug)]
pub(super) enum Task {
    Resync {
        replica: ReplicaIndex,
        /// The sectors before it are done in this pass.
        cursor_sector: u64,
        /// Sectors written in this pass.
        gained: u64,
        /// A chunk of this pass has left something stale, or a flush has failed.
        failed: bool,
        /// When the next pass may start, unless a replica arrives before.
        not_before: Duration,
        /// [`Health::arrivals`] when this pass began.
        arrivals: u64,
        holes: Holes,
    },
    Scrub {
        repair: bool,
        cursor_sector: u64,
        end_sector: u64,
        holes: Holes,
    },
    Neighbourhood {
        left: RangeSet,
    },
    /// Where no vote has a winner, this replica decides.
    Prefer {
        replica: ReplicaIndex,
        left: RangeSet,
    },
    /// What is unrecovered after an unclean end of the disk (S5), in one pass.
    Recover {
        /// What was written before the end of the disk is uncertain until then, so that no hole
        /// counts (W8).
        first_flush: FirstFlush,
        cursor_sector: u64,
        holes: Holes,
    },
}

/// The flush with which a recovery begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstFlush {
    Due,
    Begun,
    Done,
}

impl Task {
    pub(super) fn resync(replica: ReplicaIndex, health: &Health) -> Self {
        Self::Resync {
            replica,
            cursor_sector: 0,
            gained: 0,
            failed: false,
            not_before: Duration::ZERO,
            arrivals: health.arrivals(),
            holes: Holes::default(),
        }
    }

    pub(super) fn scrub(repair: bool, end_sector: u64) -> Self {
        Self::Scrub {
            repair,
            cursor_sector: 0,
            end_sector,
            holes: Holes::default(),
        }
    }

    pub(super) fn neighbourhood(left: RangeSet) -> Self {
        Self::Neighbourhood { left }
    }

    pub(super) fn prefer(replica: ReplicaIndex, left: RangeSet) -> Self {
        Self::Prefer { replica, left }
    }

    pub(super) fn recover() -> Self {
        Self::Recover {
            first_flush: FirstFlush::Due,
            cursor_sector: 0,
            holes: Holes::default(),
        }
    }

    /// Whether a chunk can start, or a pass can end.
    pub(super) fn has_work(&self, in_flight: bool, health: &Health) -> bool {
        match self {
            Self::Resync { holes, .. }
            | Self::Scrub { holes, .. }
            | Self::Recover { holes, .. }
                if holes.is_asking() =>
            {
                false
            }
            Self::Resync {
                replica,
                cursor_sector,
                ..
            } => {
                let in_service = health.in_service().contains(*replica);
                let here = || health.next_stale(*replica, *cursor_sector).is_some();
                let anywhere = || health.next_stale(*replica, 0).is_some();
                in_service && (here() || (!in_flight && anywhere()))
            }
            Self::Scrub {
                cursor_sector,
                end_sector,
                ..
            } => cursor_sector < end_sector,
            Self::Neighbourhood { left } | Self::Prefer { left, .. } => !left.is_empty(),
            Self::Recover {
                first_flush,
                cursor_sector,
                ..
            } => {
                *first_flush != FirstFlush::Begun
                    && health.next_unrecovered(*cursor_sector).is_some()
            }
        }
    }

    pub(super) fn is_done(&self, health: &Health) -> bool {
        match self {
            Self::Resync { replica, .. } => {
                health.in_service().contains(*replica) && health.next_stale(*replica, 0).is_none()
            }
            Self::Scrub {
                cursor_sector,
                end_sector,
                ..
            } => cursor_sector >= end_sector,
            Self::Neighbourhood { left } | Self::Prefer { left, .. } => left.is_empty(),
            Self::Recover { cursor_sector, .. } => {
                health.next_unrecovered(*cursor_sector).is_none()
            }
        }
    }

    /// Whether something that is fresh now becomes durable only with the next flush.
    pub(super) fn awaits_flush(&self, health: &Health) -> bool {
        match self {
            Self::Resync { replica, .. } => health.awaits_flush(*replica),
            Self::Scrub { .. }
            | Self::Neighbourhood { .. }
            | Self::Prefer { .. }
            | Self::Recover { .. } => false,
        }
    }

    pub(super) fn left_sectors(&self, health: &Health) -> u64 {
        match self {
            Self::Resync { replica, .. } => health.stale_sectors(*replica),
            Self::Scrub {
                cursor_sector,
                end_sector,
                holes,
                ..
            } => end_sector - cursor_sector - holes.ahead_sectors(),
            Self::Neighbourhood { left } | Self::Prefer { left, .. } => left.sectors(),
            Self::Recover { .. } => health.unrecovered().sectors(),
        }
    }

    /// Takes the next chunk, in whole blocks: a question for holes, or at most [`Units::most`]
    /// sectors. `None` if a pass of a resync ended.
    pub(super) fn next_work(&mut self, units: Units, health: &Health) -> Option<Work> {
        let Units {
            most,
            block_sectors,
            holes: sizes,
        } = units;
        match self {
            Self::Resync {
                replica,
                cursor_sector,
                holes,
                ..
            } => {
                let stale = health.next_stale(*replica, *cursor_sector)?;
                let blank = health.first_blank(*replica, stale);
                let blank = blank.filter(|blank| blank.start == stale.start);
                if let Some(blank) = blank.filter(|blank| holes.is_due(*blank, &sizes)) {
                    let range = chunk_of(blank, sizes.locked, block_sectors);
                    holes.ask(range);
                    let purpose = SkipPurpose::Resync(*replica);
                    return Some(Work::Skip { purpose, range });
                }
                let range = chunk_of(stale, most, block_sectors);
                *cursor_sector = range.end();
                Some(Work::Resync {
                    replica: *replica,
                    range,
                })
            }
            Self::Scrub {
                repair,
                cursor_sector,
                end_sector,
                holes,
            } => {
                let left = SectorRange::new(*cursor_sector, *end_sector - *cursor_sector);
                if holes.is_due(left, &sizes) {
                    let range = SectorRange::new(left.start, left.count.min(sizes.asked));
                    holes.ask(range);
                    let purpose = SkipPurpose::Scrub;
                    return Some(Work::Skip { purpose, range });
                }
                let end = holes.next_skipped().unwrap_or(*end_sector);
                let count = most.min(end - *cursor_sector);
                let range = SectorRange::new(*cursor_sector, count);
                *cursor_sector = holes.pass(range.end());
                // It reaches the surroundings of corruption by itself.
                Some(Work::Scrub {
                    range,
                    repair: *repair,
                    spreads: false,
                    prefers: None,
                })
            }
            Self::Neighbourhood { left } => Some(Work::Scrub {
                range: take_chunk(left, most, block_sectors)?,
                repair: false,
                spreads: true,
                prefers: None,
            }),
            Self::Prefer { replica, left } => Some(Work::Scrub {
                range: take_chunk(left, most, block_sectors)?,
                repair: false,
                spreads: false,
                prefers: Some(*replica),
            }),
            Self::Recover {
                cursor_sector,
                holes,
                ..
            } => {
                let left = health.next_unrecovered(*cursor_sector)?;
                if holes.is_due(left, &sizes) {
                    let range = chunk_of(left, sizes.locked, block_sectors);
                    holes.ask(range);
                    let purpose = SkipPurpose::Recover;
                    return Some(Work::Skip { purpose, range });
                }
                let range = chunk_of(left, most, block_sectors);
                *cursor_sector = range.end();
                Some(Work::Scrub {
                    range,
                    repair: false,
                    spreads: false,
                    prefers: None,
                })
            }
        }
    }
}

impl Task {
    /// The answer to a question for holes, of which `end` says what is skipped.
    pub(super) fn answered(&mut self, end: &ChunkEnd, sizes: &HoleSizes) {
        let (skipped, until) = (&end.skipped, end.known_until);
        match self {
            Self::Resync {
                cursor_sector,
                holes,
                gained,
                ..
            } => {
                *cursor_sector = holes.answered(skipped, until, sizes);
                *gained += end.skipped_sectors();
            }
            Self::Scrub {
                cursor_sector,
                holes,
                ..
            } => {
                let start = holes.answered(skipped, until, sizes);
                holes.skip(skipped);
                *cursor_sector = holes.pass(start);
            }
            Self::Recover {
                cursor_sector,
                holes,
                ..
            } => *cursor_sector = holes.answered(skipped, until, sizes),
            Self::Neighbourhood { .. } | Self::Prefer { .. } => {
                unreachable!("it asks for no holes")
            }
        }
    }

    /// Whether it flushes before all else.
    pub(super) fn flushes_first(&self) -> bool {
        matches!(
            self,
            Self::Recover {
                first_flush: FirstFlush::Due,
                ..
            }
        )
    }

    /// A flush has begun, or has ended. Whether that was the one before all else.
    pub(super) fn flushed(&mut self, ended: bool) -> bool {
        let Self::Recover { first_flush, .. } = self else {
            return false;
        };
        let is_first = *first_flush != FirstFlush::Done;
        if is_first {
            *first_flush = match ended {
                true => FirstFlush::Done,
                false => FirstFlush::Begun,
            };
        }
        is_first
    }
}

/// Takes the first chunk of what is `left`, in whole blocks.
fn take_chunk(left: &mut RangeSet, most: u64, block_sectors: u64) -> Option<SectorRange> {
    let range = chunk_of(left.iter().next()?, most, block_sectors);
    left.remove(range);
    Some(range)
}

/// The first chunk of `range`, in whole blocks and at most `most` sectors long.
fn chunk_of(range: SectorRange, most: u64, block_sectors: u64) -> SectorRange {
    let start = range.start - range.start % block_sectors;
    let end = range
        .end()
        .next_multiple_of(block_sectors)
        .min(start + most);
    SectorRange::new(start, end - start)
}
