//! The world of one run: engines, replicas, a guest and a clock.
//!
//! What it does in which order is in `schedule`, what becomes of an operation in `operations`, what
//! goes wrong in `faults`. What the engine says is checked at once (`checks`), and again whenever
//! all is quiet.
//!
//! Invariant: nothing but the seed decides what happens.

use std::sync::Arc;
use std::time::Duration;

use super::Violation;
use super::effects::{Collected, Effect, SECTOR_LEN, fill};
use super::ledger::{Ledger, Seen};
use super::model::{Model, Moment, NEVER, Value};
use super::operations::Flight;
use super::plan::{PLACES, Plan, bits};
use super::random::Random;
use super::replica::SimReplica;
use crate::common::buffer::BufferPool;
use crate::common::operation::RequestId;
use crate::common::{ReplicaSet, SectorRange};
use crate::engine::{Engine, GuestRequest, Policy, Shared, Tag, WorkerIndex};
use crate::jobs::JobInfo;

/// A check's outcome.
pub(super) type Checked = Result<(), Violation>;

/// A guest request that is not answered.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) tag: Tag,
    pub(super) worker: usize,
    pub(super) began: Moment,
    pub(super) range: SectorRange,
    pub(super) seen: Seen,
    pub(super) kind: PendingKind,
}

#[derive(Debug)]
pub(super) enum PendingKind {
    Read,
    Write(PendingWrite),
    Flush,
}

#[derive(Debug)]
pub(super) struct PendingWrite {
    pub(super) number: u64,
    /// It writes zeroes, which in here have the colour of its number: so a zero tells who wrote
    /// it.
    pub(super) zeroes: bool,
    /// The replicas it was handed to, masks of replicas.
    pub(super) handed_to: u32,
    pub(super) succeeded: u32,
    pub(super) failed: u32,
    /// The failures of each replica when it was handed to them.
    pub(super) failures: [u32; PLACES],
}

impl PendingWrite {
    /// It goes to a replica. Returns its number.
    pub(super) fn hand_to(
        &mut self,
        replica: usize,
        failures: [u32; PLACES],
    ) -> Result<u64, Violation> {
        let number = self.number;
        if self.handed_to & (1 << replica) != 0 {
            let text = format!("w{number} twice on replica {replica}");
            return Err(Violation::new("W3", text));
        }
        if self.handed_to == 0 {
            self.failures = failures;
        }
        self.handed_to |= 1 << replica;
        Ok(number)
    }
}

/// The world.
#[derive(Debug)]
pub struct World {
    pub(super) plan: Plan,
    pub(super) random: Random,
    pub(super) shared: Arc<Shared>,
    pub(super) engines: Vec<Engine>,
    pub(super) pools: Vec<BufferPool>,
    pub(super) replicas: Vec<SimReplica>,
    pub(super) flights: Vec<Flight>,
    pub(super) wakes: Vec<(WorkerIndex, RequestId)>,
    /// The workers that are to be ticked, a mask.
    pub(super) tick_wanted: u32,
    pub(super) pending: Vec<Pending>,
    pub(super) model: Model,
    pub(super) ledger: Ledger,
    pub(super) collected: Collected,
    /// The worker whose engine was given the last input.
    pub(super) input_from: usize,
    pub(super) clock: Duration,
    /// Guest-visible events so far.
    pub(super) now: Moment,
    pub(super) steps: u64,
    /// Requests made, and the number of the last write and the last rotten value.
    pub(super) requests: u64,
    pub(super) writes: u64,
    pub(super) rotten: u64,
    /// The last time that anything happened to a sector.
    pub(super) stirred: Vec<Moment>,
    pub(super) hung_until: [Duration; PLACES],
    /// The guest waits until all is quiet.
    pub(super) paused: bool,
    /// The replicas of the disk, a mask.
    pub(super) members: u32,
    /// Removed, but not released.
    pub(super) leaving: u32,
    /// Added, and not brought up to date yet.
    pub(super) unsynced: u32,
    /// How many replicas there have been since the start.
    pub(super) ever: usize,
    /// The jobs, by what was told of them.
    pub(super) jobs: Vec<JobInfo>,
    /// The sectors of which anybody was accused, and how often anybody was rewritten.
    pub(super) accused: u64,
    /// See `accused`.
    pub(super) rewrites: u64,
    /// No more faults.
    pub(super) calm: bool,
    /// A crash has happened.
    pub(super) crashed: bool,
    /// What happened, if somebody wants to read it.
    pub(super) trace: Option<Vec<String>>,
    /// Of this run.
    pub(super) statistics: Statistics,
}

