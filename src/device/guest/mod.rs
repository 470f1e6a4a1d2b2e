//! The virtqueues of one worker: accepts requests, cuts them into fragments, and answers them.
//!
//! A request longer than [`FRAGMENT_BYTES_MAX`](crate::limits::FRAGMENT_BYTES_MAX) is served in
//! fragments, so that the length of a chain never decides how much memory the daemon needs. Once a
//! fragment has failed, no further one is submitted.
//!
//! A process that was killed may have done its writes on some replicas and not on others. All
//! virtqueues submit those writes again first, then what else was in flight, then what is new: a
//! read that finds the replicas different waits for the write, and accuses no replica.
//!
//! Invariant: every accepted chain is completed once, or left in the inflight region for the next
//! start (`in_flight`).

mod held;
mod in_flight;
mod rejections;
mod virtqueue;

use std::collections::VecDeque;

use log::warn;
use slab::Slab;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

pub use self::held::Holder;
use self::in_flight::{AcceptedChain, FragmentEnd, InFlight, Stage};
use self::rejections::Rejections;
use self::virtqueue::Virtqueue;
use super::inflight::QueueRegion;
use super::request::{Kind, OutsideMemory, Request, Status};
use super::{DiskInfo, GuestMemory, View, Vring};
use crate::common::buffer::BufferPool;
use crate::common::clock::TurnClock;
use crate::engine::{Failed, FragmentId, GuestRequest, Mark};
use crate::limits::QUEUE_SIZE_MAX;
use crate::statistics::Recorder;

/// The guest as one worker sees it.
pub struct Guest {
    info: DiskInfo,
    memory: GuestMemoryAtomic<GuestMemory>,
    pool: BufferPool,
    queues: Vec<Virtqueue>,
    /// Where to look for the next chain, so that no virtqueue starves another.
    next_queue: usize,
    entries: Slab<Entry>,
    /// The requests in [`Stage::Submitting`], in the order in which they go on.
    submitting: VecDeque<usize>,
    /// The driver cannot flush: every write must be durable when it is answered.
    durable_writes: bool,
    recorder: Recorder,
    rejections: Rejections,
    clock: TurnClock,
    holder: Holder,
}

/// What a tag of the engine names.
enum Entry {
    InFlight(InFlight),
    /// The chain is completed or left to the next start, but the engine still has fragments of it.
    /// Their answers are dropped.
    Abandoned {
        outstanding: usize,
    },
}

impl Guest {
    /// The guest behind `vrings`, none of them active yet.
    pub fn new(
        info: DiskInfo,
        memory: GuestMemoryAtomic<GuestMemory>,
        vrings: Vec<Vring>,
        pool: BufferPool,
    ) -> Self {
        let queues = vrings.into_iter().enumerate();
        Self {
            info,
            memory,
            pool,
            queues: queues
                .map(|(index, vring)| Virtqueue::new(index, vring))
                .collect(),
            next_queue: 0,
            entries: Slab::new(),
            submitting: VecDeque::new(),
            durable_writes: false,
            recorder: Recorder::detached(),
            rejections: Rejections::default(),
            clock: TurnClock::default(),
            holder: Holder::default(),
        }
    }

    /// Counts requests in `recorder` from now on.
    pub fn set_recorder(&mut self, recorder: Recorder) {
        self.recorder = recorder;
    }

    /// Reads the time from `clock` from now on: the device has no clock of its own.
    pub fn set_clock(&mut self, clock: TurnClock) {
        self.clock = clock;
    }

    /// Sets where the chains of a virtqueue are tracked, from its next start on.
    pub fn set_region(&mut self, queue: usize, region: Option<QueueRegion>) {
        self.queues[queue].set_region(region);
    }

    /// Serves a virtqueue according to the state that the frontend gave to it. Returns whether new
    /// chains are accepted from now on.
    pub fn refresh(&mut self, index: usize, durable_writes: bool) -> bool {
        self.durable_writes = durable_writes;
        let memory = self.memory.memory();
        let memory = View(&memory);
        let startable = self.queues[index].is_startable(memory);
        if startable && !self.queues[index].is_active() {
            self.start(index, memory);
        }
        let queue = &mut self.queues[index];
        if !startable || !queue.is_active() {
            queue.stop();
            self.give_up_held(index);
            return false;
        }
        // The driver of a virtqueue that runs already may have been asked not to kick.
        queue.renew_kicks();
        true
    }

