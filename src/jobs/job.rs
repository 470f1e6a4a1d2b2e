//! One job: what is left to do, its chunks in flight, and its results.
//!
//! Invariants: the status changes only along the arrows of the [room](super); a chunk in flight
//! ends once; a scrub has processed no more than its range.

use std::time::Duration;

use super::findings::Findings;
use super::holes::HoleSizes;
use super::pace::Pace;
use super::record::Record;
use super::task::{Task, Units};
use super::{
    ChunkEnd, ChunkId, JobChange, JobEvent, JobFailure, JobId, JobInfo, JobKind, JobStatus, Work,
};
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::limits::{
    FAILED_FLUSHES_MAX, FRAGMENT_BYTES_MAX, JOB_CHUNKS_IN_FLIGHT_MAX, JOB_PAUSE_MAX,
    RECOVERY_CHUNKS_IN_FLIGHT_MAX, RECOVERY_PRIORITY, SECTOR_BYTES,
};
use crate::quorum::health::Health;

/// A job with a speed limit is cut into at least this many chunks a second, so that a low limit
/// does not mean long pauses between large chunks.
const CHUNKS_PER_SECOND: u64 = 8;

#[derive(Debug)]
pub(super) struct Job {
    id: JobId,
    task: Task,
    status: JobStatus,
    speed_bytes: u64,
    /// When the next chunk may start by the speed limit, or if the job has priority.
    not_before: Duration,
    /// When the first chunk started that is no flush.
    began: Option<Duration>,
    in_flight: Vec<InFlight>,
    done_sectors: u64,
    /// It flushes before it ends, because an operator requested it. A job that started by itself
    /// does not: its writes become durable with the next flush of the guest, like the guest's
    /// writes.
    persists: bool,
    /// It has written since its last flush, and flushes before it ends.
    needs_flush: bool,
    failed_flushes: u32,
    record: Record,
    failure: Option<JobFailure>,
}

/// A chunk in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    id: ChunkId,
    pub(super) began: Duration,
    /// `None`: a flush, or a question.
    pub(super) range: Option<SectorRange>,
    /// It asks for holes.
    pub(super) asks: bool,
}

impl InFlight {
    fn is_flush(&self) -> bool {
        self.range.is_none() && !self.asks
    }
}

impl Job {
    pub(super) fn new(id: JobId, task: Task, speed_bytes: u64, persists: bool) -> Self {
        Self {
            id,
            task,
            status: JobStatus::Created,
            speed_bytes,
            not_before: Duration::ZERO,
            began: None,
            in_flight: Vec::new(),
            done_sectors: 0,
            persists,
            needs_flush: false,
            failed_flushes: 0,
            record: Record::default(),
            failure: None,
        }
    }

    pub(super) fn id(&self) -> JobId {
        self.id
    }

    pub(super) fn status(&self) -> JobStatus {
        self.status
    }

    pub(super) fn kind(&self) -> JobKind {
        match &self.task {
            Task::Resync { replica, .. } => JobKind::Resync(*replica),
            Task::Scrub { repair, .. } => JobKind::Scrub { repair: *repair },
            Task::Neighbourhood { .. } => JobKind::NeighbourhoodScrub,
            Task::Prefer { replica, .. } => JobKind::Prefer(*replica),
            Task::Recover { .. } => JobKind::Recovery,
        }
    }

