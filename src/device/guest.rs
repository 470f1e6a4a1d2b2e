//! The rings of one worker: takes requests off them, cuts them into pieces, and answers.
//!
//! A request longer than [`FRAGMENT_BYTES_MAX`] is served in pieces, so what the guest asks for in one
//! chain never decides how much memory we need. Once a piece has failed no further one is begun.
//!
//! What a process that was killed has begun may be done on some replicas and not on others. Writes
//! are begun again first, on all rings, then what else was in flight, then what is new: a read that
//! finds the replicas different waits for the write, and accuses nobody.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Instant;

use log::{error, info, warn};
use slab::Slab;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::chain::Chain;
use super::inflight::{Begun, QueueRegion, RingState, Tracker};
use super::request::{Kind, OutsideMemory, Request, Status, Zeroed};
use super::{DiskInfo, GuestMemory, View, Vring, inflight};
use crate::common::buffer::BufferPool;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::engine::{Failed, GuestRequest, Tag};
use crate::limits::{
    FRAGMENT_BYTES_MAX, QUEUE_SIZE_MAX, RESUBMIT_LIMIT, ZERO_BYTES_MAX,
    ZERO_FRAGMENTS_IN_FLIGHT_MAX,
};
use crate::statistics::{Recorder, RequestKind, Since};

const PIECE_SECTORS: u64 = FRAGMENT_BYTES_MAX / SECTOR_BYTES;
const ZERO_PIECE_SECTORS: u64 = ZERO_BYTES_MAX / SECTOR_BYTES;

/// The guest as one worker sees it.
pub struct Guest {
    info: DiskInfo,
    memory: GuestMemoryAtomic<GuestMemory>,
    pool: BufferPool,
    rings: Vec<Ring>,
    /// Where to look for the next request, so that no ring starves another.
    next_ring: usize,
    chains: Slab<Taken>,
    /// Chains of which pieces are still to be begun.
    unfinished: VecDeque<usize>,
    /// The driver cannot flush: every write must be durable when it is answered.
    durable_writes: bool,
    recorder: Recorder,
}

struct Ring {
    vring: Vring,
    /// Started, enabled and with addresses that make sense.
    active: bool,
    /// The driver is told to kick.
    notify: bool,
    /// Something was put on the used ring that the driver may have to be told of.
    used: bool,
    /// Chains taken and not given back.
    taken: usize,
    /// Where chains are tracked from the next start on.
    region: Option<QueueRegion>,
    /// Tracks them since this start.
    tracker: Option<Tracker>,
    /// Chains that another process has taken and not given back. They come before any new one.
    resubmitted: VecDeque<u16>,
    /// Those of them that change nothing. They wait until those that do are begun again on all
    /// rings. By their heads: there may be many, and what a guest makes long must not take
    /// memory meanwhile.
    deferred: VecDeque<u16>,
    /// No new ones are taken yet: what another process began on some ring is not with an engine.
    held: Option<Held>,
}

struct Held {
    region: QueueRegion,
    /// Told that this ring is through with its own.
    told: bool,
    until: Instant,
}

/// Why a ring cannot go on from a region.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Region(#[from] inflight::BeginError),
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
}

/// A chain that was taken off its ring.
struct Taken {
    ring: usize,
    request: Request,
    /// Sectors of the request that were begun.
    begun_sectors: u64,
    /// Pieces begun and not answered.
    outstanding: usize,
    failed: bool,
    /// As what it counts, and since when.
    counted: Option<(RequestKind, Since)>,
    /// Not ours any more; the engine still has pieces of it, whose answers mean nothing.
    abandoned: bool,
}

