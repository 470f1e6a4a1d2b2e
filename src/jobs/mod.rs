//! Background work: copying to stale replicas (*resync*), and reading and comparing all replicas
//! (*scrub*).
//!
//! Sans-IO like the engine. [`Jobs::next`] returns the next chunk of work, which the engine of one
//! worker runs like a guest request; [`Jobs::ended`] takes its result. This room decides what is
//! due (`job`) and how fast that goes (`pace`). It knows replicas only through [`Health`], and the
//! guest only as a number of requests.
//!
//! ```text
//! created ─► running ◄─► paused                     each change of the status is an event
//!               │ done or failed              │
//!               ▼                             ▼ cancelled
//!           concluded ◄──────────────── aborting    when the last chunk has ended
//!               ▼
//!             null                                  and the job is deleted
//! ```
//!
//! A resync of a stale replica starts by itself, unless the last one was cancelled.
//!
//! Invariants: a replica has at most one resync; a running job without chunks in flight waits for a
//! time that [`Jobs::next`] has returned, or for an evicted replica, which rejoins; the status
//! changes only along the arrows.

#![forbid(unsafe_code)]

mod chunk;
mod findings;
mod holes;
mod info;
mod job;
mod neighbourhood;
pub mod pace;
mod record;
mod task;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::chunk::{Chunk, ChunkEnd, ChunkId, Found, Next, SkipPurpose, Work};
pub use self::findings::{Findings, FindingsByReplica, Places};
pub use self::holes::HoleSizes;
pub use self::info::{
    JobChange, JobEvent, JobFailure, JobId, JobInfo, JobKind, JobStatus, NotStarted, UnknownJob,
};
use self::job::Job;
use self::neighbourhood::Neighbourhood;
use self::pace::{GuestRequests, Pace};
use self::task::{Task, Units};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::{
    FRAGMENT_BYTES_MAX, JOB_GIVES_WAY, JOBS_MAX, NEIGHBOURHOOD_BYTES, REPLICAS_MAX, SECTOR_BYTES,
};
use crate::quorum::health::Health;

/// The sizes of the work of jobs.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// The longest chunk, in sectors.
    pub chunk_sectors: u64,
    /// Sectors that are scrubbed on either side of corruption that a read finds; 0 turns it off.
    pub neighbourhood_sectors: u64,
    /// Of questions for holes.
    pub holes: HoleSizes,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            chunk_sectors: FRAGMENT_BYTES_MAX / SECTOR_BYTES,
            neighbourhood_sectors: NEIGHBOURHOOD_BYTES / SECTOR_BYTES,
            holes: HoleSizes::default(),
        }
    }
}

/// The jobs of a disk.
#[derive(Debug)]
pub struct Jobs {
    jobs: VecDeque<Job>,
    next_id: u32,
    next_chunk: u64,
    pace: Pace,
    sizes: Sizes,
    block_sectors: u64,
    /// The first delay before a failed resync starts again.
    retry_after: Duration,
    capacity_sectors: u64,
    /// Replicas whose resync was cancelled: none starts by itself.
    held: ReplicaSet,
    /// When a resync of each replica may start by itself.
    retries: [Retry; REPLICAS_MAX],
    neighbourhood: Neighbourhood,
    /// What the last scrub has found.
    found: RangeSet,
    events: Vec<JobEvent>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Retry {
    not_before: Duration,
    delay: Duration,
    /// [`Health::arrivals`] when the last one failed.
    arrivals: u64,
}

impl Retry {
    /// Whether the time has come, or a replica has arrived without which it failed.
    fn is_due(&self, now: Duration, health: &Health) -> bool {
        self.not_before <= now || self.arrivals != health.arrivals()
    }
}

/// Each failed resync doubles the delay before the next one, up to this many times the first delay.
const RETRY_FACTOR_MAX: u32 = 32;

impl Jobs {
    /// No jobs, on a disk of `capacity_sectors`.
    pub fn new(capacity_sectors: u64) -> Self {
        Self {
            jobs: VecDeque::new(),
            next_id: 0,
            next_chunk: 0,
            pace: Pace::default(),
            sizes: Sizes::default(),
            block_sectors: 1,
            retry_after: Duration::from_secs(1),
            capacity_sectors,
            held: ReplicaSet::EMPTY,
            retries: Default::default(),
            neighbourhood: Neighbourhood::new(capacity_sectors),
            found: RangeSet::default(),
            events: Vec::new(),
        }
    }