    pub(super) fn info(&self, health: &Health) -> JobInfo {
        let in_flight = self.in_flight.iter().filter_map(|chunk| chunk.range);
        let left = match &self.task {
            // The sectors of a chunk in flight are still stale, or unrecovered.
            Task::Resync { .. } | Task::Recover { .. } => self.task.left_sectors(health),
            Task::Scrub { .. } | Task::Neighbourhood { .. } | Task::Prefer { .. } => {
                self.task.left_sectors(health) + in_flight.map(|range| range.count).sum::<u64>()
            }
        };
        let target = match &self.task {
            Task::Resync { replica, .. } => Some(*replica),
            Task::Scrub { .. }
            | Task::Neighbourhood { .. }
            | Task::Prefer { .. }
            | Task::Recover { .. } => None,
        };
        let findings = self.record.findings(target, health);
        let sum = |of: fn(&Findings) -> u64| findings.values().map(of).sum();
        JobInfo {
            id: self.id,
            kind: self.kind(),
            status: self.status,
            current_bytes: self.done_sectors * SECTOR_BYTES,
            total_bytes: (self.done_sectors + left) * SECTOR_BYTES,
            speed_bytes: self.speed_bytes,
            corrupt_sectors_found: sum(|found| found.corrupt.sectors),
            unreadable_sectors_found: sum(|found| found.unreadable.sectors),
            sectors_written: sum(|found| found.written),
            findings,
            undecided: self.record.undecided(),
            unread: self.record.unread().and(health.members()),
            error: self.failure(health),
        }
    }

    fn failure(&self, health: &Health) -> Option<JobFailure> {
        let is_resync = matches!(self.task, Task::Resync { .. });
        let unread = self.record.unread().and(health.members());
        let not_written = self.record.not_written_sectors();
        let undecided = self.record.undecided_sectors();
        self.failure.or_else(|| match self {
            _ if is_resync => None,
            _ if undecided > 0 => Some(JobFailure::NoQuorum { sectors: undecided }),
            _ if not_written > 0 => Some(JobFailure::NotRepaired {
                sectors: not_written,
            }),
            _ if !unread.is_empty() => Some(JobFailure::NotRead { replicas: unread }),
            Self {
                failed_flushes: 1..,
                ..
            } => Some(JobFailure::NotFlushed),
            _ => None,
        })
    }

    pub(super) fn push_event(&self, what: JobChange, health: &Health, events: &mut Vec<JobEvent>) {
        let job = self.info(health);
        events.push(JobEvent { job, what });
    }

    pub(super) fn set_status(
        &mut self,
        status: JobStatus,
        health: &Health,
        events: &mut Vec<JobEvent>,
    ) {
        use JobStatus::{Aborting, Concluded, Created, Null, Paused, Running};
        assert!(
            matches!(
                (self.status, status),
                (Created | Paused, Running)
                    | (Running, Paused)
                    | (Running | Paused, Aborting)
                    | (Running | Aborting, Concluded)
                    | (Concluded, Null)
            ),
            "the status of {} cannot change from {} to {}",
            self.id,
            self.status.name(),
            status.name()
        );
        self.status = status;
        self.push_event(JobChange::Status, health, events);
    }

    /// Whether it has to flush before it ends. What the guest has written to the replica of a
    /// resync is a part of what is complete then.
    fn owes_flush(&self, health: &Health) -> bool {
        self.needs_flush || (self.persists && self.task.awaits_flush(health))
    }

    /// Flushes before it ends, also what it has written so far.
    pub(super) fn persist(&mut self) {
        self.needs_flush |= !self.persists && self.done_sectors > 0;
        self.persists = true;
    }

    pub(super) fn set_speed(&mut self, speed_bytes: u64) {
        self.speed_bytes = speed_bytes;
        self.not_before = Duration::ZERO;
    }

    /// Ends the job when its chunks in flight have ended.
    pub(super) fn fail(&mut self, failure: JobFailure) {
        self.failure.get_or_insert(failure);
    }

    /// Whether it scrubs surroundings and is not cancelled: more ranges can be added.
    pub(super) fn accepts_ranges(&self) -> bool {
        matches!(self.task, Task::Neighbourhood { .. }) && self.status != JobStatus::Aborting
    }

    pub(super) fn add(&mut self, more: &RangeSet) {
        if let Task::Neighbourhood { left } = &mut self.task {
            left.insert_all(more);
        }
    }

