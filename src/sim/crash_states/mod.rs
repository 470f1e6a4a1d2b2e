//! Every crash state of every small history: what can be on the replicas when the power fails.
//!
//! A history is a few writes and flushes of two sectors. All ways in which the guest can overlap
//! them and the replicas can answer are explored with the real engine, one input at a time. At each
//! moment a sector of a replica may hold, after a crash, any of the values written to it since it
//! was last made durable, those in flight included, whatever the other sectors and replicas hold.
//! The records of the replicas are written by the engine too, and each write to one that is in
//! flight is there or not. Every subset of the replicas is started with the records of each such
//! state; where the disk is served, all combinations of what the sectors may hold are voted on.
//!
//! The writes to the records that are in flight end together: what the engine does next depends on
//! all of them, and after a crash each may be there or not in any case.
//!
//! Two paths that lead to the same state are followed once. What makes a state is what every
//! replica may hold and has answered, and the order in which requests began and ended; replicas are
//! alike.

use std::collections::BTreeSet;
use std::sync::Arc;

mod starts;
mod votes;

use self::starts::{Outcome, Served, Starts};
use self::votes::{Stand, Votes, check_crash_state};
use super::Violation;
use super::effects::{Collected, Effect, SECTOR_LEN, fill, number_of, parse, tag};
use super::model::{Model, Value};
use super::plan::bits;
use super::policy;
use super::records::File;
use crate::common::buffer::BufferPool;
use crate::common::clock::TurnClock;
use crate::common::operation::{Action, Operation};
use crate::common::{Errno, SectorRange};
use crate::engine::{Engine, GuestRequest, Shared, Tag, WorkerIndex};

const SECTORS: usize = 2;

/// What a guest does in a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// Writes this sector.
    Write(usize),
    /// Writes both sectors.
    WriteBoth,
    /// Flushes.
    Flush,
}

/// All of them.
pub const ACTS: [Act; 4] = [Act::Write(0), Act::Write(1), Act::WriteBoth, Act::Flush];

/// A disk, and at most one fault.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// N.
    pub replicas: usize,
    /// t.
    pub threshold: usize,
    /// The first replica fails this act.
    pub fails: Option<usize>,
}

/// What the exploration has found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    /// States of engine and replicas.
    pub states: u64,
    /// Crash states of a sector, over all replicas.
    pub crash_states: u64,
    /// Votes on them, each of the replicas of one start.
    pub starts: u64,
}

/// One step of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// The guest makes its next request.
    Submit,
    /// The reply of this replica to this act arrives.
    Deliver { act: usize, replica: usize },
    /// The writes to the records end.
    Remember,
}

#[derive(Debug)]
struct Flight {
    act: usize,
    operation: Operation,
    /// A flush: what was dirty when it was submitted.
    covers: [Option<Value>; SECTORS],
}

/// What a replica may hold after a crash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    /// The possible values of each sector, in the order in which they were written.
    possible: [Vec<Value>; SECTORS],
    /// The last value that the next flush will make durable.
    dirty: [Option<Value>; SECTORS],
    /// In flight: the act, and what the flush covers.
    in_flight: Vec<(usize, [Option<Value>; SECTORS])>,
    answered: Vec<usize>,
}

/// What makes a state: when each request was made and answered, what the first replica and the
/// others may hold, and the record of the first one, before and after it is written.
type Signature = (Vec<(usize, bool)>, Held, Vec<Held>, [usize; 2]);

/// An engine somewhere in a history.
struct State<'a> {
    case: Case,
    history: &'a [Act],
    engine: Engine,
    pool: BufferPool,
    effects: Collected,
    flights: Vec<Flight>,
    /// The records, and the writes to them that are in flight.
    files: Vec<File>,
    record_writes: Vec<Operation>,
    held: Vec<Held>,
    model: Model,
    submitted: usize,
    flush_began: Vec<u64>,
    /// When each request was made and answered: +act, -act.
    events: Vec<(usize, bool)>,
    now: u64,
}

/// Explores all histories of `length` acts.
///
/// # Errors
/// A sector that fails its vote without need, or a flushed write that is lost; with the path to it.
pub fn explore_all(case: Case, length: u32) -> Result<Found, Violation> {
    let mut found = Found::default();
    let mut votes = Votes::default();
    let mut starts = Starts::new(case);
    for number in 0..ACTS.len().pow(length) {
        let digit = |place| number / ACTS.len().pow(place) % ACTS.len();
        let history: Vec<Act> = (0..length).map(|place| ACTS[digit(place)]).collect();
        explore(case, &history, (&mut votes, &mut starts), &mut found)?;
    }
    Ok(found)
}