impl Guest {
    /// The guest behind `vrings`, none of them active yet.
    pub fn new(
        info: DiskInfo,
        memory: GuestMemoryAtomic<GuestMemory>,
        vrings: Vec<Vring>,
        pool: BufferPool,
    ) -> Self {
        let rings = vrings.into_iter().map(|vring| Ring {
            vring,
            active: false,
            notify: true,
            used: false,
            taken: 0,
            region: None,
            tracker: None,
            resubmitted: VecDeque::new(),
            deferred: VecDeque::new(),
            held: None,
        });
        Self {
            info,
            memory,
            pool,
            rings: rings.collect(),
            next_ring: 0,
            chains: Slab::new(),
            unfinished: VecDeque::new(),
            durable_writes: false,
            recorder: Recorder::nobodys(),
        }
    }

    /// Counts requests there from now on.
    pub fn set_recorder(&mut self, recorder: Recorder) {
        self.recorder = recorder;
    }

    /// Where the frontend wants the chains of a ring to be tracked, from its next start on.
    pub fn set_region(&mut self, ring: usize, region: Option<QueueRegion>) {
        self.rings[ring].region = region;
    }

    /// Looks at the state that the frontend gave to a ring; returns whether it is to be served from
    /// now on.
    pub fn refresh(&mut self, ring: usize, durable_writes: bool) -> bool {
        self.durable_writes = durable_writes;
        let memory = self.memory.memory();
        let memory = View(&memory);
        let state = self.rings[ring].vring.get_ref();
        let wanted = state.is_enabled() && state.get_queue().ready() && state.get_kick().is_some();
        let valid = wanted && state.get_queue().is_valid(&memory);
        drop(state);
        if wanted && !valid {
            error!(
                "the frontend started a ring that does not lie within guest memory; it is not served"
            );
        }
        if valid && !self.rings[ring].active {
            self.start(ring, memory);
        }
        let ring = &mut self.rings[ring];
        ring.active &= valid;
        if !ring.active {
            // Tracked as they are, they come back with the next start.
            ring.forget_resubmitted();
            ring.forget_tracker();
            return false;
        }
        // Kicks are asked for in any case: the driver of a ring that runs already may have been
        // told not to.
        ring.notify = false;
        true
    }

    /// Begins to serve a ring: at the place that the frontend says, or at the one that its region
    /// says.
    fn start(&mut self, index: usize, memory: View<'_>) {
        let Some(region) = self.rings[index].region.clone() else {
            self.rings[index].tracker = None;
            self.rings[index].active = true;
            return;
        };
        // Of a ring that its driver broke chains may be out still. They are in the region, like any
        // others; if it is another one than before, nobody would come back to them.
        let tracker = self.rings[index].tracker.as_ref();
        if tracker.is_some_and(|tracker| !tracker.is_of(&region)) {
            for key in self.take_out_of(index) {
                self.give_back(key, Status::IoError);
            }
        }
        self.abandon(index);
        let ring = &mut self.rings[index];
        match ring.resume(region, memory) {
            Ok(()) => ring.active = true,
            Err(error) => error!("a ring is not served: {error}"),
        }
    }

    /// Gives up what is still out of a ring: its later answers are dropped, and guest memory is not
    /// touched for it any more. In a region it stays in flight, and the next start does it
    /// again; where there is none, it fails.
    pub fn abandon(&mut self, ring: usize) {
        let keys = self.take_out_of(ring);
        if keys.is_empty() {
            return;
        }
        let tracked = self.rings[ring].tracker.is_some();
        let (count, fate) = (keys.len(), if tracked { "stay in flight" } else { "fail" });
        warn!("{count} requests are not answered in time by the replicas they need; they {fate}");
        for key in keys {
            if tracked {
                if let Some((kind, _)) = self.chains[key].counted {
                    self.recorder.request_abandoned(kind);
                }
                self.let_go(key);
            } else {
                self.give_back(key, Status::IoError);
            }
        }
    }