    /// When the next chunk may start. `None`: not before something changes.
    pub(super) fn ready_at(&self, now: Duration, pace: &Pace, health: &Health) -> Option<Duration> {
        if self.status != JobStatus::Running || self.failure.is_some() {
            return None;
        }
        let in_flight = !self.in_flight.is_empty();
        let flushes = !in_flight && self.owes_flush(health) && self.task.is_done(health);
        if !flushes && !self.task.has_work(in_flight, health) {
            return None;
        }
        let pass = match &self.task {
            Task::Resync {
                not_before,
                arrivals,
                ..
            } if *arrivals == health.arrivals() => *not_before,
            Task::Resync { .. } => Duration::ZERO,
            Task::Scrub { .. }
            | Task::Neighbourhood { .. }
            | Task::Prefer { .. }
            | Task::Recover { .. } => Duration::ZERO,
        };
        let by_job = self.has_room().then_some(self.not_before);
        let ready = if self.speed_bytes > 0 {
            by_job
        } else if self.has_priority(now) {
            by_job.map(|at| pace.ready_at().map_or(at, |by_pace| at.min(by_pace)))
        } else {
            pace.ready_at()
        };
        Some(ready?.max(pass).max(now))
    }

    /// Whether another chunk may be in flight: more of them if they are short, as those of a
    /// recovery are that reads what is data here and there.
    fn has_room(&self) -> bool {
        let ranges = self.in_flight.iter().filter_map(|chunk| chunk.range);
        let bytes: u64 = ranges.map(|range| range.bytes()).sum();
        let most = match self.task {
            Task::Recover { .. } if bytes < FRAGMENT_BYTES_MAX => RECOVERY_CHUNKS_IN_FLIGHT_MAX,
            _ => JOB_CHUNKS_IN_FLIGHT_MAX,
        };
        self.in_flight.len() < most
    }

    /// Whether the guest has to wait for it: soon after the start of the disk a recovery does what
    /// it can.
    pub(super) fn has_priority(&self, now: Duration) -> bool {
        matches!(self.task, Task::Recover { .. })
            && self
                .began
                .is_none_or(|began| now < began + RECOVERY_PRIORITY)
    }

    /// Starts the next chunk, in whole blocks. `None` if a pass of a resync
    /// ended.
    pub(super) fn next_chunk(
        &mut self,
        id: ChunkId,
        now: Duration,
        units: Units,
        retry_after: Duration,
        health: &Health,
    ) -> Option<Work> {
        let Units {
            most,
            block_sectors,
            mut holes,
        } = units;
        if self.speed_bytes > 0 {
            // The limit is one of the bytes of the disk, so there is nothing to gain.
            holes.read_min = u64::MAX;
        }
        let most = match self.speed_bytes / CHUNKS_PER_SECOND / SECTOR_BYTES {
            0 if self.speed_bytes == 0 => most,
            sectors => (sectors - sectors % block_sectors).clamp(block_sectors, most),
        };
        let work = self.next_work(
            now,
            Units {
                most,
                block_sectors,
                holes,
            },
            retry_after,
            health,
        )?;
        let range = match work {
            Work::Resync { range, .. } | Work::Scrub { range, .. } => Some(range),
            Work::Skip { .. } | Work::Flush => None,
        };
        assert!(
            range.is_none_or(|range| (1..=most).contains(&range.count)),
            "a chunk of {} has {range:?} of at most {most} sectors",
            self.id
        );
        assert!(self.has_room(), "{} has too many chunks in flight", self.id);
        if let Some(range) = range.filter(|_| self.speed_bytes > 0) {
            let time = Duration::from_secs_f64(range.bytes() as f64 / self.speed_bytes as f64);
            self.not_before = self.not_before.max(now) + time;
        }
        if work != Work::Flush {
            self.began.get_or_insert(now);
        }
        self.in_flight.push(InFlight {
            id,
            began: now,
            range,
            asks: matches!(work, Work::Skip { .. }),
        });
        Some(work)
    }

    fn next_work(
        &mut self,
        now: Duration,
        units: Units,
        retry_after: Duration,
        health: &Health,
    ) -> Option<Work> {
        if self.owes_flush(health) && self.task.is_done(health) {
            self.needs_flush = false;
            return Some(Work::Flush);
        }
        if self.task.flushes_first() {
            self.task.flushed(false);
            return Some(Work::Flush);
        }
        let work = self.task.next_work(units, health);
        if work.is_none() {
            self.end_pass(now, retry_after, health);
        }
        work
    }

