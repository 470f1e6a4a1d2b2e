//! Work that no guest asked for: bringing a replica up to date (*resync*) and looking for damage
//! (*scrub*).
//!
//! Sans-IO like the engine. [`Jobs`] is asked for the next chunk of work, which the engine of one
//! worker does like a guest's request, and told how it ended. It decides what is due (`job`) and
//! how fast that goes (`pace`); it knows of replicas only what [`Health`] says, and of the guest
//! only how many requests it makes.
//!
//! ```text
//! created ─► running ◄─► paused                     each change of the status is told as an event
//!               │ done, or not to be helped   │
//!               ▼                             ▼ cancelled
//!           concluded ◄──────────────── aborting    when the last chunk is back
//!               ▼
//!             null                                  it is forgotten
//! ```
//!
//! A replica that has become stale gets a resync by itself, unless its last one was cancelled: then
//! somebody has to ask for one.
//!
//! Invariants: a replica has at most one resync; a job without chunks in flight that is not paused
//! is either waiting for a moment that [`Jobs::next`] has named, or for a replica that is out of
//! service, which tells when it is back.

#![forbid(unsafe_code)]

mod chunk;
mod info;
mod job;
pub mod pace;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::chunk::{Chunk, ChunkEnd, ChunkId, Next, Work};
pub use self::info::{
    JobChange, JobEvent, JobFailure, JobId, JobInfo, JobKind, JobStatus, NotBegun, UnknownJob,
};
use self::job::{Job, Task};
use self::pace::{GuestRequests, Pace};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::{
    FRAGMENT_BYTES_MAX, JOBS_MAX, NEIGHBOURHOOD_BYTES, NEIGHBOURHOOD_REST, SECTOR_BYTES,
};
use crate::quorum::health::Health;

/// The sizes by which jobs go.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// The longest chunk, in sectors.
    pub chunk_sectors: u64,
    /// How far around damage is scrubbed, in sectors; 0: not at all.
    pub neighbourhood_sectors: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            chunk_sectors: FRAGMENT_BYTES_MAX / SECTOR_BYTES,
            neighbourhood_sectors: NEIGHBOURHOOD_BYTES / SECTOR_BYTES,
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
    /// After so long what did not work is tried again.
    retry_after: Duration,
    capacity_sectors: u64,
    /// Their resync was cancelled: no other one begins by itself.
    held: ReplicaSet,
    /// When a resync of each replica may begin by itself, if the last one was in vain.
    retries: [Retry; crate::limits::REPLICAS_MAX],
    /// What was scrubbed near to damage lately, and until when that counts.
    near: RangeSet,
    near_until: Duration,
    /// Damage that was found, to be scrubbed around.
    damage: Vec<SectorRange>,
    events: Vec<JobEvent>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Retry {
    not_before: Duration,
    delay: Duration,
}

/// A resync that was in vain is repeated after twice the time, up to this often doubled.
const RETRY_FACTOR_MAX: u32 = 32;

impl Jobs {
    /// None yet, on a disk of `capacity_sectors`.
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
            near: RangeSet::below(capacity_sectors),
            near_until: Duration::ZERO,
            damage: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Tells how the disk decides: the unit in which it can be written, the sizes of chunks, and
    /// after how long something may be tried again.
    pub fn configure(&mut self, block_sectors: u64, sizes: Sizes, retry_after: Duration) {
        self.block_sectors = block_sectors;
        self.sizes = sizes;
        self.retry_after = retry_after;
    }

    /// The disk has so many sectors now. A scrub of the whole disk that has begun still ends where
    /// the disk ended then: what is new is zeroes on every replica, or was written since.
    pub fn grow(&mut self, capacity_sectors: u64) {
        self.capacity_sectors = capacity_sectors;
        self.near.grow(capacity_sectors);
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.damage.is_empty()
    }

    /// All jobs, oldest first.
    pub fn list(&self, health: &Health) -> Vec<JobInfo> {
        self.jobs.iter().map(|job| job.info(health)).collect()
    }