    /// The chains that are out of a ring, of which no more is begun.
    fn take_out_of(&mut self, ring: usize) -> Vec<usize> {
        let out = |chain: &Taken| chain.ring == ring && !chain.abandoned;
        let chains = self.chains.iter().filter(|(_, chain)| out(chain));
        let keys: Vec<usize> = chains.map(|(key, _)| key).collect();
        self.unfinished.retain(|key| !keys.contains(key));
        keys
    }

    /// Whether requests are taken off a ring: it was started, and neither stopped nor broken by its
    /// driver since.
    pub fn is_served(&self, ring: usize) -> bool {
        self.rings[ring].active
    }

    /// Whether every chain taken off the ring was given back, or abandoned.
    pub fn is_drained(&self, ring: usize) -> bool {
        self.rings[ring].taken == 0
    }

    /// Whether there is nothing to do for any ring, and will not be until one is looked at again.
    pub fn is_idle(&self) -> bool {
        let is_idle = |ring: &Ring| !ring.active && !ring.used && ring.taken == 0;
        self.rings.iter().all(is_idle)
    }

    /// The next piece of work, if any: of a request that was begun, or of a new one.
    pub fn next_request(&mut self) -> Option<(Tag, GuestRequest)> {
        // Bounded: a driver that goes on adding requests which are refused at once must not keep us
        // here.
        for _ in 0..QUEUE_SIZE_MAX {
            if let Some(&key) = self.unfinished.front() {
                match self.next_piece(key) {
                    Some(piece) => return Some(piece),
                    None => continue,
                }
            }
            if !self.take() {
                return None;
            }
        }
        None
    }

    /// Whether there is a next piece of work, as far as a glance tells.
    pub fn has_more(&self) -> bool {
        let memory = self.memory.memory();
        let has_more = |ring: &Ring| {
            let state = ring.vring.get_ref();
            let queue = state.get_queue();
            let available = queue.avail_idx(&View(&memory), Ordering::Relaxed);
            available.is_ok_and(|index| index.0 != queue.next_avail())
        };
        let mut active = self.rings.iter().filter(|ring| ring.active);
        !self.unfinished.is_empty() || active.any(has_more)
    }

    /// The engine has answered a piece.
    pub fn answered(&mut self, tag: Tag, result: Result<&[u8], Failed>) {
        let (key, offset_sectors) = untag(tag);
        let chain = &mut self.chains[key];
        let was_parked = chain.is_parked();
        chain.outstanding -= 1;
        if chain.abandoned {
            if chain.outstanding == 0 {
                self.chains.remove(key);
            }
            return;
        }
        let done = match (result, chain.request.kind) {
            (Err(Failed), _) => Err(OutsideMemory),
            (Ok(data), Kind::In(_)) => {
                let offset = bytes(offset_sectors);
                chain
                    .request
                    .data
                    .write(View(&self.memory.memory()), offset, data)
            }
            (Ok(_), _) => Ok(()),
        };
        if done.is_err() && !chain.failed {
            chain.failed = true;
            self.unfinished.retain(|unfinished| *unfinished != key);
        }
        let all_begun = chain.failed || chain.begun_sectors == chain.request.sectors();
        if was_parked && !all_begun {
            self.unfinished.push_back(key);
        }
        if chain.outstanding == 0 && all_begun {
            let status = if chain.failed {
                Status::IoError
            } else {
                Status::Ok
            };
            self.give_back(key, status);
        }
    }

    /// Tells the driver of what was put on the used rings since the last call, where it wants to be
    /// told.
    pub fn signal(&mut self) {
        let memory = self.memory.memory();
        let memory = View(&memory);
        for ring in self.rings.iter_mut().filter(|ring| ring.used) {
            ring.used = false;
            let mut state = ring.vring.get_mut();
            let queue = state.get_queue_mut();
            // When in doubt, tell.
            if queue.needs_notification(&memory).unwrap_or(true)
                && !forbids_interrupts(queue, memory)
            {
                // The frontend may have closed its end; then nobody waits for it.
                let _ = state.signal_used_queue();
            }
        }
    }