    /// Ends a pass of a resync. What is still stale was not copied, or became stale since. It waits
    /// before it tries again what has failed, unless a replica has arrived meanwhile.
    fn end_pass(&mut self, now: Duration, retry_after: Duration, health: &Health) {
        let Task::Resync {
            replica,
            cursor_sector,
            gained,
            failed,
            not_before,
            arrivals,
            holes,
        } = &mut self.task
        else {
            return;
        };
        *failed &= *arrivals == health.arrivals();
        let has_failed = *failed && *gained == 0;
        if has_failed || self.failed_flushes >= FAILED_FLUSHES_MAX {
            let sectors = health.stale_sectors(*replica);
            self.failure = Some(JobFailure::NotCopied { sectors });
        }
        if *failed {
            *not_before = now + retry_after;
        }
        *arrivals = health.arrivals();
        (*cursor_sector, *gained, *failed) = (0, 0, false);
        holes.restart();
        self.record.pass_ended(*replica);
    }

    /// Takes the result of a chunk, if it is one of this job.
    pub(super) fn ended(
        &mut self,
        id: ChunkId,
        end: &ChunkEnd,
        (now, holes): (Duration, &HoleSizes),
        health: &Health,
    ) -> Option<InFlight> {
        let index = self.in_flight.iter().position(|chunk| chunk.id == id)?;
        let chunk = self.in_flight.swap_remove(index);
        if self.speed_bytes == 0 && self.has_priority(now) && !chunk.is_flush() {
            let took = now.saturating_sub(chunk.began);
            self.not_before = self.not_before.max(now + took.min(JOB_PAUSE_MAX));
        }
        if chunk.asks {
            self.task.answered(end, holes);
            self.done_sectors += end.skipped_sectors();
        }
        let is_first_flush = chunk.is_flush() && self.task.flushed(true);
        self.failed_flushes += u32::from(end.failed && !is_first_flush);
        let is_resync = matches!(self.task, Task::Resync { .. });
        let written = end.written();
        let changed = written > 0 || (is_resync && !end.skipped.is_empty());
        self.needs_flush |= self.persists && changed;
        self.record.add(chunk.range, end);
        self.done_sectors += match &mut self.task {
            Task::Resync {
                replica,
                gained,
                failed,
                ..
            } => {
                *gained += written;
                let is_left = |range| !health.stale_parts(*replica, range).is_empty();
                *failed |= end.failed || chunk.range.is_some_and(is_left);
                written
            }
            Task::Scrub { .. }
            | Task::Neighbourhood { .. }
            | Task::Prefer { .. }
            | Task::Recover { .. } => chunk.range.map_or(0, |range| range.count),
        };
        if let Task::Scrub { end_sector, .. } = self.task {
            assert!(
                self.done_sectors <= end_sector,
                "{} has read more than its range",
                self.id
            );
        }
        Some(chunk)
    }

    pub(super) fn has_ended(&self, health: &Health) -> bool {
        let running = self.status == JobStatus::Running;
        let given_up = self.failure.is_some() || self.status == JobStatus::Aborting;
        let done = || running && !self.owes_flush(health) && self.task.is_done(health);
        self.in_flight.is_empty() && (given_up || done())
    }

    /// Where it has found replicas corrupt or unreadable.
    pub(super) fn faults(&self) -> RangeSet {
        self.record.faults()
    }

    /// Whether it failed in a way that would probably repeat at once.
    pub(super) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub(super) fn conclude(&mut self, health: &Health, events: &mut Vec<JobEvent>) {
        if self.status == JobStatus::Aborting {
            self.push_event(JobChange::Cancelled, health, events);
        } else {
            if self.failure(health).is_some() {
                self.set_status(JobStatus::Aborting, health, events);
            }
            self.push_event(JobChange::Completed, health, events);
        }
        self.set_status(JobStatus::Concluded, health, events);
        self.set_status(JobStatus::Null, health, events);
    }
}