fn explore(
    case: Case,
    history: &[Act],
    (votes, starts): (&mut Votes, &mut Starts),
    found: &mut Found,
) -> Result<(), Violation> {
    let pool = BufferPool::default();
    let mut seen = BTreeSet::new();
    let mut paths: Vec<Vec<Step>> = vec![Vec::new()];
    while let Some(path) = paths.pop() {
        let mut state = State::new(case, history, pool.clone(), starts);
        for step in &path {
            state.take(*step);
        }
        if !seen.insert(state.signature(starts)) {
            continue;
        }
        found.states += 1;
        state.check(votes, starts, found).map_err(|v| {
            Violation::new(v.rule, format!("{} {case:?} {history:?} {path:?}", v.text))
        })?;
        for step in state.next() {
            let mut longer = path.clone();
            longer.push(step);
            paths.push(longer);
        }
    }
    Ok(())
}

impl<'a> State<'a> {
    fn new(case: Case, history: &'a [Act], pool: BufferPool, starts: &Starts) -> Self {
        let policy = policy::plain(case.threshold);
        let shared = Arc::new(Shared::new(
            case.replicas,
            case.threshold,
            1,
            SECTORS as u64,
        ));
        let (files, keeper) = starts.new_disk();
        shared.remember(keeper);
        let held = Held {
            possible: std::array::from_fn(|sector| vec![Value::written(0, sector)]),
            dirty: [None; SECTORS],
            in_flight: Vec::new(),
            answered: Vec::new(),
        };
        let mut engine = Engine::new(
            WorkerIndex(0),
            policy,
            shared,
            pool.clone(),
            TurnClock::default(),
        );
        // No resync: a history is too short for one.
        engine.stop_background();
        Self {
            case,
            history,
            engine,
            pool,
            effects: Collected::default(),
            flights: Vec::new(),
            files,
            record_writes: Vec::new(),
            held: vec![held; case.replicas],
            model: Model::new(SECTORS),
            submitted: 0,
            flush_began: vec![0; history.len()],
            events: Vec::new(),
            now: 2,
        }
    }

    /// The steps that may come next.
    fn next(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = self.flights.iter().map(step_of).collect();
        if self.submitted < self.history.len() {
            steps.push(Step::Submit);
        }
        if !self.record_writes.is_empty() {
            steps.push(Step::Remember);
        }
        steps
    }

    fn take(&mut self, step: Step) {
        self.now += 1;
        match step {
            Step::Submit => self.submit(),
            Step::Deliver { .. } => self.deliver(step),
            Step::Remember => self.end_record_writes(),
        }
        let effects: Vec<Effect> = self.effects.effects.drain(..).collect();
        for effect in effects {
            match effect {
                Effect::Submit(operation) => match operation.action {
                    Action::Record { .. } => self.record_writes.push(operation),
                    _ => self.take_off(operation),
                },
                Effect::Complete(tag, result) => self.completed(tag, result.is_ok()),
                Effect::Report(_) | Effect::Written(_) | Effect::HealthChanged => {}
                Effect::Wake(..) | Effect::ContentsDiffer(_) => {
                    unreachable!("one worker, no blkverify")
                }
                Effect::JobChanged(_)
                | Effect::Released(_)
                | Effect::Equal(..)
                | Effect::PreferenceBegins(..)
                | Effect::PreferenceEnds(..) => {
                    unreachable!("no operator")
                }
            }
        }
    }

    fn submit(&mut self) {
        let act = self.submitted;
        self.submitted += 1;
        self.events.push((act, true));
        let request = match self.history[act].sectors() {
            None => {
                self.flush_began[act] = self.now;
                GuestRequest::Flush
            }
            Some(range) => {
                let mut data = self.pool.take(usize::try_from(range.bytes()).expect("few"));
                let start = usize::try_from(range.start).expect("few");
                for (index, bytes) in data.chunks_exact_mut(SECTOR_LEN).enumerate() {
                    let value = value_of(act, start + index);
                    fill(bytes, value);
                    self.model.write_began(start + index, value, self.now);
                }
                let durable = false;
                GuestRequest::Write {
                    range,
                    data,
                    durable,
                }
            }
        };
        self.engine
            .submit(tag(act as u64), request, &mut self.effects);
    }

