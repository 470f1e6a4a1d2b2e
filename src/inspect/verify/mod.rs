//! Compares images with each other, without a daemon: what would win each vote, and which images
//! hold something else.
//!
//! Invariants: the images are locked against writers while they are compared; memory use does not
//! depend on their size or on what they hold.

mod reader;
mod vote;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use serde::Serialize;

use self::reader::{Chunk, Reading};
use self::vote::{Side, Votes};
use super::{Decision, ReplicaSource, look_at, shown, state_directory};
use crate::common::ranges::RangeSet;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::{VERIFY_CHUNK_BYTES, VERIFY_RANGES_MAX};
use crate::record::Threshold;
use crate::record::start::{Candidate, Start, decide};
use crate::replica::file::{OfflineImage, OpenError, Sharing, open_offline};

/// The version of [`Verified`] as JSON.
const VERSION: u32 = 1;

/// What the comparison has found. Places and numbers are in sectors.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    version: u32,
    /// How much was compared.
    pub compared_sectors: u64,
    /// How many equal versions win a vote.
    pub vote_threshold: u8,
    /// Why a start with these images would be refused. All of them vote everywhere then.
    pub refusal: Option<String>,
    /// The images, in the order given.
    pub images: Vec<VerifiedImage>,
    /// Where no version has enough votes, or too few images have one.
    pub undecided: Places,
    /// Where images differ and may: the disk was not ended cleanly while this was changed.
    pub unsettled: Places,
}

/// What was found of an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifiedImage {
    /// Its path.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// The SHA-256 of all of it, unless a part cannot be read.
    pub sha256: Option<String>,
    /// Where it differs from the version that wins.
    pub differs: Places,
    /// Where it cannot be read, or is shorter than the disk.
    pub unreadable: Places,
    /// How much of it has no vote, since it is stale or doubtful there.
    pub without_vote_sectors: u64,
    /// Why it has no vote anywhere, unless it has one somewhere.
    pub why_without_vote: Option<String>,
    /// Where it has no vote, and differs from the version that wins.
    pub differs_without_vote: Places,
}

/// Places on a disk, in order, those beside each other as one.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Places {
    /// How many sectors they have.
    pub sectors: u64,
    /// The first ones, each as its first sector and their number.
    #[serde(serialize_with = "pairs")]
    pub first: Vec<SectorRange>,
    /// How many follow these.
    pub more: u64,
    /// Where the last one ends.
    #[serde(skip)]
    end: Option<u64>,
}

fn pairs<S: serde::Serializer>(ranges: &[SectorRange], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ranges.iter().map(|range| [range.start, range.count]))
}

