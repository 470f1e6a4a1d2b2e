//! A daemon that keeps records, in memory, and what must hold whenever a disk is served.
//!
//! The disk has two extents, each of which holds a number. The daemon obeys the rules of the
//! records in the simplest way. The oracle knows nothing of records: it remembers for each extent
//! which numbers a read may return.

use std::collections::HashMap;

use uuid::Uuid;

use super::choices::Choices;
use crate::record::format::Read;
use crate::record::start::{
    Candidate, Decision, Found, Kept, Options, Refusal, Start, Verdict, decide,
};
use crate::record::{Creation, Extents, Fingerprint, Layout, Record, Threshold};

pub(super) const EXTENTS: usize = 2;
const CAPACITY: u64 = 2 * EXTENTS as u64 * 1024;

/// The daemon was killed.
#[derive(Debug)]
pub(super) struct Killed;

pub(super) type Step = Result<(), Killed>;

/// An image with its record.
#[derive(Clone)]
pub(super) struct Replica {
    pub(super) id: Uuid,
    pub(super) image: [u32; EXTENTS],
    /// When it was modified.
    pub(super) modified: i64,
    pub(super) record: Option<Record>,
    pub(super) intent: Extents,
    /// The history that its image has.
    pub(super) history: Uuid,
}

/// The numbers that a read of each extent may return, in one history.
#[derive(Clone, Debug)]
pub(super) struct History {
    pub(super) legal: [Vec<u32>; EXTENTS],
    /// The version before the newest one, if a failed flush may bring it back.
    pub(super) before: [Option<u32>; EXTENTS],
    /// What a copy may also hold if it is doubtful.
    pub(super) older: [Option<u32>; EXTENTS],
}

pub(super) struct World<'a> {
    pub(super) choices: &'a mut Choices,
    pub(super) replicas: Vec<Replica>,
    pub(super) histories: HashMap<Uuid, History>,
    pub(super) votes: u8,
    names: u128,
    pub(super) numbers: u32,
    pub(super) time: i64,
    /// What may go on after this is not known to the records: no refusal is a fault.
    pub(super) disturbed: bool,
    /// The daemon may be killed in the middle of each step.
    pub(super) kills: bool,
    /// The operator may give another vote threshold at a start.
    pub(super) thresholds: bool,
    /// A copy of an image and its record.
    pub(super) copy: Option<Copy>,
    pub(super) log: Vec<String>,
}

/// A copy of an image and its record.
pub(super) struct Copy {
    pub(super) place: usize,
    pub(super) replica: Replica,
    /// It was made while the disk was served.
    pub(super) while_served: bool,
}

/// A disk that is served.
pub(super) struct Served {
    pub(super) record: Record,
    pub(super) there: Vec<usize>,
    pub(super) history: Uuid,
    /// A write has failed where no replica is stale.
    pub(super) is_undecided: bool,
}

pub(super) fn layout() -> Layout {
    Layout::new(CAPACITY)
}

pub(super) fn extent(place: usize) -> crate::common::SectorRange {
    layout().extent(place as u64)
}

impl<'a> World<'a> {
    /// A disk that was created and ended.
    pub(super) fn new(choices: &'a mut Choices, replicas: usize, votes: u8) -> Self {
        let mut world = Self {
            choices,
            replicas: Vec::new(),
            histories: HashMap::new(),
            votes,
            names: 0,
            numbers: 0,
            time: 0,
            disturbed: false,
            kills: true,
            thresholds: false,
            copy: None,
            log: Vec::new(),
        };
        for _ in 0..replicas {
            let id = world.name();
            world.replicas.push(Replica {
                id,
                image: [0; EXTENTS],
                modified: 0,
                record: None,
                intent: Extents::new(layout()),
                history: Uuid::nil(),
            });
        }
        world
    }

    fn name(&mut self) -> Uuid {
        self.names += 1;
        Uuid::from_u128(self.names)
    }

    /// Tries to serve the disk with the replicas of `there`.
    pub(super) fn serve(&mut self, there: &[usize], force: bool) -> Result<Option<Served>, Killed> {
        let candidates = self.candidates(there);
        let votes = match self.thresholds && self.choices.chance(2) {
            true => u8::try_from(1 + self.choices.of(self.replicas.len())).ok(),
            false => None,
        };
        let options = Options {
            force,
            adopt: None,
            votes,
            run: self.name(),
            branch: self.name(),
        };
        let decision = decide(&candidates, &options);
        self.log
            .push(format!("start {there:?} force {force} votes {votes:?}"));
        match decision {
            Ok(Decision::Create) => self.create(there, &options).map(Some),
            Ok(Decision::Start(start)) => self.start(there, *start).map(Some),
            Err(refusal) => {
                self.log.push(format!("refused: {refusal}"));
                let all_there = there.len() == self.replicas.len() && votes.is_none();
                assert!(
                    !all_there || self.disturbed || matches!(refusal, Refusal::NotAMember { .. }),
                    "refused with all replicas: {refusal}\n{}\n{candidates:#?}",
                    self.log.join("\n")
                );
                Ok(None)
            }
        }
    }

    pub(super) fn candidates(&self, there: &[usize]) -> Vec<Candidate> {
        there.iter().map(|place| self.candidate(*place)).collect()
    }