    /// Starts a virtqueue where the frontend says, or where its region says.
    fn start(&mut self, queue: usize, memory: View<'_>) {
        let Some(region) = self.queues[queue].region().cloned() else {
            self.queues[queue].start_untracked();
            return;
        };
        // A virtqueue that its driver broke may have chains in flight. They are in the region; if
        // that is another one now, no start would resubmit them, so they fail.
        if self.queues[queue].changes_region() {
            for key in self.take_in_flight(queue) {
                self.complete(key, Status::IoError);
            }
        }
        self.abandon(queue);
        self.queues[queue].start_tracked(region, memory, self.clock.now());
    }

    /// Abandons what is in flight on a virtqueue: later answers are dropped, and guest memory is
    /// not touched for it any more. With a region it stays in flight there and the next start
    /// resubmits it; without one it fails.
    pub fn abandon(&mut self, queue: usize) {
        let keys = self.take_in_flight(queue);
        if keys.is_empty() {
            return;
        }
        let tracked = self.queues[queue].is_tracked();
        let (count, fate) = (keys.len(), if tracked { "resubmit" } else { "fail" });
        warn!(count, fate; "replicas have not answered requests in time");
        self.give_up(queue, keys);
        assert!(self.is_drained(queue));
    }

    /// Leaves requests of a virtqueue to its next start if it has a region; else they fail.
    fn give_up(&mut self, queue: usize, keys: Vec<usize>) {
        let tracked = self.queues[queue].is_tracked();
        for key in keys {
            if tracked {
                self.leave(key);
            } else {
                self.complete(key, Status::IoError);
            }
        }
    }

    /// The requests in flight on a virtqueue, of which no more fragments are submitted.
    fn take_in_flight(&mut self, queue: usize) -> Vec<usize> {
        let of_queue = |entry: &Entry| match entry {
            Entry::InFlight(in_flight) => in_flight.queue() == queue,
            Entry::Abandoned { .. } => false,
        };
        let entries = self.entries.iter().filter(|(_, entry)| of_queue(entry));
        let keys: Vec<usize> = entries.map(|(key, _)| key).collect();
        assert_eq!(keys.len(), self.queues[queue].in_flight());
        self.submitting.retain(|key| !keys.contains(key));
        keys
    }

    /// Whether chains are accepted from a virtqueue: it was started, and neither stopped nor broken
    /// by its driver since.
    pub fn is_served(&self, queue: usize) -> bool {
        self.queues[queue].is_active()
    }

    /// Whether every chain accepted from a virtqueue was completed, or abandoned.
    pub fn is_drained(&self, queue: usize) -> bool {
        self.queues[queue].in_flight() == 0
    }

    /// Whether nothing is to do for any virtqueue until the next [`Guest::refresh`].
    pub fn is_idle(&self) -> bool {
        self.queues.iter().all(Virtqueue::is_idle)
    }

    /// Whether a virtqueue waits until others have submitted again what was in flight there. No
    /// event comes when they have, so the worker has to poll.
    pub fn awaits_resubmission(&self) -> bool {
        self.queues.iter().any(Virtqueue::is_resubmitting)
    }

    /// The next fragment for the engine, if any: of a request in flight, or of a new one.
    pub fn next_request(&mut self) -> Option<(FragmentId, GuestRequest)> {
        // Bounded: a driver that goes on adding requests which are rejected must not keep the
        // worker here.
        for _ in 0..QUEUE_SIZE_MAX {
            if let Some(&key) = self.submitting.front() {
                match self.next_fragment(key) {
                    Some(fragment) => return Some(fragment),
                    None => continue,
                }
            }
            if !self.accept() {
                return None;
            }
        }
        None
    }

    /// Whether [`Self::next_request`] may have a fragment, without looking at chains.
    pub fn has_more(&self) -> bool {
        let memory = self.memory.memory();
        let mut queues = self.queues.iter();
        !self.submitting.is_empty() || queues.any(|queue| queue.has_available(View(&memory)))
    }

    /// Takes the engine's answer to a fragment. Returns whether it is held (W9).
    pub fn answered(&mut self, fragment: FragmentId, result: Result<&[u8], Failed>) -> bool {
        self.ended(fragment, result, None)
    }

