//! The data of one run: engines, replicas, the guest's requests, a clock, and what is known of the
//! faults.
//!
//! Invariant: nothing but the seed decides what happens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Violation;
use super::effects::Collected;
use super::flight::{Flight, LastTime, Looked, Took};
use super::held::HeldRequest;
use super::ledger::{Failures, Ledger, Masks};
use super::model::{Model, Moment, NEVER, Value};
use super::pending::Pending;
use super::plan::{PLACES, Plan, WriteCache, bits};
use super::preferring::Preference;
use super::random::Random;
use super::records::Records;
use super::repair_limit::Unasked;
use super::replica::SimReplica;
use super::staleness::Staleness;
use super::statistics::Statistics;
use super::threshold::Thresholds;
use super::view::View;
use crate::common::buffer::BufferPool;
use crate::common::clock::TurnClock;
use crate::common::operation::{OperationType, RequestId};
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::device::hold::Hold;
use crate::engine::{Engine, Policy, Shared, WorkerIndex};
use crate::jobs::{JobId, JobInfo, JobKind};
use crate::quorum::health::Wanted;

/// The result of a check.
pub(super) type Checked = Result<(), Violation>;

/// The state of a run.
#[derive(Debug)]
pub struct World {
    pub(super) plan: Plan,
    pub(super) random: Random,
    /// The vote threshold.
    pub(super) threshold: usize,
    /// Before the last input, and after it.
    pub(super) thresholds: Thresholds,
    /// The lowest since the start of the daemon.
    pub(super) least_threshold: usize,
    /// The threshold was 1 at some time, or a recovery has found one copy only: a rotten value may
    /// have been copied.
    pub(super) one_has_decided: bool,
    /// How often any image was modified.
    pub(super) modifications: u64,
    /// The one that the operator wants; `None`: it follows the number of replicas.
    pub(super) wanted: Option<usize>,
    pub(super) shared: Arc<Shared>,
    /// Boxed, so that one can leave its place for a moment at no cost.
    pub(super) engines: Vec<Box<Engine>>,
    pub(super) pools: Vec<BufferPool>,
    pub(super) replicas: Vec<SimReplica>,
    pub(super) records: Records,
    /// The operations that have no reply.
    pub(super) flights: Vec<Flight>,
    /// Grants of locks that have not reached their worker.
    pub(super) wakes: Vec<(WorkerIndex, RequestId)>,
    /// The workers that are to be ticked, a mask.
    pub(super) tick_wanted: u32,
    /// The guest requests that are not answered.
    pub(super) pending: Vec<Pending>,
    /// What the device does with requests that fail.
    pub(super) hold: Hold,
    /// The requests that failed and that no engine has.
    pub(super) held: Vec<HeldRequest>,
    /// How often the operator has done something about them.
    pub(super) cared: u32,
    pub(super) model: Model,
    pub(super) ledger: Ledger,
    pub(super) staleness: Staleness,
    pub(super) view: View,
    /// The same before the last input.
    pub(super) view_before: View,
    pub(super) collected: Collected,
    /// The writes of what a preferred replica holds.
    pub(super) preferences: Vec<Preference>,
    /// What was known of failures before the last input.
    pub(super) before_input: Failures,
    /// The same before the reply that the next input brings.
    pub(super) before_reply: Option<Failures>,
    /// `Ledger::excused` as it was when the last flush of the engines began.
    pub(super) flush_lacks: Masks,
    /// The last input overlapped with one of another worker.
    pub(super) overlapped: bool,
    /// The worker whose engine was given the last input.
    pub(super) input_from: usize,
    pub(super) clock: Duration,
    /// The clock as the engines see it.
    pub(super) turn: TurnClock,
    /// Guest-visible events so far.
    pub(super) now: Moment,
    pub(super) steps: u64,
    /// See [`patience`](super::patience).
    pub(super) rounds: u64,
    /// Guest requests made.
    pub(super) requests: u64,
    /// The number of the last write.
    pub(super) writes: u64,
    /// The number of the last rotten value.
    pub(super) rotten: u64,
    /// When each sector was last written on any replica, or by the guest.
    pub(super) changed_at: Vec<Moment>,
    /// Until when writes and flushes fail on every replica that may fail.
    pub(super) full_until: Duration,
    /// Until when each replica does nothing.
    pub(super) hung_until: [Duration; PLACES],
    /// How long the operations of each request took that have ended.
    pub(super) took: Vec<Took>,
    /// How many flushes, zeroings and operations of jobs have ended on each replica.
    pub(super) yielded: [u32; PLACES],
    /// When the last of them has.
    pub(super) yielded_at: [LastTime; PLACES],
    /// When a worker looked at the clock, and something had ended.
    pub(super) replied_at: [LastTime; PLACES],
    /// When an operation has ended last that was late.
    pub(super) late_reply_at: Duration,
    /// The longest time that any operation has taken.
    pub(super) longest: Duration,
    /// How many chunks of jobs have begun since the start of the daemon, and when the last one has.
    pub(super) chunks: (u64, Duration),
    /// When each replica was evicted since the start of the daemon.
    pub(super) evicted_at: [Vec<Duration>; PLACES],
    /// By worker.
    pub(super) looked: [Looked; 3],
    /// The guest has switched the write cache off: writes are durable when they are answered.
    pub(super) write_through: bool,
    /// The guest waits until all is quiet.
    pub(super) paused: bool,
    /// The replicas of the disk, a mask.
    pub(super) members: u32,
    /// The replicas that were removed and whose place is not free, a mask.
    pub(super) to_be_released: u32,
    /// The replicas that were added and have not been resynced, a mask.
    pub(super) unsynced: u32,
    /// The members whose image is missing, a mask.
    pub(super) missing: u32,
    /// The number of replicas that there have been since the start of the daemon.
    pub(super) members_ever: usize,
    /// The jobs, as the engine has reported them.
    pub(super) jobs: Vec<JobInfo>,
    /// The resyncs that the operator has asked for, and [`Ledger::failures`] at that time.
    pub(super) asked_resyncs: Vec<(JobId, u32)>,
    /// The sectors of which a replica was accused, a mask.
    pub(super) accused: u64,
    /// The replicas that were reported for no answer in time, and whose eviction was not, a mask.
    pub(super) timed_out: u32,
    /// The sectors of failed writes that no vote has decided, as the engines know them, a mask.
    pub(super) undecided: u64,
    /// Those of them that are to be recovered after an unclean end (S5), and were not written
    /// since.
    pub(super) recovering: u64,
    /// Those of them to which the guest has not submitted a write since.
    pub(super) untouched: u64,
    /// Unrecovered sectors to which a vote has begun to write its winner, and the last one: the
    /// first was checked then.
    pub(super) chosen: BTreeMap<usize, Value>,
    /// What has been repaired unasked (O5).
    pub(super) unasked: Unasked,
    /// Where repairs and copies of a resync have written, since the last look.
    pub(super) rewritten: Masks,
    /// The last job that is complete.
    pub(super) completed_job: Option<JobInfo>,
    /// The engines owed the guest a failed flush before the last input, and after it.
    pub(super) owed: [bool; 2],
    /// A flush succeeds now if all copies are equal.
    pub(super) must_flush: bool,
    /// From now on no fault is injected.
    pub(super) faults_ended: bool,
    /// A crash has happened.
    pub(super) crashed: bool,
    /// The disk cannot be served any more.
    pub(super) is_lost: bool,
    /// What happened, if the run is traced.
    pub(super) trace: Option<Vec<TraceLine>>,
    /// What this run is made of.
    pub(super) statistics: Statistics,
}