    pub(super) fn candidate(&self, place: usize) -> Candidate {
        let replica = &self.replicas[place];
        let kept = replica.record.as_ref().map_or(Kept::Absent, |record| {
            Kept::Read(Box::new(read(record, &replica.intent)))
        });
        Candidate {
            node_name: place.to_string(),
            path: place.to_string().into(),
            image: Ok(Found {
                fingerprint: Some(replica.fingerprint()),
                kept,
            }),
        }
    }

    fn create(&mut self, there: &[usize], options: &Options) -> Result<Served, Killed> {
        if there.len() < self.replicas.len() {
            return Err(Killed);
        }
        let members = there.iter();
        let members = members.map(|place| (self.replicas[*place].id, place.to_string()));
        let members: Vec<_> = members.collect();
        let record = Record::create(&Creation {
            disk: self.name(),
            branch: options.branch,
            run: options.run,
            layout: layout(),
            threshold: Threshold {
                votes: self.votes,
                follows_majority: false,
            },
            members,
        });
        let history = History {
            legal: [const { Vec::new() }; EXTENTS].map(|_: Vec<u32>| vec![0]),
            before: [None; EXTENTS],
            older: [None; EXTENTS],
        };
        self.histories.insert(Uuid::nil(), history);
        let mut served = Served {
            record,
            there: there.to_vec(),
            history: Uuid::nil(),
            is_undecided: false,
        };
        for place in there {
            self.replicas[*place].intent = Extents::new(layout());
        }
        self.begin_history(&mut served, there);
        assert!(self.change_table(&mut served)?, "all replicas are there");
        Ok(served)
    }

    fn start(&mut self, there: &[usize], start: Start) -> Result<Served, Killed> {
        self.check(there, &start);
        self.votes = start.record.threshold.votes;
        let voting: Vec<usize> = voting(there, &start.images);
        let history = self.replicas[voting[0]].history;
        let mut served = Served {
            record: start.record.clone(),
            there: there.to_vec(),
            history,
            is_undecided: false,
        };
        // All pages, before the slots: an active replica knows everything that is marked.
        let intent = start.unsettled.clone();
        for place in there {
            self.replicas[*place].intent = intent.clone();
        }
        assert!(self.change_table(&mut served)?, "a start that is allowed");
        self.begin_history(&mut served, &voting);
        self.settle(&mut served, &start.images)?;
        Ok(served)
    }

    /// From now on the branch of the table is a history of its own.
    fn begin_history(&mut self, served: &mut Served, replicas: &[usize]) {
        let tip = served.record.lineage.last().unwrap().id;
        let history = self.histories[&served.history].clone();
        self.histories.entry(tip).or_insert(history);
        let before = std::mem::replace(&mut served.history, tip);
        for (place, replica) in self.replicas.iter_mut().enumerate() {
            // Those of an earlier start of this branch, which was cut short, are of it as well.
            let lineage = replica.record.iter().flat_map(|record| &record.lineage);
            let knows = lineage.into_iter().any(|branch| branch.id == tip);
            if replicas.contains(&place) || knows && replica.history == before {
                replica.history = tip;
            }
        }
    }

    /// What no start may do.
    fn check(&mut self, there: &[usize], start: &Start) {
        let voting = voting(there, &start.images);
        let log = || self.log.join("\n");
        let of: Vec<Uuid> = voting
            .iter()
            .map(|place| self.replicas[*place].history)
            .collect();
        assert!(
            start.forced || of.iter().all(|history| *history == of[0]),
            "two histories are served: {start:#?}\n{}",
            log()
        );
        let tip = start.record.lineage.last().unwrap().id;
        if start.forced {
            // A history of its own begins: what the others know is given up.
            let mut history = self.histories[&of[0]].clone();
            for (place, image) in there.iter().zip(&start.images) {
                for (index, legal) in history.legal.iter_mut().enumerate() {
                    let number = self.replicas[*place].image[index];
                    if image.votes() && !image.stale.overlaps(extent(index)) {
                        legal.push(number);
                    }
                }
            }
            self.histories.insert(tip, history);
            self.disturbed = true;
            return;
        }
        let history = self.histories.get(&tip);
        let history = history.unwrap_or(&self.histories[&of[0]]);
        for (place, image) in there.iter().zip(&start.images) {
            for (index, legal) in history.legal.iter().enumerate() {
                let number = self.replicas[*place].image[index];
                let is_fresh = image.votes() && !image.stale.overlaps(extent(index));
                let is_doubtful = image.doubtful.overlaps(extent(index));
                let may_be_older = is_doubtful && history.older[index] == Some(number);
                assert!(
                    !is_fresh || legal.contains(&number) || may_be_older,
                    "replica {place} is stale in extent {index}: {number}, not {legal:?}\n{}",
                    log()
                );
            }
        }
    }
}

impl Replica {
    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            bytes: 512 * CAPACITY,
            modified_ns: self.modified,
        }
    }
}

pub(super) fn read(record: &Record, intent: &Extents) -> Read {
    Read {
        record: record.clone(),
        intent: intent.clone(),
        slots: [None, None],
        unverified_pages: Vec::new(),
    }
}

fn voting(there: &[usize], images: &[Verdict]) -> Vec<usize> {
    let voting = there.iter().zip(images).filter(|(_, image)| image.votes());
    voting.map(|(place, _)| *place).collect()
}