    /// The same for a write that is durable now, and was `written` before.
    pub fn flushed(&mut self, fragment: FragmentId, written: Mark) -> bool {
        self.ended(fragment, Ok(&[]), Some(written))
    }

    fn ended(
        &mut self,
        fragment: FragmentId,
        result: Result<&[u8], Failed>,
        written: Option<Mark>,
    ) -> bool {
        let (key, offset_sectors) = place(fragment);
        let in_flight = match &mut self.entries[key] {
            Entry::InFlight(in_flight) => in_flight,
            Entry::Abandoned { outstanding } => {
                *outstanding -= 1;
                if *outstanding == 0 {
                    self.entries.remove(key);
                }
                return false;
            }
        };
        let before = in_flight.stage();
        let end = match result {
            Ok(data) if !self.holder.is_holding() => FragmentEnd::Done(data),
            result => self.holder.ended(in_flight, fragment, result, written),
        };
        let is_held = matches!(end, FragmentEnd::Held(_));
        in_flight.fragment_answered(View(&self.memory.memory()), offset_sectors, end);
        if in_flight.stage() == Stage::Failed {
            self.holder.forget(in_flight);
        }
        let (status, queue) = (in_flight.status(), in_flight.queue());
        match (before, in_flight.stage()) {
            (Stage::Submitting, Stage::Failed) => self.submitting.retain(|other| *other != key),
            (Stage::Parked, Stage::Submitting) => self.submitting.push_back(key),
            _ => {}
        }
        if let Some(status) = status {
            self.complete(key, status);
        } else if self.holder.is_holding() && !self.queues[queue].is_active() {
            self.give_up_held(queue);
        }
        is_held
    }

    /// Notifies drivers of what was completed since the last call, where they want that.
    pub fn signal(&mut self) {
        let memory = self.memory.memory();
        for queue in &mut self.queues {
            queue.signal(View(&memory));
        }
    }

    /// Asks drivers to kick from now on. Returns whether chains were made available meanwhile, for
    /// which no kick comes.
    pub fn enable_kicks(&mut self) -> bool {
        let memory = self.memory.memory();
        let mut more = false;
        for queue in &mut self.queues {
            more |= queue.enable_kicks(View(&memory));
        }
        more
    }

    /// Lets virtqueues accept new chains when the engine has all writes of the last process. What
    /// is not parked is with the engine by now, as no request is in [`Stage::Submitting`].
    fn end_resubmission(&mut self) {
        let is_parked = |entry: &Entry| match entry {
            Entry::InFlight(in_flight) => in_flight.stage() == Stage::Parked,
            Entry::Abandoned { .. } => false,
        };
        if self.awaits_resubmission() && !self.entries.iter().any(|(_, entry)| is_parked(entry)) {
            let queues = self.queues.iter_mut();
            let now = self.clock.now();
            queues.for_each(|queue| queue.end_resubmission(now));
        }
    }

    /// Accepts one chain. `false` if there is none.
    fn accept(&mut self) -> bool {
        self.end_resubmission();
        let memory = self.memory.memory();
        // What another process began comes first.
        let first = self.queues.iter().position(Virtqueue::has_resubmissions);
        let (count, next) = (self.queues.len(), self.next_queue);
        let in_turn = (0..count).map(|step| (next + step) % count);
        for index in first.into_iter().chain(in_turn) {
            if let Some((chain, request)) = self.queues[index].accept(View(&memory), &self.info) {
                self.next_queue = (index + 1) % count;
                self.begin(chain, request, View(&memory));
                return true;
            }
        }
        false
    }

    /// Answers a request that needs no replica, lets the others submit their fragments.
    fn begin(&mut self, chain: AcceptedChain, request: Request, memory: View<'_>) {
        let kind = request.counts_as();
        let counted = kind.map(|kind| (kind, self.recorder.request_begun(kind)));
        if let Kind::Rejected(status) = request.kind {
            self.recorder.request_rejected();
            self.rejections.note(status, self.clock.now());
        }
        let in_flight = InFlight::new(chain, request, counted);
        let at_once = in_flight.answer_at_once(memory, &self.info.serial);
        let key = self.entries.insert(Entry::InFlight(in_flight));
        match at_once {
            Some(status) => self.complete(key, status),
            None => self.submitting.push_back(key),
        }
    }