    /// Sets the unit in which the replicas can be written, the sizes of the work, and the first
    /// delay before a failed resync starts again.
    pub fn configure(&mut self, block_sectors: u64, sizes: Sizes, retry_after: Duration) {
        assert!(block_sectors > 0 && sizes.chunk_sectors >= block_sectors);
        self.block_sectors = block_sectors;
        self.sizes = sizes;
        self.retry_after = retry_after;
    }

    /// Sets the new size of the disk. A running scrub still ends at the old end: the new part is
    /// zeroes on every replica, or was written since.
    pub fn grow(&mut self, capacity_sectors: u64) {
        assert!(
            capacity_sectors >= self.capacity_sectors,
            "a disk only grows"
        );
        self.capacity_sectors = capacity_sectors;
        self.neighbourhood.grow(capacity_sectors);
    }

    /// Whether there is no job, and no scrub to start around corruption.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.neighbourhood.is_empty()
    }

    /// All jobs, in no particular order: they take turns.
    pub fn list(&self, health: &Health) -> Vec<JobInfo> {
        self.jobs.iter().map(|job| job.info(health)).collect()
    }

    /// Takes the events since the last time, in order.
    pub fn take_events(&mut self) -> std::vec::Drain<'_, JobEvent> {
        self.events.drain(..)
    }

    /// Starts a resync of `replica`.
    ///
    /// # Errors
    /// If it has one already, is not a replica of the disk, or there are too many jobs.
    pub fn resync(
        &mut self,
        replica: ReplicaIndex,
        speed_bytes: u64,
        health: &Health,
    ) -> Result<JobId, NotStarted> {
        if !health.members().contains(replica) {
            return Err(NotStarted::NotAReplica);
        }
        if let Some(id) = self.resync_of(replica) {
            // It may have started by itself, and then would not be durable at its end.
            if let Ok(job) = find(&mut self.jobs, id) {
                job.persist();
            }
            return Err(NotStarted::InResync(id));
        }
        self.held.remove(replica);
        self.start(Task::resync(replica, health), speed_bytes, true, health)
    }

    /// Starts a scrub of the whole disk.
    ///
    /// # Errors
    /// If there are too many jobs.
    pub fn scrub(
        &mut self,
        repair: bool,
        speed_bytes: u64,
        health: &Health,
    ) -> Result<JobId, NotStarted> {
        self.start(
            Task::scrub(repair, self.capacity_sectors),
            speed_bytes,
            true,
            health,
        )
    }

    /// Starts a job in which `replica` decides where no vote has a winner: in the blocks of what
    /// was `undecided` a moment ago (W12).
    ///
    /// # Errors
    /// If it is not a replica of the disk, or there are too many jobs.
    pub fn prefer(
        &mut self,
        replica: ReplicaIndex,
        undecided: RangeSet,
        speed_bytes: u64,
        health: &Health,
    ) -> Result<JobId, NotStarted> {
        if !health.members().contains(replica) {
            return Err(NotStarted::NotAReplica);
        }
        self.start(Task::prefer(replica, undecided), speed_bytes, true, health)
    }

    /// Starts the recovery of what is unrecovered (S5).
    ///
    /// # Errors
    /// If there are too many jobs.
    pub fn recover(&mut self, health: &Health) -> Result<JobId, NotStarted> {
        self.start(Task::recover(), 0, true, health)
    }

    /// Pauses a job: it starts no chunk until it is resumed.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn pause(&mut self, id: JobId, health: &Health) -> Result<(), UnknownJob> {
        let job = find(&mut self.jobs, id)?;
        if job.status() == JobStatus::Running {
            job.set_status(JobStatus::Paused, health, &mut self.events);
        }
        Ok(())
    }

    /// Resumes a job.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn resume(&mut self, id: JobId, health: &Health) -> Result<(), UnknownJob> {
        let job = find(&mut self.jobs, id)?;
        if job.status() == JobStatus::Paused {
            job.set_status(JobStatus::Running, health, &mut self.events);
        }
        Ok(())
    }

    /// Cancels a job: it ends when its chunks in flight have ended. The replica of a cancelled
    /// resync stays stale where it was not written to, until another resync is requested.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn cancel(&mut self, id: JobId, health: &Health) -> Result<(), UnknownJob> {
        let job = find(&mut self.jobs, id)?;
        if job.status() == JobStatus::Aborting {
            return Ok(());
        }
        if let JobKind::Resync(replica) = job.kind() {
            self.held.insert(replica);
        }
        job.set_status(JobStatus::Aborting, health, &mut self.events);
        self.conclude(health, Duration::ZERO);
        Ok(())
    }

    /// Sets the speed limit in bytes a second; 0: as fast as the guest's load allows.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn set_speed(&mut self, id: JobId, speed_bytes: u64) -> Result<(), UnknownJob> {
        find(&mut self.jobs, id)?.set_speed(speed_bytes);
        Ok(())
    }

    /// Ends the jobs of a replica that was removed from the disk.
    pub fn removed(&mut self, replica: ReplicaIndex, health: &Health) {
        self.held.remove(replica);
        self.retries[replica.as_usize()] = Retry::default();
        for job in &mut self.jobs {
            if job.kind().replica() == Some(replica) && job.status() != JobStatus::Aborting {
                job.fail(JobFailure::Removed);
            }
        }
        self.conclude(health, Duration::ZERO);
    }

    /// A confirmed read found a replica corrupt in `range`. Returns whether its surroundings are to
    /// be scrubbed: then the caller wakes the worker that runs the jobs.
    pub fn corruption_found(&mut self, range: SectorRange) -> bool {
        self.sizes.neighbourhood_sectors > 0 && self.neighbourhood.add(range)
    }

    /// Reads again, so that it is repaired, what the last scrub has found.
    pub fn repair_found(&mut self, health: &Health) {
        let found = std::mem::take(&mut self.found);
        if !found.is_empty() {
            // If there are too many jobs, reads of the guest find it.
            let _ = self.start(Task::neighbourhood(found), 0, false, health);
        }
    }

    /// The guest waits for a replica longer than it should, or does not any more (W6). Then jobs
    /// only go on so that they end at all.
    pub fn guest_waits(&mut self, waits: bool) {
        self.pace.give_way(if waits {
            self.retry_after * JOB_GIVES_WAY
        } else {
            Duration::ZERO
        });
    }

    /// The number of chunks that have begun.
    #[cfg(any(test, feature = "sim"))]
    pub fn chunks_begun(&self) -> u64 {
        self.next_chunk
    }

    /// The next chunk of work, or when there may be one. `guest` counts the guest's requests so
    /// far.
    pub fn next(&mut self, now: Duration, guest: GuestRequests, health: &Health) -> Next {
        self.pace.observe(now, guest);
        self.start_due(now, health);
        self.conclude(health, now);
        let retry = self.next_retry(now, health);
        // In turn, but a recovery and the surroundings of corruption first.
        let surroundings = |job: &Job| job.kind() == JobKind::NeighbourhoodScrub;
        let has_priority = |job: &Job| job.has_priority(now);
        let orders: [&dyn Fn(&Job) -> bool; 2] = [&surroundings, &has_priority];
        for is_first in orders {
            if let Some(turn) = self.jobs.iter().position(is_first) {
                self.jobs.swap(0, turn);
            }
        }
        let gives_way = self.pace.gives_way_until();
        if gives_way > now {
            return Next::At(gives_way);
        }
        let (mut first, mut at) = (None, retry);
        for (index, job) in self.jobs.iter().enumerate() {
            match job.ready_at(now, &self.pace, health) {
                Some(ready) if ready <= now => {
                    first = Some(index);
                    break;
                }
                Some(ready) => at = Some(at.map_or(ready, |at: Duration| at.min(ready))),
                None => {}
            }
        }
        let Some(index) = first else {
            return at.map_or(Next::Nothing, Next::At);
        };
        let mut job = self.jobs.remove(index).expect("its index was just found");
        let id = ChunkId(self.next_chunk);
        let most = self
            .pace
            .chunk_sectors(self.sizes.chunk_sectors, self.block_sectors);
        let units = Units {
            most,
            block_sectors: self.block_sectors,
            holes: self.sizes.holes,
        };
        let work = job.next_chunk(id, now, units, self.retry_after, health);
        self.jobs.push_back(job);
        match work {
            Some(work) => {
                self.next_chunk += 1;
                self.pace.began(now, guest);
                Next::Chunk(Chunk { id, work })
            }
            // A pass of a resync ended: ask again.
            None => self.next(now, guest, health),
        }
    }

    /// Takes the result of a chunk.
    pub fn ended(
        &mut self,
        now: Duration,
        guest: GuestRequests,
        id: ChunkId,
        end: &ChunkEnd,
        health: &Health,
    ) {
        let holder = self
            .jobs
            .iter_mut()
            .find_map(|job| Some((job.ended(id, end, (now, &self.sizes.holes), health)?, job)));
        let (chunk, job) = holder.expect("a chunk in flight ends once");
        self.pace
            .ended(now, guest, chunk.began, chunk.range.is_some());
        if job.kind() == JobKind::NeighbourhoodScrub
            && let Some(range) = chunk.range
        {
            self.neighbourhood.scrubbed(range, now);
        }
        self.conclude(health, now);
    }

    fn resync_of(&self, replica: ReplicaIndex) -> Option<JobId> {
        let resync = self
            .jobs
            .iter()
            .find(|job| job.kind() == JobKind::Resync(replica));
        resync.map(Job::id)
    }

    fn start(
        &mut self,
        task: Task,
        speed_bytes: u64,
        persists: bool,
        health: &Health,
    ) -> Result<JobId, NotStarted> {
        if self.jobs.len() >= JOBS_MAX {
            return Err(NotStarted::TooMany);
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        let mut job = Job::new(id, task, speed_bytes, persists);
        job.push_event(JobChange::Status, health, &mut self.events);
        job.set_status(JobStatus::Running, health, &mut self.events);
        self.jobs.push_back(job);
        Ok(id)
    }

    /// Starts the resyncs of stale replicas and the scrub around corruption.
    fn start_due(&mut self, now: Duration, health: &Health) {
        for replica in self.unattended(health).iter() {
            if self.retries[replica.as_usize()].is_due(now, health) {
                // If there are too many jobs it starts when another one has ended.
                let _ = self.start(Task::resync(replica, health), 0, false, health);
            }
        }
        for corrupt in self.neighbourhood.take(now) {
            self.scrub_around(corrupt, health);
        }
    }

    /// Scrubs the surroundings of `corrupt`, in the job that scrubs others already, if there is
    /// one.
    fn scrub_around(&mut self, corrupt: SectorRange, health: &Health) {
        let reach_sectors = self.sizes.neighbourhood_sectors;
        let around = self
            .neighbourhood
            .around(corrupt, reach_sectors, self.block_sectors);
        let running = self.jobs.iter_mut().find(|job| job.accepts_ranges());
        if let Some(job) = running {
            return job.add(&around);
        }
        if !around.is_empty() {
            let _ = self.start(Task::neighbourhood(around), 0, false, health);
        }
    }

    /// The stale replicas in service that have no resync and may get one.
    fn unattended(&self, health: &Health) -> ReplicaSet {
        let stale = health.stale().and(health.in_service()).without(self.held);
        stale
            .iter()
            .filter(|replica| self.resync_of(*replica).is_none())
            .collect()
    }

    fn next_retry(&self, now: Duration, health: &Health) -> Option<Duration> {
        let retries = self.unattended(health);
        let retries = retries
            .iter()
            .map(|replica| self.retries[replica.as_usize()]);
        let at = retries.map(|retry| match retry.is_due(now, health) {
            true => now,
            false => retry.not_before,
        });
        at.min()
    }

    /// Ends the jobs that are done or have failed.
    fn conclude(&mut self, health: &Health, now: Duration) {
        let (events, found) = (&mut self.events, &mut self.found);
        let (retries, retry_after) = (&mut self.retries, self.retry_after);
        self.jobs.retain_mut(|job| {
            if !job.has_ended(health) {
                return true;
            }
            if let JobKind::Resync(replica) = job.kind() {
                let retry = &mut retries[replica.as_usize()];
                if job.has_failed() {
                    let longest = retry_after.saturating_mul(RETRY_FACTOR_MAX);
                    retry.delay = (retry.delay * 2).clamp(retry_after, longest);
                    retry.not_before = now + retry.delay;
                    retry.arrivals = health.arrivals();
                } else {
                    *retry = Retry::default();
                }
            }
            if matches!(job.kind(), JobKind::Scrub { .. }) {
                *found = job.faults();
            }
            job.conclude(health, events);
            false
        });
    }
}

fn find(jobs: &mut VecDeque<Job>, id: JobId) -> Result<&mut Job, UnknownJob> {
    jobs.iter_mut().find(|job| job.id() == id).ok_or(UnknownJob)
}

#[cfg(test)]
mod tests;