    /// Asks to be kicked from now on. Returns whether requests have come in meanwhile, for which no
    /// kick will come.
    pub fn ask_for_kicks(&mut self) -> bool {
        let memory = self.memory.memory();
        let memory = View(&memory);
        let mut more = false;
        let wanted = |ring: &&mut Ring| ring.active && !ring.notify && ring.held.is_none();
        for ring in self.rings.iter_mut().filter(wanted) {
            ring.notify = true;
            let enabled = ring
                .vring
                .get_mut()
                .get_queue_mut()
                .enable_notification(&memory);
            match enabled {
                Ok(pending) => more |= pending,
                Err(error) => ring.give_up(&error),
            }
        }
        more
    }

    /// Whether a ring waits for what other rings have to do first. Nobody tells when that is done;
    /// whoever serves the rings has to look every now and then.
    pub fn is_held(&self) -> bool {
        self.rings.iter().any(|ring| ring.held.is_some())
    }

    /// Lets rings go on when all that changes the disk is begun again. What was to be is with the
    /// engine by now, as nothing is unfinished; of a large discard a part may be left.
    fn release(&mut self) {
        if !self.is_held() || self.chains.iter().any(|(_, chain)| chain.is_parked()) {
            return;
        }
        for ring in &mut self.rings {
            let Some(held) = &mut ring.held else {
                continue;
            };
            if !held.told && ring.resubmitted.is_empty() {
                held.told = true;
                held.region.resubmitted();
            }
            if held.told && (held.region.is_all_resubmitted() || Instant::now() >= held.until) {
                ring.held = None;
            }
        }
    }

    /// Takes one chain off the rings. `false` if there is none.
    fn take(&mut self) -> bool {
        self.release();
        // What another process began comes first.
        let half_done = |ring: &Ring| !ring.resubmitted.is_empty();
        let first = self.rings.iter().position(half_done);
        let (count, next) = (self.rings.len(), self.next_ring);
        let in_turn = (0..count).map(|step| (next + step) % count);
        for index in first.into_iter().chain(in_turn) {
            if let Some(request) = self.pop(index) {
                self.next_ring = (index + 1) % count;
                self.begin(index, request);
                return true;
            }
        }
        false
    }

    fn pop(&mut self, index: usize) -> Option<Request> {
        let ring = &mut self.rings[index];
        if !ring.active {
            return None;
        }
        let memory = self.memory.memory();
        let memory = View(&memory);
        let mut state = ring.vring.get_mut();
        // The frontend stops a ring by taking its readiness away; it is told here at the latest.
        if !state.is_enabled() || !state.get_queue().ready() {
            return None;
        }
        let again = |head| Request::parse(Chain::new(memory, state.get_queue(), head), &self.info);
        while let Some(head) = ring.resubmitted.pop_front() {
            let request = again(head);
            if matches!(request.kind, Kind::In(_) | Kind::Flush) {
                ring.deferred.push_back(head);
            } else {
                ring.taken += 1;
                return Some(request);
            }
        }
        if ring.held.is_some() {
            return None;
        }
        if let Some(head) = ring.deferred.pop_front() {
            ring.taken += 1;
            return Some(again(head));
        }
        let head = match state
            .get_queue_mut()
            .iter(&memory)
            .map(|mut iter| iter.next())
        {
            Ok(chain) => {
                let head = chain?.head_index();
                if let Some(tracker) = &mut ring.tracker {
                    tracker.taken(head);
                }
                head
            }
            Err(error) => {
                drop(state);
                ring.give_up(&error);
                return None;
            }
        };
        ring.taken += 1;
        if ring.notify {
            ring.notify = false;
            // Only a hint; a failure shows again when the ring is used.
            let _ = state.get_queue_mut().disable_notification(&memory);
        }
        let chain = Chain::new(memory, state.get_queue(), head);
        Some(Request::parse(chain, &self.info))
    }