/// A line of the trace.
#[derive(Debug)]
pub(super) struct TraceLine {
    /// The sectors concerned, a mask; 0: all, or none.
    pub(super) sectors: u64,
    pub(super) text: String,
}

/// The number of events that are printed of a run that failed.
const LAST_EVENTS: usize = 16;

/// Adds a line to the trace, if there is one. `at MASK`: it concerns these sectors.
macro_rules! trace {
    ($world:expr, at $sectors:expr, $($format:tt)*) => {
        if $world.trace.is_some() {
            let clock = $world.clock.as_micros();
            let text = format!("{:6} {clock:9} us  {}", $world.steps, format_args!($($format)*));
            let sectors = $sectors;
            let line = $crate::sim::state::TraceLine { sectors, text };
            $world.trace.get_or_insert_default().push(line);
        }
    };
    ($world:expr, $($format:tt)*) => { trace!($world, at 0, $($format)*) };
}
pub(super) use trace;

/// An error that an engine has received, and must report once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExpectedReport {
    pub(super) replica: ReplicaIndex,
    pub(super) operation: OperationType,
    pub(super) errno: Errno,
    /// Whether it must: not if the replica was evicted in between.
    pub(super) required: bool,
}

impl World {
    /// The world of a seed, before its first step.
    pub fn new(plan: Plan, random: Random, pools: &[BufferPool], traced: bool) -> Self {
        let sectors = usize::try_from(plan.sectors).expect("few");
        let mut world = Self {
            replicas: (0..PLACES).map(|_| SimReplica::new(sectors)).collect(),
            records: Records::default(),
            members: (1 << plan.replicas) - 1,
            threshold: 0,
            thresholds: Thresholds::only(0),
            least_threshold: 0,
            one_has_decided: false,
            modifications: 0,
            wanted: None,
            to_be_released: 0,
            missing: 0,
            unsynced: 0,
            members_ever: plan.replicas,
            jobs: Vec::new(),
            asked_resyncs: Vec::new(),
            accused: 0,
            timed_out: 0,
            undecided: 0,
            recovering: 0,
            untouched: 0,
            chosen: BTreeMap::new(),
            unasked: Unasked::default(),
            rewritten: Masks::default(),
            completed_job: None,
            shared: Arc::new(Shared::new(1, 1, 1, 1)),
            engines: Vec::new(),
            pools: pools[..plan.workers].to_vec(),
            flights: Vec::new(),
            wakes: Vec::new(),
            tick_wanted: 0,
            pending: Vec::new(),
            hold: Hold::default(),
            held: Vec::new(),
            cared: 0,
            model: Model::new(sectors),
            ledger: Ledger::default(),
            staleness: Staleness::default(),
            view: View::default(),
            view_before: View::default(),
            collected: Collected::default(),
            preferences: Vec::new(),
            before_input: Failures::default(),
            before_reply: None,
            flush_lacks: [0; PLACES],
            overlapped: false,
            input_from: 0,
            clock: Duration::ZERO,
            turn: TurnClock::default(),
            now: 2,
            steps: 0,
            rounds: 1,
            requests: 0,
            writes: 0,
            rotten: 0,
            changed_at: vec![0; sectors],
            full_until: Duration::ZERO,
            hung_until: [Duration::ZERO; PLACES],
            took: Vec::new(),
            yielded: [0; PLACES],
            yielded_at: [LastTime::default(); PLACES],
            replied_at: [LastTime::default(); PLACES],
            late_reply_at: Duration::ZERO,
            longest: Duration::ZERO,
            chunks: (0, Duration::ZERO),
            evicted_at: Default::default(),
            looked: [Looked::default(); 3],
            write_through: plan.write_cache == WriteCache::Off,
            paused: false,
            owed: [false; 2],
            must_flush: false,
            faults_ended: false,
            crashed: false,
            is_lost: false,
            trace: traced.then(Vec::new),
            statistics: Statistics::default(),
            plan,
            random,
        };
        trace!(world, "{:?}", world.plan);
        world.start_engines();
        if world.plan.records {
            world.make_records().expect("all replicas answer");
        }
        world
    }