impl Places {
    /// Adds sectors that lie behind all others.
    fn push(&mut self, range: SectorRange) {
        self.sectors += range.count;
        let touches = self.end == Some(range.start);
        self.end = Some(range.end());
        if touches {
            if self.more == 0
                && let Some(last) = self.first.last_mut()
            {
                last.count += range.count;
            }
        } else if self.first.len() < VERIFY_RANGES_MAX {
            self.first.push(range);
        } else {
            self.more += 1;
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sectors == 0
    }
}

impl Verified {
    /// Whether all images are equal, and a start would not be refused.
    pub fn is_good(&self) -> bool {
        let is_good = |image: &VerifiedImage| {
            let places = [
                &image.differs,
                &image.differs_without_vote,
                &image.unreadable,
            ];
            places.into_iter().all(Places::is_empty)
        };
        self.refusal.is_none()
            && self.undecided.is_empty()
            && self.unsettled.is_empty()
            && self.images.iter().all(is_good)
    }
}

/// Compares images. Calls `progress` from time to time with the bytes that are done, and with all.
///
/// # Errors
/// If an image cannot be opened, or is in use.
pub fn verify(
    sources: &[ReplicaSource],
    state: Option<PathBuf>,
    progress: impl FnMut(u64, u64),
) -> Result<Verified, OpenError> {
    let state = state_directory(state);
    let mut images = Vec::new();
    for source in sources {
        let mut image = open_offline(&source.path)?;
        image.lock(Sharing::Readers)?;
        images.push(image);
    }
    let candidates = sources.iter().zip(&images);
    let candidates = candidates.map(|(source, image)| look_at(source, Ok(image), &state).1);
    let candidates: Vec<Candidate> = candidates.collect();
    let smallest = images.iter().map(|image| image.size_bytes).min();
    let capacity = smallest.unwrap_or_default() / SECTOR_BYTES;
    let votes = match decide(&candidates, &super::options()) {
        Ok(Decision::Create) => Votes::of_new_disk(images.len(), capacity),
        Ok(Decision::Start(start)) => votes_of(&start, images.len()),
        Err(refusal) => Votes {
            refusal: Some(refusal.to_string()),
            ..Votes::of_new_disk(images.len(), capacity)
        },
    };
    Ok(compare(sources, &images, votes, progress))
}

/// Who votes where, in a disk that would start.
fn votes_of(start: &Start, images: usize) -> Votes {
    let layout = start.record.layout();
    let sides = start.images.iter().map(|image| {
        let mut without_vote = RangeSet::default();
        if image.votes() {
            without_vote.insert_all(&image.stale.to_ranges(layout));
            without_vote.insert_all(&image.doubtful.to_ranges(layout));
        } else {
            without_vote.insert(SectorRange::new(0, layout.capacity()));
        }
        Side {
            without_vote,
            why: (!image.votes()).then_some(image.why),
        }
    });
    let sides: Vec<Side> = sides.collect();
    debug_assert_eq!(sides.len(), images);
    let mut unsettled = RangeSet::default();
    for range in start.unsettled.iter() {
        unsettled.insert(range);
    }
    // What was taken as the truth decides alone until others are equal to it.
    let needed = match start.record.adopted {
        Some(_) => 1,
        None => start.record.threshold.votes,
    };
    Votes {
        capacity: layout.capacity(),
        needed,
        refusal: None,
        sides,
        unsettled,
    }
}

impl Votes {
    fn of_new_disk(images: usize, capacity: u64) -> Self {
        let side = Side {
            without_vote: RangeSet::default(),
            why: None,
        };
        Self {
            capacity,
            needed: Threshold::majority(images).votes,
            refusal: None,
            sides: vec![side; images],
            unsettled: RangeSet::default(),
        }
    }
}

fn compare(
    sources: &[ReplicaSource],
    images: &[OfflineImage],
    votes: Votes,
    mut progress: impl FnMut(u64, u64),
) -> Verified {
    let verified = images.iter().zip(sources).zip(&votes.sides);
    let verified = verified.map(|((image, source), side)| VerifiedImage {
        path: shown(&source.path),
        size: image.size_bytes,
        sha256: None,
        differs: Places::default(),
        unreadable: Places::default(),
        without_vote_sectors: side.without_vote.sectors(),
        why_without_vote: side.why.map(|why| why.to_string()),
        differs_without_vote: Places::default(),
    });
    let mut verified = Verified {
        version: VERSION,
        compared_sectors: votes.capacity,
        vote_threshold: votes.needed,
        refusal: votes.refusal.clone(),
        images: verified.collect(),
        undecided: Places::default(),
        unsettled: Places::default(),
    };
    let end = votes.capacity * SECTOR_BYTES;
    let longest = images.iter().map(|image| image.size_bytes).max();
    let end = end.max(longest.unwrap_or_default());
    thread::scope(|scope| {
        // Each image is read by a thread of its own, one chunk ahead.
        let readings: Vec<(Receiver<Chunk>, _)> = images
            .iter()
            .map(|image| {
                let (sender, receiver) = sync_channel(1);
                let reading = Reading::new(&image.file, image.size_bytes);
                let reader = scope.spawn(move || reading.run(end, &sender));
                (receiver, reader)
            })
            .collect();
        let mut at = 0;
        while at < end {
            progress(at, end);
            let chunks: Vec<Chunk> = readings
                .iter()
                .map(|(receiver, _)| receiver.recv().expect("a reader reads to the end"))
                .collect();
            vote::compare(&mut verified, &votes, at / SECTOR_BYTES, &chunks);
            at += VERIFY_CHUNK_BYTES as u64;
        }
        for (image, (_, reader)) in verified.images.iter_mut().zip(readings) {
            image.sha256 = reader.join().expect("a reader does not panic");
        }
    });
    verified
}
