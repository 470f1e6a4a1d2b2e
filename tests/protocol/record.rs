//! What the record of a replica says (`src/record/table.rs`). A write of it is atomic: what a torn
//! one leaves is for the tests of the format.

use crate::disk::SECTORS_MAX;
use crate::sets::{self, Set, len};

/// Tables in a record, besides the one that it proposes. Each start may leave one.
pub(crate) const TABLES_MAX: usize = 4;

/// Names a table: its number, and the run of the daemon that has proposed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Epoch {
    pub(crate) number: u8,
    pub(crate) run: u8,
}

/// The members that are active. All others are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Table {
    pub(crate) epoch: Epoch,
    pub(crate) active: Set,
}

/// The last table that was agreed upon, then those proposed since by runs that were cut short. If
/// there are none, the table of the record was agreed upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Tables([Option<Table>; TABLES_MAX]);

/// Sectors in which the copies of a member are no good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Copies {
    pub(crate) stale: Set,
    /// What is also stale is not doubtful.
    pub(crate) doubtful: Set,
}

/// A record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Record {
    pub(crate) table: Table,
    pub(crate) before: Tables,
    /// By sector, the members that are stale there.
    pub(crate) stale: [Set; SECTORS_MAX],
    /// Those that are not, and may have lost the newest version in a failed flush.
    pub(crate) doubtful: [Set; SECTORS_MAX],
    /// Members that are stale also where something is marked.
    pub(crate) stale_where_changed: Set,
    /// The sectors that may differ.
    pub(crate) marked: Set,
}

impl Copies {
    /// All sectors are stale.
    pub(crate) const STALE: Self = Self {
        stale: Set::MAX,
        doubtful: 0,
    };

    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            stale: self.stale | other.stale,
            doubtful: self.doubtful | other.doubtful,
        }
    }
}

impl Table {
    /// Whether no start without a member in `holders` can begin with this table.
    pub(crate) fn is_bound_by(&self, holders: Set, members: Set, threshold: usize) -> bool {
        len(self.active & holders) >= threshold || len(members & !holders) < threshold
    }

    /// Whether the members in `seen` would know if others had gone on.
    pub(crate) fn is_known_to(&self, seen: Set, threshold: usize) -> bool {
        len(self.active & !seen) < threshold
    }
}

impl Tables {
    pub(crate) fn of(tables: impl Iterator<Item = Table>) -> Self {
        let mut all = Self::default();
        tables.for_each(|table| all.push(table));
        all
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Table> {
        self.0.into_iter().flatten()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0[0].is_none()
    }

    fn push(&mut self, table: Table) {
        let place = self.0.iter_mut().find(|place| place.is_none());
        *place.expect("few starts are cut short") = Some(table);
    }
}

impl Record {
    /// The last table that was agreed upon.
    pub(crate) fn in_force(&self) -> Table {
        self.before.iter().next().unwrap_or(self.table)
    }

    /// The tables that the next one has to follow.
    pub(crate) fn binding(&self) -> impl Iterator<Item = Table> {
        self.before.iter().chain([self.table])
    }

    /// Begins a change of the table.
    pub(crate) fn propose(&mut self) {
        if self.before.is_empty() {
            self.before.push(self.table);
        }
        self.table.epoch.number += 1;
    }

    pub(crate) fn is_active(&self, member: usize) -> bool {
        sets::has(self.table.active, member)
    }

    /// The sectors in which this says that the copies of the member are no good, apart from marks.
    pub(crate) fn copies_of(&self, member: usize) -> Copies {
        Copies {
            stale: sectors_of(&self.stale, member),
            doubtful: sectors_of(&self.doubtful, member),
        }
    }

    /// The copies of the member are no good in these sectors, and in no other one.
    pub(crate) fn set_copies(&mut self, member: usize, copies: Copies) {
        let doubtful = copies.doubtful & !copies.stale;
        set_sectors(&mut self.stale, member, copies.stale);
        set_sectors(&mut self.doubtful, member, doubtful);
    }
}

/// The sectors in whose sets the member is.
pub(crate) fn sectors_of(sets: &[Set; SECTORS_MAX], member: usize) -> Set {
    let sectors = (0..SECTORS_MAX).filter(|sector| sets::has(sets[*sector], member));
    sectors.fold(0, |all, sector| all | sets::one(sector))
}

/// The member is in the sets of these sectors, and in no other one.
pub(crate) fn set_sectors(sets: &mut [Set; SECTORS_MAX], member: usize, sectors: Set) {
    for (sector, set) in sets.iter_mut().enumerate() {
        *set &= !sets::one(member);
        if sets::has(sectors, sector) {
            *set |= sets::one(member);
        }
    }
}
