//! What becomes of one sector whose copies are in doubt after failed writes, a failed flush or an
//! unclean end (contract W7, S5): a read settles it, through the engine, while replicas fail what
//! it asks of them.

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::report::{Cause, Report};
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::quorum::health::Remembered;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

use super::cases::for_each;

const RANGE: SectorRange = SectorRange { start: 8, count: 1 };
/// What the sector holds at first; later versions have the numbers after it.
const OLD: u8 = 1;

/// What a replica does with a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    Done,
    /// It fails, and the replica holds the new version.
    FailedWritten,
    /// It fails, and the replica holds what it held.
    Failed,
    /// The same the first time.
    FailedOnce,
}

/// What a replica does with a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Done,
    /// It fails, and the replica still holds what it held.
    FailedKept,
    /// It fails, and the replica holds what is on stable storage.
    FailedLost,
}

/// How a replica answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Behaviour {
    write: Write,
    flush: Flush,
}

const WELL: Behaviour = Behaviour {
    write: Write::Done,
    flush: Flush::Done,
};

/// Every way to fail while a read settles the sector.
const FAULTS: [Behaviour; 4] = [
    Behaviour {
        write: Write::Failed,
        ..WELL
    },
    Behaviour {
        write: Write::FailedOnce,
        ..WELL
    },
    Behaviour {
        flush: Flush::FailedKept,
        ..WELL
    },
    Behaviour {
        flush: Flush::FailedLost,
        ..WELL
    },
];

/// The copy of a replica.
#[derive(Clone, Copy, Debug)]
struct Copy {
    held: u8,
    durable: u8,
}

struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    pool: BufferPool,
    effects: Collected,
    copies: Vec<Copy>,
    behaviour: Vec<Behaviour>,
    requests: u64,
    accusations: usize,
}

impl Disk {
    /// Replicas that hold these versions durably. `changed`: they may differ after an unclean end.
    fn new(versions: &[u8], threshold: usize, changed: bool) -> Self {
        let replicas = versions.len();
        let shared = Arc::new(Shared::new(replicas, threshold, 1, 64));
        if changed {
            let mut ranges = RangeSet::default();
            ranges.insert(RANGE);
            let remembered = Remembered {
                members: ReplicaSet::first(replicas),
                in_service: ReplicaSet::first(replicas),
                ..Remembered::default()
            };
            shared.restore(&remembered, &ranges, |_| ());
        }
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let policy = policy::plain(threshold);
        let mut engine = Engine::new(
            WorkerIndex(0),
            policy,
            Arc::clone(&shared),
            pool.clone(),
            clock,
        );
        engine.stop_background();
        let copy = |version: &u8| Copy {
            held: *version,
            durable: *version,
        };
        Self {
            engine,
            shared,
            pool,
            effects: Collected::default(),
            copies: versions.iter().map(copy).collect(),
            behaviour: vec![WELL; replicas],
            requests: 0,
            accusations: 0,
        }
    }