    /// Answers a request that needs no replica, queues the others for their pieces.
    fn begin(&mut self, ring: usize, request: Request) {
        let at_once = match request.kind {
            Kind::Refused(status) => Some(status),
            Kind::GetId => Some(request.write_id(View(&self.memory.memory()), &self.info.serial)),
            Kind::In(_) | Kind::Out(_) | Kind::Zero if request.sectors() == 0 => Some(Status::Ok),
            Kind::In(_) | Kind::Out(_) | Kind::Zero | Kind::Flush => None,
        };
        let counted = request.counts_as();
        let counted = counted.map(|kind| (kind, self.recorder.request_begun(kind)));
        if matches!(request.kind, Kind::Refused(_)) {
            self.recorder.request_rejected();
        }
        let key = self.chains.insert(Taken {
            ring,
            request,
            begun_sectors: 0,
            outstanding: 0,
            failed: false,
            counted,
            abandoned: false,
        });
        match at_once {
            Some(status) => self.give_back(key, status),
            None => self.unfinished.push_back(key),
        }
    }

    /// Begins the next piece of a chain, or finds that there is none left to begin.
    fn next_piece(&mut self, key: usize) -> Option<(Tag, GuestRequest)> {
        let chain = &mut self.chains[key];
        let begun = chain.begun_sectors;
        let left = chain.request.sectors() - begun;
        let piece =
            |range: SectorRange| SectorRange::new(range.start + begun, left.min(PIECE_SECTORS));
        let (request, sectors) = match chain.request.kind {
            Kind::In(range) => (GuestRequest::Read(piece(range)), piece(range).count),
            Kind::Out(range) => {
                let range = piece(range);
                let mut data = self.pool.take(bytes(range.count));
                let memory = self.memory.memory();
                let memory = View(&memory);
                if chain
                    .request
                    .data
                    .read(memory, bytes(begun), &mut data)
                    .is_err()
                {
                    chain.failed = true;
                    self.unfinished.pop_front();
                    if chain.outstanding == 0 {
                        self.give_back(key, Status::IoError);
                    }
                    return None;
                }
                let durable = self.durable_writes;
                (
                    GuestRequest::Write {
                        range,
                        data,
                        durable,
                    },
                    range.count,
                )
            }
            Kind::Zero => {
                let Zeroed { range, unmap } =
                    chain.request.zeroed_from(begun).expect("some is left");
                let range = SectorRange::new(range.start, range.count.min(ZERO_PIECE_SECTORS));
                let durable = self.durable_writes;
                let zero = GuestRequest::Zero {
                    range,
                    unmap,
                    durable,
                };
                (zero, range.count)
            }
            Kind::Flush => (GuestRequest::Flush, 0),
            Kind::GetId | Kind::Refused(_) => unreachable!("answered when it was taken"),
        };
        chain.begun_sectors += sectors;
        chain.outstanding += 1;
        if chain.begun_sectors == chain.request.sectors() || chain.is_parked() {
            self.unfinished.pop_front();
        }
        Some((tag(key, begun), request))
    }

    /// Answers a chain and puts it on the used ring.
    fn give_back(&mut self, key: usize, status: Status) {
        let chain = &self.chains[key];
        let head = chain.request.head;
        if let Some((kind, since)) = chain.counted {
            let range = chain.request.extent();
            self.recorder
                .request_ended(kind, range, since, status == Status::Ok);
        }
        let memory = self.memory.memory();
        let memory = View(&memory);
        let written = chain.request.answer(memory, status);
        let ring = &mut self.rings[chain.ring];
        ring.used = true;
        let mut state = ring.vring.get_mut();
        if let Some(tracker) = &ring.tracker {
            tracker.giving_back(head);
        }
        let added = state.get_queue_mut().add_used(&memory, head, written);
        let used_idx = state.get_queue().next_used();
        drop(state);
        match (added, &ring.tracker) {
            (Ok(()), Some(tracker)) => tracker.given_back(head, used_idx),
            (Ok(()), None) => {}
            (Err(error), _) => ring.give_up(&error),
        }
        self.let_go(key);
    }