    /// From now on the operation may have had its effect.
    fn take_off(&mut self, operation: Operation) {
        let replica = operation.replica.as_usize();
        let (held, case) = (&mut self.held[replica], self.case);
        let mut covers = [None; SECTORS];
        let act = match &operation.action {
            Action::Read { .. } | Action::Zero { .. } | Action::FindData { .. } => {
                unreachable!("no history reads or discards")
            }
            Action::Record { .. } => unreachable!("it has no act"),
            Action::Write { range, data, .. } => {
                let value = parse(&data[..SECTOR_LEN]).and_then(Value::write);
                let act = usize::try_from(value.expect("a guest's write")).expect("few") - 1;
                for sector in range.start..range.end() {
                    let sector = usize::try_from(sector).expect("few");
                    held.possible[sector].push(value_of(act, sector));
                }
                act
            }
            Action::Flush => {
                // A flush that is going to fail may have dropped the pages by now.
                let dropping = held.in_flight.iter().any(|(act, _)| {
                    replica == 0 && case.fails == Some(*act) && self.history[*act] == Act::Flush
                });
                if !dropping {
                    covers = held.dirty;
                }
                let is_this = |act: &usize| {
                    let asked = held
                        .in_flight
                        .iter()
                        .map(|(act, _)| act)
                        .chain(&held.answered);
                    self.history[*act] == Act::Flush && !asked.into_iter().any(|other| other == act)
                };
                (0..self.submitted).find(is_this).expect("a guest's flush")
            }
        };
        held.in_flight.push((act, covers));
        self.flights.push(Flight {
            act,
            operation,
            covers,
        });
    }

    fn deliver(&mut self, step: Step) {
        let index = self
            .flights
            .iter()
            .position(|flight| step_of(flight) == step);
        let flight = self
            .flights
            .swap_remove(index.expect("a step that is possible"));
        let replica = flight.operation.replica.as_usize();
        let fails = replica == 0 && self.case.fails == Some(flight.act);
        let held = &mut self.held[replica];
        held.in_flight.retain(|(act, _)| *act != flight.act);
        held.answered.push(flight.act);
        held.answered.sort_unstable();
        match (&flight.operation.action, fails) {
            (Action::Write { range, .. }, false) => {
                for sector in range.start..range.end() {
                    let sector = usize::try_from(sector).expect("few");
                    held.dirty[sector] = Some(value_of(flight.act, sector));
                }
            }
            (Action::Flush, false) => {
                for (sector, covered) in flight.covers.iter().enumerate() {
                    let Some(covered) = covered else { continue };
                    let possible = &mut held.possible[sector];
                    if let Some(place) = possible.iter().position(|value| value == covered) {
                        possible.drain(..place);
                    }
                    held.dirty[sector] = held.dirty[sector].filter(|dirty| dirty != covered);
                }
            }
            (Action::Flush, true) => held.dirty = [None; SECTORS],
            (Action::Write { .. }, true) => {}
            (Action::Read { .. } | Action::Zero { .. } | Action::FindData { .. }, _) => {}
            (Action::Record { .. }, _) => unreachable!("it has no act"),
        }
        let result = if fails { Err(Errno(5)) } else { Ok(()) };
        self.engine
            .reply(flight.operation.reply(result), &mut self.effects);
    }

    /// The writes to the records that are in flight end.
    fn end_record_writes(&mut self) {
        for operation in std::mem::take(&mut self.record_writes) {
            write_record(&mut self.files[operation.replica.as_usize()], &operation);
            self.engine
                .reply(operation.reply(Ok(())), &mut self.effects);
        }
    }

    fn completed(&mut self, tag: Tag, success: bool) {
        self.now += 1;
        let act = usize::try_from(number_of(tag)).expect("few");
        self.events.push((act, false));
        match self.history[act].sectors() {
            None if success => self.model.flushed(self.flush_began[act], 0),
            None => {}
            Some(range) => {
                for sector in range.start..range.end() {
                    let sector = usize::try_from(sector).expect("few");
                    let value = value_of(act, sector);
                    self.model
                        .write_ended(sector, value, self.now, success, false);
                }
            }
        }
    }

    /// What makes a state. The record of the first replica stands for all.
    fn signature(&self, starts: &mut Starts) -> Signature {
        // The first replica is the one that may fail; the others are alike.
        let mut others = self.held[1..].to_vec();
        others.sort();
        let mut file = self.files[0].clone();
        let before = starts.number(&file);
        let mut writes = self.record_writes.iter();
        if let Some(operation) = writes.find(|write| write.replica.as_usize() == 0) {
            write_record(&mut file, operation);
        }
        let records = [before, starts.number(&file)];
        (self.events.clone(), self.held[0].clone(), others, records)
    }