    /// Whether the request succeeded.
    fn run(&mut self, request: GuestRequest) -> bool {
        self.requests += 1;
        self.engine
            .submit(tag(self.requests), request, &mut self.effects);
        let (mut success, mut steps) = (None, 0);
        while !self.effects.effects.is_empty() {
            steps += 1;
            assert!(steps < 10_000, "it does not end: {:?}", self.behaviour);
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.carry_out(operation),
                Effect::Complete(_, result) => success = Some(result.is_ok()),
                Effect::Report(Report::Bad {
                    cause: Cause::Corrupt(_),
                    ..
                }) => self.accusations += 1,
                _ => {}
            }
        }
        success.expect("every request is answered")
    }

    fn carry_out(&mut self, mut operation: Operation) {
        let replica = operation.replica.as_usize();
        let copy = &mut self.copies[replica];
        let Behaviour { write, flush } = self.behaviour[replica];
        let success = match &mut operation.action {
            Action::Read { into, .. } => {
                into.fill(copy.held);
                true
            }
            Action::Write { data, .. } => {
                if matches!(write, Write::Done | Write::FailedWritten) {
                    copy.held = data[0];
                }
                if write == Write::FailedOnce {
                    self.behaviour[replica].write = Write::Done;
                }
                write == Write::Done
            }
            Action::Flush => {
                match flush {
                    Flush::Done => copy.durable = copy.held,
                    Flush::FailedKept => {}
                    Flush::FailedLost => copy.held = copy.durable,
                }
                flush == Flush::Done
            }
            action => panic!("{action:?}"),
        };
        let result = if success { Ok(()) } else { Err(Errno(5)) };
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }

    /// The version that a read brings.
    fn read(&mut self) -> Option<u8> {
        let success = self.run(GuestRequest::Read(RANGE));
        let value = self.effects.values.pop();
        success.then(|| {
            let value = value.flatten().expect("one version");
            value.0.to_le_bytes()[0]
        })
    }

    fn write(&mut self, version: u8) -> bool {
        let mut data = self.pool.take(512);
        data.fill(version);
        let (range, durable) = (RANGE, false);
        self.run(GuestRequest::Write {
            range,
            data,
            durable,
        })
    }

    fn flush(&mut self) -> bool {
        self.run(GuestRequest::Flush)
    }

    fn holders(&self, version: u8, held: fn(&Copy) -> u8) -> usize {
        let copies = self.copies.iter();
        copies.filter(|copy| held(copy) == version).count()
    }

    /// The replicas that votes count.
    fn fresh(&self) -> impl Iterator<Item = &Copy> {
        let is_fresh = |replica: &ReplicaIndex| self.shared.stale_sectors(*replica) == 0;
        let fresh = self.shared.members().iter().filter(is_fresh);
        fresh.map(|replica| &self.copies[replica.as_usize()])
    }
}

/// What the guest knows before the sector is read.
#[derive(Clone, Copy, Debug)]
struct Told {
    /// The last version of which a write succeeded.
    acknowledged: u8,
    /// The last one that was written.
    last: u8,
    /// A flush has failed.
    lost: bool,
}

#[derive(Debug, Default)]
struct Counts {
    cases: u64,
    /// The read that settled the sector failed.
    unsettled: u64,
    /// It returned something else than the last version.
    older: u64,
}

/// Reads the sector while these replicas fail, and then again and again when all work.
fn settle(mut disk: Disk, threshold: usize, told: Option<Told>, counts: &mut Counts) {
    let faulty = disk.behaviour.clone();
    let first = disk.read();
    if let Some(version) = first {
        let holders = disk.holders(version, |copy| copy.held);
        assert!(holders >= threshold, "{version} is held by {holders}");
        let others = disk.fresh().filter(|copy| copy.held != version).count();
        assert_eq!(others, 0, "a replica votes that does not hold {version}");
        if let Some(told) = told {
            counts.older += u64::from(version != told.last);
            let is_legal = told.lost || version >= told.acknowledged;
            assert!(is_legal, "{version} after {told:?}");
        }
    }
    let is_well = |replica: &&Behaviour| **replica == WELL;
    let enough = faulty.iter().filter(is_well).count() >= threshold;
    let any_copy = told.is_none();
    assert!(!(any_copy && enough) || first.is_some(), "{faulty:?}");
    counts.cases += 1;
    counts.unsettled += u64::from(first.is_none());

    disk.behaviour.fill(WELL);
    let equal = disk.copies.iter().all(|c| c.held == disk.copies[0].held);
    let again = disk.read();
    assert!(
        first.is_none() || again == first,
        "{first:?}, then {again:?}"
    );
    assert!(!equal || again.is_some(), "all are equal");
    if let Some(version) = again {
        // One may fail for what is undone, and one for what could not be settled before.
        let flushed = (0..3).any(|_| disk.flush());
        assert!(flushed, "nothing is lost, and flushes fail");
        assert_eq!(disk.read(), Some(version));
        let durable = disk.holders(version, |copy| copy.durable);
        assert!(durable >= threshold, "{version} is durable on {durable}");
    }
    assert_eq!(disk.accusations, 0, "no replica is at fault: {faulty:?}");
}