    /// Forgets a chain, but keeps its name as long as the engine uses it.
    fn let_go(&mut self, key: usize) {
        let chain = &mut self.chains[key];
        let ring = &mut self.rings[chain.ring];
        ring.taken -= 1;
        ring.forget_tracker();
        chain.abandoned = true;
        if chain.outstanding == 0 {
            self.chains.remove(key);
        }
    }
}

impl Ring {
    /// Goes on where the region says that the ring stands.
    fn resume(&mut self, region: QueueRegion, memory: View<'_>) -> Result<(), StartError> {
        self.forget_resubmitted();
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let used_idx = queue.used_idx(&memory, Ordering::Acquire)?.0;
        let available_idx = queue.avail_idx(&memory, Ordering::Acquire)?.0;
        let ring = RingState {
            size: queue.size(),
            used_idx,
            available_idx,
        };
        let tracked = region.clone();
        let (tracker, begun) = region.begin(ring)?;
        self.tracker = Some(tracker);
        queue.set_next_used(used_idx);
        if let Begun::Resumed(heads) = begun {
            // What the frontend says is the available index with some, the used index with others.
            let taken = u16::try_from(heads.len()).expect("at most one for each entry");
            queue.set_next_avail(used_idx.wrapping_add(taken));
            if taken > 0 {
                info!("{taken} requests were in flight; they are done again");
            }
            self.resubmitted = heads.into();
        }
        self.held = Some(Held {
            region: tracked,
            told: false,
            until: Instant::now() + RESUBMIT_LIMIT,
        });
        Ok(())
    }

    /// What was to be done again is not done now. Tracked as it is, it comes back with the next
    /// start.
    fn forget_resubmitted(&mut self) {
        self.resubmitted.clear();
        self.deferred.clear();
        self.held = None;
    }

    /// A ring that is stopped and drained does not keep the frontend's file mapped: it may never
    /// start again.
    fn forget_tracker(&mut self) {
        if !self.active && self.taken == 0 {
            self.tracker = None;
        }
    }

    /// The driver broke its own ring; leave it alone until it is set up anew.
    fn give_up(&mut self, error: &virtio_queue::Error) {
        self.forget_resubmitted();
        if std::mem::take(&mut self.active) {
            error!("the guest broke a ring ({error}); it is not served until it is started again");
        }
    }
}

impl Taken {
    /// Whether it has as many pieces in flight as it may; it goes on when one of them is answered.
    fn is_parked(&self) -> bool {
        self.request.kind == Kind::Zero && self.outstanding == ZERO_FRAGMENTS_IN_FLIGHT_MAX
    }
}

/// Whether the driver, without EVENT_IDX, wants no interrupts now (virtio 1.3, 2.7.7);
/// `virtio-queue` does not look.
fn forbids_interrupts(queue: &Queue, memory: View<'_>) -> bool {
    let flags = GuestAddress(queue.avail_ring());
    let forbidden = |flags: u16| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0;
    !queue.event_idx_enabled() && memory.load(flags, Ordering::Acquire).is_ok_and(forbidden)
}

/// The tag of the piece that begins `offset_sectors` into a chain. The worker has the upper 8 bits
/// for itself.
fn tag(key: usize, offset_sectors: u64) -> Tag {
    // A chain is below 4 GiB, and there are at most as many as the rings have entries.
    Tag((key as u64) << 32 | offset_sectors)
}

fn untag(tag: Tag) -> (usize, u64) {
    let key = usize::try_from(tag.0 >> 32).expect("it was one");
    (key, tag.0 & u64::from(u32::MAX))
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR_BYTES).expect("a chain is below 4 GiB")
}