/// What a run was made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Steps.
    pub steps: u64,
    /// Guest requests.
    pub requests: u64,
    /// Of these failed.
    pub failed: u64,
    /// Crashes.
    pub crashes: u64,
    /// Replicas accused of wrong bytes.
    pub accusations: u64,
    /// Replicas that left the set.
    pub departures: u64,
    /// Sectors of which the replicas had three versions or more after a crash, although all were
    /// in service.
    pub three_versions: u64,
    /// Replicas added.
    pub added: u64,
    /// Replicas removed.
    pub removed: u64,
    /// How often the disk has grown.
    pub grown: u64,
    /// Resyncs that have completed.
    pub resynced: u64,
    /// Scrubs of the operator.
    pub scrubs: u64,
}

impl Statistics {
    /// Adds those of another run.
    pub fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.requests += other.requests;
        self.failed += other.failed;
        self.crashes += other.crashes;
        self.accusations += other.accusations;
        self.departures += other.departures;
        self.three_versions += other.three_versions;
        self.added += other.added;
        self.removed += other.removed;
        self.grown += other.grown;
        self.resynced += other.resynced;
        self.scrubs += other.scrubs;
    }
}

/// A line of the trace, made only if somebody wants it.
macro_rules! trace {
    ($world:expr, $($format:tt)*) => {
        if $world.trace.is_some() {
            let clock = $world.clock.as_micros();
            let line = format!("{:6} {clock:9} us  {}", $world.steps, format_args!($($format)*));
            $world.trace.get_or_insert_default().push(line);
        }
    };
}
pub(super) use trace;

impl World {
    /// The world of a seed, before its first step.
    pub fn new(plan: Plan, random: Random, pools: &[BufferPool], traced: bool) -> Self {
        let sectors = usize::try_from(plan.sectors).expect("few");
        let mut world = Self {
            replicas: (0..PLACES).map(|_| SimReplica::new(sectors)).collect(),
            members: (1 << plan.replicas) - 1,
            leaving: 0,
            unsynced: 0,
            ever: plan.replicas,
            jobs: Vec::new(),
            accused: 0,
            rewrites: 0,
            shared: Arc::new(Shared::new(1, 1, 1, 1)),
            engines: Vec::new(),
            pools: pools[..plan.workers].to_vec(),
            flights: Vec::new(),
            wakes: Vec::new(),
            tick_wanted: 0,
            pending: Vec::new(),
            model: Model::new(sectors),
            ledger: Ledger::default(),
            collected: Collected::default(),
            input_from: 0,
            clock: Duration::ZERO,
            now: 2,
            steps: 0,
            requests: 0,
            writes: 0,
            rotten: 0,
            stirred: vec![0; sectors],
            hung_until: [Duration::ZERO; PLACES],
            paused: false,
            calm: false,
            crashed: false,
            trace: traced.then(Vec::new),
            statistics: Statistics::default(),
            plan,
            random,
        };
        trace!(world, "{:?}", world.plan);
        world.start_engines();
        world
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The first violation.
    pub fn run(&mut self) -> Checked {
        while self.requests < self.plan.requests || !self.is_quiet() {
            self.step()?;
        }
        self.finale()
    }

    /// What happened, line by line.
    pub fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
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
        let policy = Policy {
            threshold: self.plan.threshold,
            read_pattern: self.plan.read_pattern,
            rewrite_corrupted: self.plan.rewrite_corrupted,
            blkverify: false,
            job_sizes: self.plan.job_sizes,
            block_sectors: self.plan.block_sectors,
            replica_timeout: self.plan.replica_timeout,
        };
        let workers = u16::try_from(self.plan.workers).expect("few");
        let members = ReplicaSet::from_bits(self.members);
        let (t, sectors) = (self.plan.threshold, self.plan.sectors);
        self.shared = Arc::new(Shared::with_members(members, t, workers, sectors));
        let engine = |worker| {
            let pool = self.pools[usize::from(worker)].clone();
            Engine::new(
                WorkerIndex(worker),
                policy.clone(),
                Arc::clone(&self.shared),
                pool,
            )
        };
        self.engines = (0..workers).map(engine).collect();
    }

