//! The votes on the sectors of a chunk.

use super::reader::Chunk;
use super::{Places, Verified};
use crate::common::ranges::RangeSet;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::record::start::Why;

const SECTOR: usize = 512;
const _: () = assert!(SECTOR as u64 == SECTOR_BYTES);

/// Who votes where.
#[derive(Clone, Debug)]
pub(super) struct Votes {
    /// Sectors of the disk.
    pub(super) capacity: u64,
    /// How many equal versions win.
    pub(super) needed: u8,
    /// Why a start would be refused.
    pub(super) refusal: Option<String>,
    /// For each image.
    pub(super) sides: Vec<Side>,
    /// Where images may differ.
    pub(super) unsettled: RangeSet,
}

/// One image.
#[derive(Clone, Debug)]
pub(super) struct Side {
    /// Where it has no vote.
    pub(super) without_vote: RangeSet,
    /// Why it has none anywhere.
    pub(super) why: Option<Why>,
}

/// Compares the chunks of all images that begin with sector `start`.
pub(super) fn compare(verified: &mut Verified, votes: &Votes, start: u64, chunks: &[Chunk]) {
    let sectors = chunks.first().map_or(0, |chunk| chunk.bytes.len() / SECTOR);
    let range = SectorRange::new(start, sectors as u64);
    let sides = votes.sides.iter();
    let all_vote = !sides.clone().any(|side| side.without_vote.overlaps(range));
    let are_whole = chunks.iter().all(Chunk::is_whole);
    let mut pairs = chunks.iter().zip(chunks.iter().skip(1));
    if all_vote && are_whole && pairs.all(|(one, other)| one.bytes == other.bytes) {
        return;
    }
    for (sector, number) in (start..votes.capacity).zip(0..sectors) {
        compare_sector(verified, votes, sector, number, chunks);
    }
}

fn compare_sector(
    verified: &mut Verified,
    votes: &Votes,
    sector: u64,
    number: usize,
    chunks: &[Chunk],
) {
    let place = SectorRange::new(sector, 1);
    let bytes = |image: usize| &chunks[image].bytes[number * SECTOR..][..SECTOR];
    let (mut voting, mut others) = (Vec::with_capacity(chunks.len()), Vec::new());
    for (image, chunk) in chunks.iter().enumerate() {
        if !chunk.is_readable(number) {
            verified.images[image].unreadable.push(place);
        } else if votes.sides[image].without_vote.overlaps(place) {
            others.push(image);
        } else {
            voting.push(image);
        }
    }
    let votes_for = |image: &usize| {
        let equal = voting
            .iter()
            .filter(|other| bytes(**other) == bytes(*image));
        equal.count()
    };
    // The first of those with most votes, which the daemon lets win as well.
    let mut winner: Option<(usize, usize)> = None;
    for image in &voting {
        let count = votes_for(image);
        if winner.is_none_or(|(_, most)| count > most) {
            winner = Some((*image, count));
        }
    }
    let differ = winner.is_some_and(|(_, most)| most < voting.len());
    if votes.unsettled.overlaps(place) {
        push_if(differ, &mut verified.unsettled, place);
        // Any of them may win.
        winner = winner.filter(|_| !differ);
    } else {
        winner = winner.filter(|(_, most)| *most >= usize::from(votes.needed));
        push_if(winner.is_none(), &mut verified.undecided, place);
    }
    let Some((winner, _)) = winner else {
        return;
    };
    let differs = |image: usize| bytes(image) != bytes(winner);
    for image in voting {
        push_if(differs(image), &mut verified.images[image].differs, place);
    }
    for image in others {
        let places = &mut verified.images[image].differs_without_vote;
        push_if(differs(image), places, place);
    }
}

fn push_if(condition: bool, places: &mut Places, place: SectorRange) {
    if condition {
        places.push(place);
    }
}