    /// Takes what there is to tell since the last time, in order.
    pub fn take_events(&mut self) -> std::vec::Drain<'_, JobEvent> {
        self.events.drain(..)
    }

    /// Begins to bring `replica` up to date.
    ///
    /// # Errors
    /// If that is being done, or cannot be.
    pub fn resync(
        &mut self,
        replica: ReplicaIndex,
        speed_bytes: u64,
        health: &Health,
    ) -> Result<JobId, NotBegun> {
        if !health.members().contains(replica) {
            return Err(NotBegun::NoMember);
        }
        if let Some(id) = self.resync_of(replica) {
            // It may have begun by itself.
            if let Ok(job) = find(&mut self.jobs, id) {
                job.persist();
            }
            return Err(NotBegun::InResync(id));
        }
        self.held.remove(replica);
        self.begin(Task::resync(replica), speed_bytes, true, health)
    }

    /// Begins to scrub the whole disk.
    ///
    /// # Errors
    /// If there are too many jobs.
    pub fn scrub(
        &mut self,
        repair: bool,
        speed_bytes: u64,
        health: &Health,
    ) -> Result<JobId, NotBegun> {
        self.begin(
            Task::scrub(repair, self.capacity_sectors),
            speed_bytes,
            true,
            health,
        )
    }

    /// The job begins nothing until it is resumed.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn pause(&mut self, id: JobId, health: &Health) -> Result<(), UnknownJob> {
        let job = find(&mut self.jobs, id)?;
        if job.status() == JobStatus::Running {
            job.set_status(JobStatus::Paused, health, &mut self.events);
        }
        Ok(())
    }

    /// The job goes on.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn resume(&mut self, id: JobId, health: &Health) -> Result<(), UnknownJob> {
        let job = find(&mut self.jobs, id)?;
        if job.status() == JobStatus::Paused {
            job.set_status(JobStatus::Running, health, &mut self.events);
        }
        Ok(())
    }

    /// The job ends when what is in flight of it is back. The replica of a cancelled resync stays
    /// as it is, stale where it has not been written to, until another resync is asked for.
    ///
    /// # Errors
    /// If there is none of that name.
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

    /// Bytes a second at most, from now on; 0: as fast as leaves the guest its share.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn set_speed(&mut self, id: JobId, speed_bytes: u64) -> Result<(), UnknownJob> {
        find(&mut self.jobs, id)?.set_speed(speed_bytes);
        Ok(())
    }

    /// The replica was removed from the disk.
    pub fn removed(&mut self, replica: ReplicaIndex, health: &Health) {
        self.held.remove(replica);
        self.retries[replica.as_usize()] = Retry::default();
        for job in &mut self.jobs {
            if job.kind() == JobKind::Resync(replica) && job.status() != JobStatus::Aborting {
                job.give_up(JobFailure::Removed);
            }
        }
        self.conclude(health, Duration::ZERO);
    }

    /// A read under the lock found these sectors to be bad somewhere. Whether their neighbourhood
    /// is to be looked at; then the worker that does the jobs has to be woken.
    pub fn damaged(&mut self, range: SectorRange) -> bool {
        // As many as a few reads can find; what is near to one of these is looked at in any case.
        let wanted = self.sizes.neighbourhood_sectors > 0 && self.damage.len() < JOBS_MAX;
        if wanted {
            self.damage.push(range);
        }
        wanted
    }

    /// What to do now. `guest` counts the guest's requests so far.
    pub fn next(&mut self, now: Duration, guest: GuestRequests, health: &Health) -> Next {
        self.pace.observe(now, guest);
        self.begin_what_is_due(now, health);
        self.conclude(health, now);
        let retry = self.next_retry(now, health);
        // One after the other, but those near to damage first.
        let turn = self
            .jobs
            .iter()
            .position(|job| job.kind() == JobKind::NeighbourhoodScrub);
        if let Some(turn) = turn {
            self.jobs.swap(0, turn);
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
        let mut job = self.jobs.remove(index).expect("it was just found");
        let id = ChunkId(self.next_chunk);
        self.next_chunk += 1;
        let most = self
            .pace
            .chunk_sectors(self.sizes.chunk_sectors, self.block_sectors);
        let work = job.take(id, now, most, self.block_sectors, self.retry_after, health);
        self.jobs.push_back(job);
        match work {
            Some(work) => {
                self.pace.began(now, guest);
                Next::Chunk(Chunk { id, work })
            }
            // It has come to an end of its list: look again.
            None => self.next(now, guest, health),
        }
    }

    /// A chunk of work has ended.
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
            .find_map(|job| Some((job.ended(id, end)?, job)));
        let Some((chunk, job)) = holder else {
            debug_assert!(false, "a chunk ends once");
            return;
        };
        self.pace.ended(now, guest, chunk.began);
        if job.kind() == JobKind::NeighbourhoodScrub
            && let Some(range) = chunk.range
        {
            self.near.insert(range);
            self.near_until = now + NEIGHBOURHOOD_REST;
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

    fn begin(
        &mut self,
        task: Task,
        speed_bytes: u64,
        persists: bool,
        health: &Health,
    ) -> Result<JobId, NotBegun> {
        if self.jobs.len() >= JOBS_MAX {
            return Err(NotBegun::TooMany);
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        let mut job = Job::new(id, task, speed_bytes, persists);
        job.tell(JobChange::Status, health, &mut self.events);
        job.set_status(JobStatus::Running, health, &mut self.events);
        self.jobs.push_back(job);
        Ok(id)
    }

    /// Begins the resyncs that nobody has to ask for, and the scrub around damage.
    fn begin_what_is_due(&mut self, now: Duration, health: &Health) {
        for replica in self.unattended(health).iter() {
            if self.retries[replica.as_usize()].not_before <= now {
                // At the bound it begins when another one has ended.
                let _ = self.begin(Task::resync(replica), 0, false, health);
            }
        }
        if now >= self.near_until && !self.near.is_empty() {
            self.near = RangeSet::below(self.capacity_sectors);
        }
        for bad in std::mem::take(&mut self.damage) {
            self.look_around(bad, health);
        }
    }

    fn look_around(&mut self, bad: SectorRange, health: &Health) {
        let (reach, block) = (self.sizes.neighbourhood_sectors, self.block_sectors);
        let start = bad.start.saturating_sub(reach);
        let start = start - start % block;
        let end = (bad.end() + reach)
            .next_multiple_of(block)
            .min(self.capacity_sectors);
        let mut around = RangeSet::below(self.capacity_sectors);
        around.insert(SectorRange::new(start, end - start));
        for known in self.near.within(SectorRange::new(start, end - start)) {
            around.remove(known);
        }
        // Itself was read and voted on just now.
        let (inner_start, inner_end) = (
            bad.start.next_multiple_of(block),
            bad.end() - bad.end() % block,
        );
        around.remove(SectorRange::new(
            inner_start,
            inner_end.saturating_sub(inner_start),
        ));
        let running = self.jobs.iter_mut().find(|job| job.takes_neighbours());
        if let Some(job) = running {
            return job.add(&around);
        }
        if !around.is_empty() {
            let _ = self.begin(Task::neighbourhood(around), 0, false, health);
        }
    }

    /// The stale replicas in service that nothing is done about.
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
            .map(|replica| self.retries[replica.as_usize()].not_before);
        retries.min().map(|at| at.max(now))
    }

    /// Ends the jobs that have nothing to do any more.
    fn conclude(&mut self, health: &Health, now: Duration) {
        let events = &mut self.events;
        let (retries, retry_after) = (&mut self.retries, self.retry_after);
        self.jobs.retain_mut(|job| {
            if !job.has_ended(health) {
                return true;
            }
            if let JobKind::Resync(replica) = job.kind() {
                let retry = &mut retries[replica.as_usize()];
                if job.was_in_vain() {
                    let longest = retry_after.saturating_mul(RETRY_FACTOR_MAX);
                    retry.delay = (retry.delay * 2).clamp(retry_after, longest);
                    retry.not_before = now + retry.delay;
                } else {
                    *retry = Retry::default();
                }
            }
            job.conclude(health, events);
            false
        });
    }
}

fn find(jobs: &mut VecDeque<Job>, id: JobId) -> Result<&mut Job, UnknownJob> {
    jobs.iter_mut().find(|job| job.id() == id).ok_or(UnknownJob)
}