    /// After the last request: replicas that hung come back and are brought up to date, and
    /// whatever else is wrong with them, reading everything finds it, and writing everything
    /// heals it.
    fn finale(&mut self) -> Checked {
        trace!(
            self,
            "-- no more faults: wait, read all, write all, flush, read all"
        );
        self.calm = true;
        // So that nobody is late only because others come first.
        self.plan.step = Duration::from_nanos(10);
        self.hung_until = [Duration::ZERO; PLACES];
        self.let_jobs_go_on()?;
        self.settle()?;
        self.rest()?;
        self.check_resynced()?;
        self.read_all()?;
        self.check_rewritten()?;
        self.check_scrub()?;
        for part in self.parts() {
            self.submit_write(0, part)?;
        }
        self.settle()?;
        if !self.plan.durable {
            self.submit_flush(0)?;
            self.settle()?;
        }
        self.check_healed()?;
        self.read_all()
    }

    fn read_all(&mut self) -> Checked {
        for part in self.parts() {
            self.submit_read(0, part)?;
        }
        self.settle()
    }

    /// The disk, in a few parts.
    pub(super) fn parts(&self) -> Vec<SectorRange> {
        let disk = self.plan.disk();
        let size = self.plan.block_sectors * self.plan.blocks_max;
        let starts = (disk.start..disk.end()).step_by(usize::try_from(size).expect("few"));
        starts
            .map(|start| SectorRange::new(start, size.min(disk.end() - start)))
            .collect()
    }