    /// The power fails now.
    fn check(
        &self,
        votes: &mut Votes,
        starts: &mut Starts,
        found: &mut Found,
    ) -> Result<(), Violation> {
        let mut model = self.model.clone();
        model.crashed(self.now);
        let served = self.served(starts)?;
        for sector in 0..SECTORS {
            let permitted: Vec<Value> = model.permitted(sector).collect();
            let mut ways = BTreeSet::new();
            for (present, start) in &served {
                let stands: Vec<Stand> = start.stands.iter().map(|stand| stand[sector]).collect();
                if start.marked[sector] {
                    ways.insert((*present, stands));
                } else {
                    self.check_unmarked(sector, *present)?;
                }
            }
            if ways.is_empty() {
                continue;
            }
            let mut choice = vec![0; self.case.replicas];
            loop {
                let values: Vec<Value> = choice
                    .iter()
                    .zip(&self.held)
                    .map(|(place, held)| held.possible[sector][*place])
                    .collect();
                found.crash_states += 1;
                for (present, stands) in &ways {
                    found.starts += 1;
                    check_crash_state(
                        &permitted,
                        &values,
                        (*present, stands),
                        (self.case.threshold, &mut *votes),
                    )?;
                }
                // The next combination.
                let next = (0..choice.len())
                    .find(|r| choice[*r] + 1 < self.held[*r].possible[sector].len());
                let Some(next) = next else { break };
                choice[..next].fill(0);
                choice[next] += 1;
            }
        }
        Ok(())
    }

    /// S3: all ways in which the disk is served, for each subset of the replicas that may start,
    /// and each state of their records.
    fn served(&self, starts: &mut Starts) -> Result<BTreeSet<(u32, Served)>, Violation> {
        let Case {
            replicas,
            threshold,
            fails,
        } = self.case;
        let mut served = BTreeSet::new();
        for written in 0_u32..1 << self.record_writes.len() {
            let mut files = self.files.clone();
            for (index, operation) in self.record_writes.iter().enumerate() {
                if written >> index & 1 == 1 {
                    write_record(&mut files[operation.replica.as_usize()], operation);
                }
            }
            let numbers: Vec<usize> = files.iter().map(|file| starts.number(file)).collect();
            let files: Vec<&File> = files.iter().collect();
            for present in 1_u32..1 << replicas {
                let count = usize::try_from(present.count_ones()).expect("few");
                let may_start = count >= threshold && replicas - count < threshold;
                let outcome = starts.outcome(&files, &numbers, present);
                let what = match (outcome, may_start) {
                    (Outcome::Served(start), true) => {
                        served.insert((present, start.clone()));
                        continue;
                    }
                    (Outcome::TooFewCopies, true) if fails.is_some() => continue,
                    (Outcome::TooFewCopies | Outcome::Refused(_), false) => continue,
                    (outcome, _) => format!("{outcome:?}"),
                };
                let text = format!("{present:b} with {written:b} of the records written: {what}");
                return Err(Violation::new("S3", text));
            }
        }
        Ok(served)
    }

    /// S4: where the records mark nothing no copy can have changed.
    fn check_unmarked(&self, sector: usize, present: u32) -> Result<(), Violation> {
        let changed = |replica: usize| self.held[replica].possible[sector].len() > 1;
        let mut present = bits(u64::from(present));
        match present.any(changed) {
            true => Err(Violation::new("S4", format!("{sector} is not marked"))),
            false => Ok(()),
        }
    }
}

/// The operation has its effect.
fn write_record(file: &mut File, operation: &Operation) {
    if let Action::Record {
        offset_bytes,
        bytes,
    } = &operation.action
    {
        file.write(*offset_bytes, bytes, || true);
    }
}

impl Act {
    /// What it writes; a flush nothing.
    fn sectors(self) -> Option<SectorRange> {
        match self {
            Self::Write(sector) => Some(SectorRange::new(sector as u64, 1)),
            Self::WriteBoth => Some(SectorRange::new(0, SECTORS as u64)),
            Self::Flush => None,
        }
    }
}

/// What an act puts into a sector.
fn value_of(act: usize, sector: usize) -> Value {
    Value::written(act as u64 + 1, sector)
}

fn step_of(flight: &Flight) -> Step {
    Step::Deliver {
        act: flight.act,
        replica: flight.operation.replica.as_usize(),
    }
}
