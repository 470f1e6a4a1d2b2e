//! What excuses a replica, sector by sector: the injected faults, and what the engine was told of
//! them.
//!
//! The checks ask it two things: might this replica give wrong bytes here, and need the engine have
//! counted on it? Each request in flight keeps what was true at any time since it began, so that a
//! replica that was wrong when it was read and was mended since is not forgotten.

use super::plan::PLACES;

/// One mask of sectors for each replica.
pub type Masks = [u64; PLACES];

/// Faults and their aftermath.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Holds bytes there that no error told of: rot, a lost write, a misdirected one.
    pub lied: Masks,
    /// Has dropped a page there and has not told yet.
    pub dropped: Masks,
    /// Said of these that they are durable, and they are not; or lied, and was mended in its cache
    /// only.
    pub lied_durable: Masks,
    /// The engine was told of an error by which the replica may be behind there.
    pub excused: Masks,
    /// Sectors on which a failed write or a crash may have left different versions.
    pub mixed: u64,
    /// How often each replica has told the engine of a failed flush, or has left the set.
    pub failures: [u32; PLACES],
    /// How often each replica has left the set.
    pub departures: [u32; PLACES],
    /// The replicas that have left the set, a mask.
    pub out: u32,
    /// Any fault was injected, errors included.
    pub any: bool,
}

/// What was true of the replicas at any time while a request was in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Lied or dropped.
    pub wrong: Masks,
    /// Excused, or failed a read there.
    pub excused: Masks,
    /// Mixed.
    pub mixed: u64,
}

impl Ledger {
    /// What is true now.
    pub fn seen(&self) -> Seen {
        Seen {
            wrong: std::array::from_fn(|r| self.wrong(r)),
            excused: self.excused,
            mixed: self.mixed,
        }
    }

    /// The place is that of another replica now.
    pub fn forget(&mut self, replica: usize) {
        let masks = [
            &mut self.lied,
            &mut self.dropped,
            &mut self.lied_durable,
            &mut self.excused,
        ];
        for mask in masks {
            mask[replica] = 0;
        }
        self.failures[replica] = 0;
        self.departures[replica] = 0;
        self.out &= !(1 << replica);
    }

    /// The sectors on which the replica may give wrong bytes.
    pub fn wrong(&self, replica: usize) -> u64 {
        self.lied[replica] | self.dropped[replica]
    }

    /// The replica holds what it should hold there, in its cache; what is beneath is another
    /// matter.
    pub fn mended(&mut self, replica: usize, sectors: u64) {
        self.lied_durable[replica] |= self.lied[replica] & sectors;
        self.lied[replica] &= !sectors;
        self.dropped[replica] &= !sectors;
    }
}

impl Seen {
    /// How many replicas may have given wrong bytes for the sector.
    pub fn wrong_at(&self, sector: usize) -> usize {
        count(&self.wrong, sector)
    }

    /// The replicas of `members`, a mask, that gave right answers for the sector.
    pub fn right_at(&self, sector: usize, members: u32) -> u32 {
        let is_right = |r: &usize| (self.wrong[*r] | self.excused[*r]) >> sector & 1 == 0;
        let members = super::plan::bits(u64::from(members));
        members.filter(is_right).fold(0, |mask, r| mask | 1 << r)
    }
}

/// How many of the masks have the sector.
pub fn count(masks: &Masks, sector: usize) -> usize {
    masks.iter().filter(|mask| *mask >> sector & 1 == 1).count()
}