    /// Until all is answered and nothing is in flight, not even to a replica that left the set.
    fn settle(&mut self) -> Checked {
        while !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// Long enough for everything that the engine does by itself.
    fn rest(&mut self) -> Checked {
        let until = self.clock + Duration::from_secs(10);
        let due = |world: &Self| {
            let deadline = world
                .engines
                .iter()
                .any(|engine| engine.deadline().is_some());
            deadline || world.tick_wanted != 0
        };
        while self.clock < until && due(self) {
            self.step()?;
        }
        self.settle()
    }

    /// Nothing is in flight that anybody waits for.
    pub(super) fn is_quiet(&self) -> bool {
        self.wakes.is_empty()
            && self.pending.is_empty()
            && self.engines.iter().all(Engine::is_idle)
            && self
                .flights
                .iter()
                .all(|flight| self.is_out(flight.replica()))
    }

    /// Whether a replica has left the set.
    pub(super) fn is_out(&self, replica: usize) -> bool {
        self.ledger.out >> replica & 1 == 1
    }

    pub(super) fn submit_read(&mut self, worker: usize, range: SectorRange) -> Checked {
        let tag = self.pend(worker, range, PendingKind::Read);
        trace!(
            self,
            "guest: {} reads {} on worker {worker}",
            tag.0,
            show(range)
        );
        self.submit(worker, tag, GuestRequest::Read(range))
    }

    pub(super) fn submit_flush(&mut self, worker: usize) -> Checked {
        let tag = self.pend(worker, SectorRange::new(0, 0), PendingKind::Flush);
        trace!(self, "guest: {} flushes on worker {worker}", tag.0);
        self.submit(worker, tag, GuestRequest::Flush)
    }

    pub(super) fn submit_write(&mut self, worker: usize, range: SectorRange) -> Checked {
        let (tag, number) = self.pend_write(worker, range, false);
        let mut data = self.pools[worker].take(usize::try_from(range.bytes()).expect("few"));
        let sectors = bits(self.plan.mask(range));
        for (sector, bytes) in sectors.zip(data.chunks_exact_mut(SECTOR_LEN)) {
            fill(bytes, Value::written(number, sector));
        }
        let durable = self.plan.durable;
        self.submit(
            worker,
            tag,
            GuestRequest::Write {
                range,
                data,
                durable,
            },
        )
    }

    pub(super) fn submit_zero(
        &mut self,
        worker: usize,
        range: SectorRange,
        unmap: bool,
    ) -> Checked {
        let (tag, _) = self.pend_write(worker, range, true);
        let durable = self.plan.durable;
        let zero = GuestRequest::Zero {
            range,
            unmap,
            durable,
        };
        self.submit(worker, tag, zero)
    }

    fn pend_write(&mut self, worker: usize, range: SectorRange, zeroes: bool) -> (Tag, u64) {
        self.writes += 1;
        let number = self.writes;
        let write = PendingWrite {
            number,
            zeroes,
            handed_to: 0,
            succeeded: 0,
            failed: 0,
            failures: [0; PLACES],
        };
        let tag = self.pend(worker, range, PendingKind::Write(write));
        trace!(
            self,
            "guest: {} {} {} on worker {worker}: w{number}",
            tag.0,
            if zeroes { "zeroes" } else { "writes" },
            show(range)
        );
        for sector in bits(self.plan.mask(range)) {
            let value = Value::written(number, sector);
            self.model.write_began(sector, value, self.now);
            self.stirred[sector] = self.now;
        }
        (tag, number)
    }

    fn pend(&mut self, worker: usize, range: SectorRange, kind: PendingKind) -> Tag {
        self.requests += 1;
        self.now += 1;
        let tag = Tag(self.requests);
        self.pending.push(Pending {
            tag,
            worker,
            began: self.now,
            range,
            seen: self.ledger.seen(),
            kind,
        });
        tag
    }

    fn submit(&mut self, worker: usize, tag: Tag, request: GuestRequest) -> Checked {
        let engine = self.engine(worker);
        engine.0.submit(tag, request, engine.1);
        self.look_at_effects(None)
    }

    /// The engine of a worker, that knows the time, and where its effects go.
    pub(super) fn engine(&mut self, worker: usize) -> (&mut Engine, &mut Collected) {
        self.input_from = worker;
        let engine = &mut self.engines[worker];
        engine.set_time(self.clock);
        (engine, &mut self.collected)
    }

    /// Carries out and checks what an engine asked for. `told`: the input was the error of an
    /// operation.
    pub(super) fn look_at_effects(&mut self, told: Option<super::checks::ToldError>) -> Checked {
        self.engines[self.input_from].self_check();
        self.look_at_service();
        let mut effects = std::mem::take(&mut self.collected.effects);
        let mut values = std::mem::take(&mut self.collected.values);
        let (mut values_used, mut told, mut failures) = (0, told, 0_i64);
        let scrubbing = self.is_scrubbing();
        for effect in effects.drain(..) {
            match effect {
                Effect::Submit(operation) => self.take_off(operation)?,
                Effect::Complete(tag, Ok(count)) => {
                    let of_this = &values[values_used..values_used + count];
                    values_used += count;
                    self.completed(tag, Ok(of_this))?;
                }
                Effect::Complete(tag, Err(_)) => {
                    failures -= 1;
                    self.statistics.failed += 1;
                    self.completed(tag, Err(()))?;
                }
                Effect::Report(report) => self.check_report(&report, &mut told, &mut failures)?,
                Effect::Wake(worker, request) => self.wakes.push((worker, request)),
                Effect::HealthChanged => self.tick_wanted = (1 << self.plan.workers) - 1,
                Effect::JobChanged(event) => self.job_told(event)?,
                Effect::Released(replica) => self.released(replica)?,
                Effect::ContentsDiffer(_) => {
                    return Err(Violation::new("blkverify", "the disk is none"));
                }
            }
        }
        values.clear();
        self.collected.effects = effects;
        self.collected.values = values;
        if let Some(told) = told.filter(|told| told.must_be_reported) {
            return Err(Violation::new(
                "R4",
                format!("an error was not reported: {told:?}"),
            ));
        }
        // A scrub tells of sectors without a winner too.
        if failures < 0 || (failures > 0 && !scrubbing) {
            return Err(Violation::new(
                "R3",
                "not one QUORUM_FAILURE for each failed request",
            ));
        }
        Ok(())
    }

    /// Notes who has left the set or come back.
    fn look_at_service(&mut self) {
        let in_service = self.shared.in_service();
        for replica in self.members() {
            let index = crate::common::ReplicaIndex(u8::try_from(replica).expect("few"));
            let out = !in_service.contains(index);
            if out == self.is_out(replica) {
                continue;
            }
            self.ledger.out ^= 1 << replica;
            if out {
                trace!(self, "replica {replica} leaves the set");
                self.statistics.departures += 1;
                self.ledger.failures[replica] += 1;
                self.ledger.departures[replica] += 1;
                self.ledger.any = true;
                self.mark_excused(replica, self.replicas[replica].all());
            } else {
                trace!(self, "replica {replica} is in the set again");
            }
        }
    }

    /// When the oldest request in flight began.
    pub(super) fn oldest(&self) -> Moment {
        self.pending
            .iter()
            .map(|p| p.began)
            .min()
            .unwrap_or(NEVER - 1)
    }
}

/// A range, for the trace.
pub(super) fn show(range: SectorRange) -> String {
    format!("{}+{}", range.start, range.count)
}
