//! What each sector of a disk may hold after a power cut: the oracle.
//!
//! Every write gives each of its sectors content of its own, so that a sector shows which write it
//! comes from. A sector may hold what was flushed last, or anything that was written later.

use std::ops::Range;

use testkit::fuse::logged::Moment;
use testkit::sectors::{SECTOR, fill, number_of};

/// What a sector holds: the number of a write, or 0 if it is full of zeroes.
pub(crate) type Version = u64;

struct Write {
    version: Version,
    begin: Moment,
    /// When the guest had its answer.
    end: Option<Moment>,
}

/// What the guest has done and seen.
pub(crate) struct History {
    /// What each sector could hold before.
    before: Vec<Vec<Version>>,
    /// What the guest has read before it wrote anything, and when.
    seen: Vec<Option<(Version, Moment)>>,
    writes: Vec<Vec<Write>>,
    flushes: Vec<(Moment, Moment)>,
    next: Version,
}

impl History {
    /// Of a disk whose sectors may hold this, and whose next write has this number.
    pub(crate) fn after(before: Vec<Vec<Version>>, next: Version) -> Self {
        Self {
            seen: vec![None; before.len()],
            writes: before.iter().map(|_| Vec::new()).collect(),
            before,
            flushes: Vec::new(),
            next,
        }
    }

    pub(crate) fn next_version(&self) -> Version {
        self.next
    }

    /// A write begins. Its data is put into `data`, which is as long.
    pub(crate) fn begin_write(
        &mut self,
        sectors: Range<usize>,
        data: &mut [u8],
        now: Moment,
    ) -> Version {
        let version = self.begin(sectors.clone(), false, now);
        for (sector, bytes) in sectors.zip(data.chunks_exact_mut(SECTOR)) {
            fill(bytes, version, sector);
        }
        version
    }

    /// A discard or a write of zeroes begins.
    pub(crate) fn begin_zero(&mut self, sectors: Range<usize>, now: Moment) -> Version {
        self.begin(sectors, true, now)
    }

    fn begin(&mut self, sectors: Range<usize>, is_zero: bool, now: Moment) -> Version {
        let number = self.next;
        self.next += 1;
        for writes in &mut self.writes[sectors] {
            writes.push(Write {
                version: if is_zero { 0 } else { number },
                begin: now,
                end: None,
            });
        }
        number
    }

    /// The write of these sectors that began at `begin` was answered with success.
    pub(crate) fn end_write(&mut self, sectors: Range<usize>, begin: Moment, now: Moment) {
        for writes in &mut self.writes[sectors] {
            let mut begun = writes.iter_mut().filter(|write| write.begin == begin);
            begun.next().expect("it began").end = Some(now);
        }
    }

    /// A flush was answered with success.
    pub(crate) fn flushed(&mut self, begin: Moment, end: Moment) {
        self.flushes.push((begin, end));
    }

    /// The guest has read this before it wrote anything. Whether that is permitted.
    pub(crate) fn saw(&mut self, sector: usize, version: Version, now: Moment) -> bool {
        self.seen[sector] = Some((version, now));
        self.before[sector].contains(&version)
    }

    /// What each sector may hold if the power fails at `moment`.
    pub(crate) fn permitted(&self, moment: Moment) -> Vec<Vec<Version>> {
        let flushes = self.flushes.iter().filter(|(_, end)| *end <= moment);
        let flushed = flushes.map(|(begin, _)| *begin).max().unwrap_or(0);
        let sectors = self.writes.iter().enumerate();
        let permitted = sectors.map(|(sector, writes)| {
            let writes = writes.iter().filter(|write| write.begin <= moment);
            let is_durable = |write: &&Write| write.end.is_some_and(|end| end < flushed);
            let durable = writes.clone().filter(is_durable);
            // All that was answered before this moment is older than what is durable.
            let newest = durable.map(|write| write.begin).max().unwrap_or(0);
            let mut versions: Vec<Version> = match (newest, self.seen[sector]) {
                (0, Some((version, at))) if at <= moment => vec![version],
                (0, _) => self.before[sector].clone(),
                _ => Vec::new(),
            };
            let later = writes.filter(|write| write.end.is_none_or(|end| end >= newest));
            versions.extend(later.map(|write| write.version));
            versions.sort_unstable();
            versions.dedup();
            versions
        });
        permitted.collect()
    }
}

/// The sectors whose content is not permitted: each with what it holds.
pub(crate) fn wrong(
    bytes: &[u8],
    first: usize,
    permitted: &[Vec<Version>],
) -> Vec<(usize, Option<Version>)> {
    let sectors = bytes.chunks_exact(SECTOR).zip(first..);
    let versions = sectors.map(|(bytes, sector)| (sector, number_of(bytes, sector)));
    let wrong = versions.filter(|(sector, version)| {
        !version.is_some_and(|version| permitted[*sector].contains(&version))
    });
    wrong.collect()
}