    /// What happened, line by line.
    pub fn take_trace(&mut self) -> Vec<String> {
        let lines = self.trace.take().unwrap_or_default();
        lines.into_iter().map(|line| line.text).collect()
    }

    /// The last events on these sectors, and those that concern the whole disk in between. 0: the
    /// last events.
    pub fn last_events(&self, sectors: u64) -> Vec<String> {
        let lines = self.trace.as_deref().unwrap_or_default();
        let concerns =
            |line: &&TraceLine| sectors == 0 || line.sectors == 0 || line.sectors & sectors != 0;
        let last = lines.iter().rev().filter(concerns).take(LAST_EVENTS);
        let mut last: Vec<String> = last.map(|line| line.text.clone()).collect();
        last.reverse();
        last
    }

    /// What the run was made of.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            steps: self.steps,
            requests: self.requests,
            ..self.statistics
        }
    }

    /// Fresh engines, as after a start of the daemon.
    pub(super) fn start_engines(&mut self) {
        let threshold = self.threshold_at_start();
        self.threshold = threshold;
        self.thresholds = Thresholds::only(threshold);
        self.least_threshold = threshold;
        self.one_has_decided |= threshold == 1;
        self.wanted = (!self.plan.follows).then_some(threshold);
        let policy = Policy {
            threshold,
            read_pattern: self.plan.read_pattern,
            rewrite_corrupted: self.plan.rewrite_corrupted,
            repair_limit_sectors: self.plan.repair_limit_sectors,
            blkverify: false,
            job_sizes: self.plan.job_sizes,
            block_sectors: self.plan.block_sectors,
            replica_timeout: self.plan.replica_timeout,
        };
        let workers = u16::try_from(self.plan.workers).expect("few");
        let members = ReplicaSet::from_bits(self.members);
        let sectors = self.plan.sectors;
        let shared = Shared::with_members(members, threshold, workers, sectors);
        if self.plan.follows && !(self.plan.records && self.crashed) {
            let follows = shared.want_threshold(Wanted::Majority);
            follows.expect("it may always follow");
        }
        self.missing = 0;
        if !self.crashed {
            self.leave_one_out(&shared);
        }
        self.shared = Arc::new(shared);
        self.view = View::default();
        let engine = |worker| {
            let pool = self.pools[usize::from(worker)].clone();
            Box::new(Engine::new(
                WorkerIndex(worker),
                policy.clone(),
                Arc::clone(&self.shared),
                pool,
                self.turn.clone(),
            ))
        };
        self.engines = (0..workers).map(engine).collect();
        self.hold = Hold::new(self.plan.on_error);
        self.held.clear();
    }

    /// The number of replicas.
    pub(super) fn count(&self) -> usize {
        usize::try_from(self.members.count_ones()).expect("few")
    }

    /// The replicas of the disk.
    pub(super) fn members(&self) -> impl Iterator<Item = usize> + use<> {
        bits(u64::from(self.members))
    }

    /// Whether the replica is evicted, or was removed.
    pub(super) fn is_evicted(&self, replica: usize) -> bool {
        self.ledger.evicted >> replica & 1 == 1
    }

    /// Whether a scrub runs, which may accuse replicas.
    pub(super) fn is_scrubbing(&self) -> bool {
        let is_scrub = |job: &&JobInfo| !matches!(job.kind, JobKind::Resync(_));
        self.jobs.iter().any(|job| is_scrub(&job))
    }

    /// Whether the replica does nothing now.
    pub(super) fn hangs(&self, replica: usize) -> bool {
        self.wakes_at(replica) > self.clock
    }

    /// When the replica does something again.
    pub(super) fn wakes_at(&self, replica: usize) -> Duration {
        let flaps = !self.faults_ended && self.plan.slowness.flapping >> replica & 1 == 1;
        if !flaps {
            return self.hung_until[replica];
        }
        let timeout = self.plan.replica_timeout;
        let period = u32::try_from(self.clock.as_nanos() / (timeout * 5).as_nanos());
        let begins = timeout * 5 * period.unwrap_or(u32::MAX);
        let wakes = begins + timeout * 11 / 10;
        if self.clock < wakes {
            wakes.max(self.hung_until[replica])
        } else {
            self.hung_until[replica]
        }
    }

    /// When the operation can go on.
    pub(super) fn goes_on_at(&self, flight: &Flight) -> Duration {
        let slow = if self.faults_ended {
            Duration::ZERO
        } else {
            flight.not_before
        };
        self.wakes_at(flight.replica()).max(slow)
    }

    /// Whether nothing is in flight but operations of replicas that are evicted, and questions of
    /// jobs: no request waits for those.
    pub(super) fn is_quiet(&self) -> bool {
        self.wakes.is_empty()
            && self.held.is_empty()
            && self.pending.is_empty()
            && self.engines.iter().all(|engine| engine.is_idle())
            && self
                .flights
                .iter()
                .all(|flight| self.is_evicted(flight.replica()) || flight.is_question())
    }

    /// When the oldest request in flight began.
    pub(super) fn oldest(&self) -> Moment {
        let held = self.held.iter().map(|held| &held.pending);
        self.pending
            .iter()
            .chain(held)
            .map(|p| p.began)
            .chain(self.preferences.iter().map(|p| p.began))
            .min()
            .unwrap_or(NEVER - 1)
    }

    /// The disk, cut into ranges that one request can read.
    pub(super) fn parts(&self) -> Vec<SectorRange> {
        let disk = self.plan.disk();
        let size = self.plan.block_sectors * self.plan.blocks_max;
        let starts = (disk.start..disk.end()).step_by(usize::try_from(size).expect("few"));
        starts
            .map(|start| SectorRange::new(start, size.min(disk.end() - start)))
            .collect()
    }

    /// The replica may give corrupt bytes there from now on.
    pub(super) fn mark_corrupt(&mut self, replica: usize, sectors: u64) {
        self.ledger.corrupt[replica] |= sectors;
        self.ledger.unsound[replica] |= sectors;
        self.ledger.unrepaired[replica] &= !sectors;
        for pending in &mut self.pending {
            pending.seen.corrupt[replica] |= sectors;
        }
    }

    /// The replica cannot be read there from now on.
    pub(super) fn mark_unreadable(&mut self, replica: usize, sectors: u64) {
        self.ledger.unreadable[replica] |= sectors;
        for pending in &mut self.pending {
            pending.seen.unreadable[replica] |= sectors;
        }
    }

    /// The replica has dropped a page there, and no error has reported it yet.
    pub(super) fn mark_dropped(&mut self, replica: usize, sectors: u64) {
        self.ledger.dropped[replica] |= sectors;
        self.ledger.unsound[replica] |= sectors;
        for pending in &mut self.pending {
            pending.seen.dropped[replica] |= sectors;
        }
        self.note_undone(sectors);
    }

    /// From now on the engine knows of an error by which the replica may be stale there.
    pub(super) fn mark_excused(&mut self, replica: usize, sectors: u64) {
        self.ledger.excused[replica] |= sectors;
        for pending in &mut self.pending {
            pending.seen.excused[replica] |= sectors;
        }
        self.note_undone(sectors);
        let is_good = |member: usize, sector: usize| self.ledger.excused[member] >> sector & 1 == 0;
        let copies = |sector: &usize| {
            let is_copy = |member: usize| self.ledger.copies[member] >> sector & 1 == 1;
            let mut good = self.members().filter(|member| is_good(*member, *sector));
            good.all(is_copy)
        };
        let only_copies = bits(sectors)
            .filter(copies)
            .fold(0, |mask, at| mask | 1 << at);
        // The engine does not know which of the doubts the guest knows of.
        let mut all = 0..self.changed_at.len();
        let given_up = self.ledger.given_up;
        let lacking = all.any(|sector| {
            if given_up >> sector & 1 == 1 {
                return false;
            }
            let good = self.members().filter(|member| is_good(*member, sector));
            good.count() < self.thresholds.most
        });
        self.ledger.only_copies |= only_copies;
        if lacking || only_copies != 0 {
            self.ledger.lacking_at = Some(self.now);
        }
    }

    /// W7: where every copy is in doubt or has lost a page, a failed flush may have undone writes;
    /// also where more fresh copies have lost one than not, and no other fresh one is durable. And
    /// where every fresh copy is corrupt by an older version, with the copies in doubt behind it.
    pub(super) fn note_undone(&mut self, sectors: u64) {
        for sector in bits(sectors) {
            let is = |masks: &Masks, member: usize| masks[member] >> sector & 1 == 1;
            let fresh = self
                .members()
                .filter(|member| !is(&self.ledger.excused, *member));
            let (dropped, sound): (Vec<usize>, Vec<usize>) =
                fresh.partition(|member| is(&self.ledger.dropped, *member));
            let in_doubt = dropped.len() + sound.len() < self.count();
            let is_durable = |member: &usize| {
                let replica = &self.replicas[*member];
                replica.durable(sector) == replica.value(sector)
            };
            let outvoted = sound.len() < dropped.len() && !sound.iter().any(is_durable);
            if in_doubt && (sound.is_empty() || outvoted) {
                self.model.undo(sector);
            } else if in_doubt && sound.iter().all(|member| is(&self.ledger.corrupt, *member)) {
                self.model.unsee(sector);
                let is_old = |member: &usize| !self.replicas[*member].value(sector).is_rotten();
                if sound.iter().any(is_old) {
                    // With those that have lost the same write that makes t wrong copies.
                    self.model.overrule(sector);
                }
            }
        }
    }

    /// The replicas may hold different versions there from now on.
    pub(super) fn mark_mixed(&mut self, sectors: u64) {
        self.ledger.mixed |= sectors;
        for pending in &mut self.pending {
            pending.seen.mixed |= sectors;
        }
    }

    /// The same, and a vote may accuse replicas there.
    pub(super) fn mark_accusable(&mut self, sectors: u64) {
        self.mark_mixed(sectors);
        self.ledger.accusable |= sectors;
    }
}

#[cfg(test)]
impl World {
    /// A world of this seed, with what the test changes in its plan.
    pub(super) fn planned(seed: u64, change: impl FnOnce(Plan) -> Plan) -> Self {
        let mut random = Random::new(seed);
        let plan = change(Plan::new(&mut random));
        let pools = vec![BufferPool::default(); plan.workers];
        Self::new(plan, random, &pools, false)
    }
}

/// A range, for the trace.
pub(super) fn show(range: SectorRange) -> String {
    format!("{}+{}", range.start, range.count)
}
