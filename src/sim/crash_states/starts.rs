//! The records of a small disk, and the starts that they allow: each is decided once.

use std::collections::HashMap;
use std::path::PathBuf;

use uuid::Uuid;

use super::super::plan::bits;
use super::super::records::{File, name};
use super::votes::Stand;
use super::{Case, SECTORS};
use crate::common::{ReplicaSet, SectorRange};
use crate::record::start::{Candidate, Decision, Found, Options, Refusal, Start, decide};
use crate::record::{Creation, Extents, Holder, Keeper, Layout, Record, Threshold};

/// What a start makes of the images that are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The disk is served.
    Served(Served),
    /// Too few of them may vote.
    TooFewCopies,
    /// It is refused for another reason.
    Refused(String),
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Served {
    /// How each image is remembered, for each sector.
    pub(super) stands: Vec<[Stand; SECTORS]>,
    /// Where replicas may differ.
    pub(super) marked: [bool; SECTORS],
}

/// All starts so far.
#[derive(Debug)]
pub(super) struct Starts {
    /// The records of the new disk.
    files: Vec<File>,
    keeper: Keeper,
    /// A number for each content of a record.
    contents: HashMap<File, usize>,
    outcomes: HashMap<(Vec<usize>, u32), Outcome>,
}

fn id(number: usize) -> Uuid {
    Uuid::from_u128(number as u128 + 1)
}

/// The records of a new disk, with an extent for each sector, none of which is marked.
fn create(case: Case) -> (Vec<File>, Keeper) {
    let mut files = vec![File::default(); case.replicas];
    let members = 0..case.replicas;
    let record = Record::create(&Creation {
        disk: id(100),
        branch: id(101),
        run: id(102),
        layout: Layout::with_extents(SECTORS as u64, 1),
        threshold: Threshold {
            votes: u8::try_from(case.threshold).expect("few"),
            follows_majority: false,
        },
        members: members
            .clone()
            .map(|place| (id(place), name(place)))
            .collect(),
    });
    let holder = |place| {
        let (member, sequence) = (id(place), 0);
        Some(Holder { member, sequence })
    };
    let unmarked = Extents::new(record.layout());
    let mut keeper = Keeper::new(record, members.map(holder).collect(), unmarked);
    while let Some(round) = keeper.next_round() {
        let mut asked = ReplicaSet::EMPTY;
        for (replica, write) in &round.writes {
            asked.insert(*replica);
            files[replica.as_usize()].write(write.offset_bytes, &write.bytes, || true);
        }
        keeper.ended(asked);
    }
    (files, keeper)
}

impl Starts {
    /// None yet, of the disk of this case.
    pub(super) fn new(case: Case) -> Self {
        let (files, keeper) = create(case);
        Self {
            files,
            keeper,
            contents: HashMap::new(),
            outcomes: HashMap::new(),
        }
    }

    /// The records of the disk when it is new.
    pub(super) fn new_disk(&self) -> (Vec<File>, Keeper) {
        (self.files.clone(), self.keeper.clone())
    }

    /// A number for the content of a record.
    pub(super) fn number(&mut self, file: &File) -> usize {
        let next = self.contents.len();
        match self.contents.get(file) {
            Some(number) => *number,
            None => *self.contents.entry(file.clone()).or_insert(next),
        }
    }

    /// The start with the images of `present`, a mask, whose records are `files`, with these
    /// numbers.
    pub(super) fn outcome(&mut self, files: &[&File], numbers: &[usize], present: u32) -> &Outcome {
        let key = (numbers.to_vec(), present);
        self.outcomes.entry(key).or_insert_with(|| {
            let candidate = |place: usize| Candidate {
                node_name: name(place),
                path: PathBuf::from(name(place)),
                image: match present >> place & 1 {
                    0 => Err("it is missing".to_owned()),
                    _ => Ok(Found {
                        fingerprint: None,
                        kept: files[place].kept(),
                    }),
                },
            };
            let candidates: Vec<Candidate> = (0..files.len()).map(candidate).collect();
            let options = Options {
                force: false,
                adopt: None,
                votes: None,
                run: id(103),
                branch: id(104),
            };
            match decide(&candidates, &options) {
                Ok(Decision::Start(start)) => Outcome::Served(served(&start, present)),
                Ok(Decision::Create) => Outcome::Refused("it is a new disk".to_owned()),
                Err(Refusal::TooFewCopies { .. } | Refusal::OnlyCopies { .. }) => {
                    Outcome::TooFewCopies
                }
                Err(refusal) => Outcome::Refused(refusal.to_string()),
            }
        })
    }
}

fn served(start: &Start, present: u32) -> Served {
    let sector = |sector: usize| SectorRange::new(sector as u64, 1);
    let stand = |place: usize| {
        let image = &start.images[place];
        std::array::from_fn(|at| match () {
            () if image.stale.overlaps(sector(at)) => Stand::Stale,
            () if image.doubtful.overlaps(sector(at)) => Stand::Doubtful,
            () => Stand::Fresh,
        })
    };
    Served {
        stands: bits(u64::from(present)).map(stand).collect(),
        marked: std::array::from_fn(|at| start.unsettled.contains(sector(at))),
    }
}