    /// The next fragment of the request at the front of `submitting`. `None` if the request has
    /// failed.
    fn next_fragment(&mut self, key: usize) -> Option<(FragmentId, GuestRequest)> {
        let Entry::InFlight(in_flight) = &mut self.entries[key] else {
            unreachable!("an abandoned request submits nothing");
        };
        let memory = self.memory.memory();
        let fragment = in_flight.next_fragment(View(&memory), &mut self.pool, self.durable_writes);
        if in_flight.stage() != Stage::Submitting {
            self.submitting.pop_front();
        }
        match fragment {
            Ok((offset_sectors, request)) => Some((fragment_id(key, offset_sectors), request)),
            Err(OutsideMemory) => {
                self.holder.forget(in_flight);
                if let Some(status) = in_flight.status() {
                    self.complete(key, status);
                }
                None
            }
        }
    }

    /// Answers a request and puts its chain on the used ring.
    fn complete(&mut self, key: usize, status: Status) {
        let in_flight = self.end(key);
        if let Some((kind, since)) = in_flight.counted() {
            let success = status == Status::Ok;
            self.recorder
                .request_ended(kind, in_flight.extent(), since, success);
        }
        let queue = in_flight.queue();
        let memory = self.memory.memory();
        let finished = in_flight.finish(View(&memory), status);
        self.queues[queue].complete(finished, View(&memory));
    }

    /// Leaves a request to the next start of its virtqueue.
    fn leave(&mut self, key: usize) {
        let in_flight = self.end(key);
        if let Some((kind, _)) = in_flight.counted() {
            self.recorder.request_abandoned(kind);
        }
        let queue = in_flight.queue();
        self.queues[queue].leave(in_flight.leave());
    }

    /// Takes a request out of the table. Its key stays in use as long as the engine has fragments.
    fn end(&mut self, key: usize) -> InFlight {
        let outstanding = match &mut self.entries[key] {
            Entry::InFlight(in_flight) => {
                self.holder.forget(in_flight);
                in_flight.outstanding()
            }
            Entry::Abandoned { .. } => unreachable!("a request ends once"),
        };
        let entry = match outstanding {
            0 => self.entries.remove(key),
            _ => std::mem::replace(&mut self.entries[key], Entry::Abandoned { outstanding }),
        };
        match entry {
            Entry::InFlight(in_flight) => in_flight,
            Entry::Abandoned { .. } => unreachable!("it was in flight just now"),
        }
    }
}

#[cfg(test)]
impl Guest {
    /// Asserts what the counts and queues say of each other, the slow way.
    pub(super) fn self_check(&self) {
        let in_flight = |entry: &'_ Entry| match entry {
            Entry::InFlight(in_flight) => Some((in_flight.queue(), in_flight.stage())),
            Entry::Abandoned { outstanding } => {
                assert!(*outstanding > 0, "an entry without fragments is forgotten");
                None
            }
        };
        let stages = self.entries.iter();
        let stages: Vec<_> = stages
            .filter_map(|(key, entry)| Some((key, in_flight(entry)?)))
            .collect();
        for (index, queue) in self.queues.iter().enumerate() {
            let of_queue = stages.iter().filter(|(_, (queue, _))| *queue == index);
            assert_eq!(of_queue.count(), queue.in_flight());
        }
        let submitting = stages
            .iter()
            .filter(|(_, (_, stage))| *stage == Stage::Submitting);
        let mut expected: Vec<usize> = submitting.map(|(key, _)| *key).collect();
        let mut queued: Vec<usize> = self.submitting.iter().copied().collect();
        expected.sort_unstable();
        queued.sort_unstable();
        assert_eq!(queued, expected);
    }
}

impl Drop for Guest {
    /// The process ends. What is in flight stays so in the region, if there is one.
    fn drop(&mut self) {
        for entry in self.entries.drain() {
            if let Entry::InFlight(in_flight) = entry {
                in_flight.leave().leave();
            }
        }
    }
}

/// The name of the fragment that begins `offset_sectors` into the request of entry `key`.
fn fragment_id(key: usize, offset_sectors: u64) -> FragmentId {
    FragmentId {
        chain: u32::try_from(key).expect("at most as many chains as entries of virtqueues"),
        offset_sectors: u32::try_from(offset_sectors).expect("a chain is below 4 GiB"),
    }
}

fn place(fragment: FragmentId) -> (usize, u64) {
    (fragment.chain as usize, u64::from(fragment.offset_sectors))
}