/// Calls `visit` with every way in which these replicas fail while the sector is settled. If there
/// are more than three, all that fail do so in the same way.
fn each_fault(replicas: usize, mut visit: impl FnMut(&[Behaviour])) {
    if replicas <= 3 {
        let [write, once, kept, lost] = FAULTS;
        return each_of(&[WELL, write, once, kept, lost], replicas, visit);
    }
    visit(&vec![WELL; replicas]);
    for fault in FAULTS {
        for set in 1..1_u32 << replicas {
            let fails = |place| set >> place & 1 == 1;
            let behaviour = (0..replicas).map(|place| if fails(place) { fault } else { WELL });
            visit(&behaviour.collect::<Vec<_>>());
        }
    }
}

/// Every combination of what the replicas do.
fn each_of<T: std::marker::Copy>(all: &[T], replicas: usize, mut visit: impl FnMut(&[T])) {
    let combinations = all.len().pow(u32::try_from(replicas).unwrap());
    for number in 0..combinations {
        let choice = |place| all[number / all.len().pow(u32::try_from(place).unwrap()) % all.len()];
        visit(&(0..replicas).map(choice).collect::<Vec<_>>());
    }
}

fn report(what: &str, counts: &Counts) {
    println!("{what}: {counts:?}");
    assert!(0 < counts.unsettled && counts.unsettled < counts.cases);
}

/// Writes, and what each replica does with each of them, and then with a flush.
fn after(writes: &[&[Write]], flushes: Option<&[Flush]>, threshold: usize, counts: &mut Counts) {
    let replicas = writes[0].len();
    each_fault(replicas, |faulty| {
        let mut disk = Disk::new(&vec![OLD; replicas], threshold, false);
        let mut told = Told {
            acknowledged: OLD,
            last: OLD,
            lost: false,
        };
        for write in writes {
            for (behaviour, write) in disk.behaviour.iter_mut().zip(*write) {
                behaviour.write = *write;
            }
            told.last += 1;
            if disk.write(told.last) {
                told.acknowledged = told.last;
            }
        }
        if let Some(flushes) = flushes {
            for (behaviour, flush) in disk.behaviour.iter_mut().zip(flushes) {
                behaviour.flush = *flush;
            }
            told.lost = !disk.flush();
        }
        disk.behaviour.copy_from_slice(faulty);
        settle(disk, threshold, Some(told), counts);
    });
}

const WRITES: [Write; 3] = [Write::Done, Write::FailedWritten, Write::Failed];
const FLUSHES: [Flush; 3] = [Flush::Done, Flush::FailedKept, Flush::FailedLost];

/// One write for up to five replicas, and two for up to three.
#[test]
fn of_failed_writes() {
    let mut counts = Counts::default();
    for replicas in 1..=5 {
        for threshold in 1..=replicas {
            each_of(&WRITES, replicas, |first| {
                after(&[first], None, threshold, &mut counts);
                if replicas <= 3 {
                    each_of(&WRITES, replicas, |second| {
                        after(&[first, second], None, threshold, &mut counts);
                    });
                }
            });
        }
    }
    report("failed writes", &counts);
}

/// Up to five replicas that have written all and fail a flush, and up to three that may have failed
/// the write before.
#[test]
fn of_failed_flushes() {
    let mut counts = Counts::default();
    for replicas in 1..=5 {
        for threshold in 1..=replicas {
            each_of(&FLUSHES, replicas, |flushes| {
                let done = vec![Write::Done; replicas];
                if replicas > 3 {
                    return after(&[&done], Some(flushes), threshold, &mut counts);
                }
                each_of(&WRITES, replicas, |write| {
                    after(&[write], Some(flushes), threshold, &mut counts);
                });
            });
        }
    }
    report("failed flushes", &counts);
}

/// Up to six replicas, which hold any versions.
#[test]
fn of_unclean_ends() {
    let mut counts = Counts::default();
    for replicas in 1..=6 {
        for threshold in 1..=replicas {
            for_each(replicas, &[], &[|version| OLD + version], &mut |versions| {
                each_fault(replicas, |faulty| {
                    let mut disk = Disk::new(versions, threshold, true);
                    disk.behaviour.copy_from_slice(faulty);
                    settle(disk, threshold, None, &mut counts);
                });
            });
        }
    }
    report("unclean ends", &counts);
}
