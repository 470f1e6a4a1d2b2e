//! What is done to the files of a logged directory, in one global order, and what they hold now.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::sync::Arc;

use super::crash::{Content, FileContent};
use crate::sectors::SECTOR;
use crate::size;

/// A place in the order of all that happens. Each event has one of its own.
pub type Moment = u64;

/// The number of a file. Names lead to files.
pub(super) type FileNumber = u64;

/// What an operation does to a file.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Bytes are written from an offset on.
    Write { offset: u64, bytes: Arc<[u8]> },
    /// Bytes become zeroes: a punched hole, or a range that is zeroed. The file may grow.
    Zero { range: Range<u64>, grows: bool },
    /// The file gets another length.
    Resize { bytes: u64 },
}

/// An operation on a file.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    pub(super) file: FileNumber,
    pub(super) change: Change,
    pub(super) begin: Moment,
    pub(super) end: Option<Moment>,
    /// It has failed: it cannot be read, and any part of it may be left by a power cut.
    pub(super) failed: bool,
    /// It is durable when it ends (O_DSYNC).
    pub(super) is_durable: bool,
    /// What it sets the time of the last change to, in nanoseconds since 1970.
    pub(super) modified_ns: i64,
}

/// A sync of a file.
#[derive(Clone, Debug)]
pub(super) struct Sync {
    pub(super) file: FileNumber,
    pub(super) begin: Moment,
    pub(super) end: Option<Moment>,
    /// With the time of the last change: fsync, not fdatasync.
    pub(super) with_time: bool,
}

/// What happens to the names of the directory.
#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Add { name: OsString, file: FileNumber },
    Remove { name: OsString },
    Rename { from: OsString, to: OsString },
}

/// Everything that has happened, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Log {
    clock: Moment,
    /// What the files hold now, by number.
    pub(super) files: BTreeMap<FileNumber, FileContent>,
    pub(super) names: BTreeMap<OsString, FileNumber>,
    pub(super) first_files: BTreeMap<FileNumber, FileContent>,
    pub(super) first_names: BTreeMap<OsString, FileNumber>,
    pub(super) operations: Vec<Operation>,
    pub(super) syncs: Vec<Sync>,
    /// Syncs that have failed: the file, and when.
    pub(super) failed_syncs: Vec<(FileNumber, Moment)>,
    pub(super) name_changes: Vec<(Moment, NameChange)>,
    /// Syncs of the directory: when each has begun and ended.
    pub(super) name_syncs: Vec<(Moment, Moment)>,
}

/// The number of the directory itself, which FUSE prescribes. Those of files come after it.
pub(super) const DIRECTORY: FileNumber = 1;

impl Log {
    pub(super) fn of(content: &Content) -> Self {
        let mut log = Self::default();
        for (number, (name, file)) in (DIRECTORY + 1..).zip(&content.files) {
            log.files.insert(number, file.clone());
            log.names.insert(name.clone(), number);
        }
        log.first_files.clone_from(&log.files);
        log.first_names.clone_from(&log.names);
        log
    }

    /// A new moment, after all others so far.
    pub(super) fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    /// An operation arrives. Returns its place, for [`Self::end`].
    pub(super) fn begin(
        &mut self,
        file: FileNumber,
        change: Change,
        is_durable: bool,
        modified_ns: i64,
    ) -> usize {
        let begin = self.tick();
        self.operations.push(Operation {
            file,
            change,
            begin,
            end: None,
            failed: false,
            is_durable,
            modified_ns,
        });
        self.operations.len() - 1
    }

    /// An operation is done, and what it has written can be read.
    pub(super) fn end(&mut self, place: usize) {
        let end = self.tick();
        let operation = &mut self.operations[place];
        operation.end = Some(end);
        if let Some(file) = self.files.get_mut(&operation.file) {
            let bytes = Arc::make_mut(&mut file.bytes);
            apply(bytes, &operation.change, |_| true);
            file.modified_ns = operation.modified_ns;
        }
    }

    /// An operation fails.
    pub(super) fn fail(&mut self, place: usize) {
        let end = self.tick();
        let operation = &mut self.operations[place];
        (operation.end, operation.failed) = (Some(end), true);
    }

    pub(super) fn begin_sync(&mut self, file: FileNumber, with_time: bool) -> usize {
        let begin = self.tick();
        self.syncs.push(Sync {
            file,
            begin,
            end: None,
            with_time,
        });
        self.syncs.len() - 1
    }

    pub(super) fn end_sync(&mut self, place: usize) {
        self.syncs[place].end = Some(self.tick());
    }

    /// A sync fails. The kernel may have dropped what was not durable: it can be read, but no later
    /// sync makes it durable.
    pub(super) fn fail_sync(&mut self, file: FileNumber) {
        let now = self.tick();
        self.failed_syncs.push((file, now));
    }

    /// Makes an empty file. `None`: the name is taken.
    pub(super) fn create(&mut self, name: &OsStr, modified_ns: i64) -> Option<FileNumber> {
        if self.names.contains_key(name) {
            return None;
        }
        let number = self.files.keys().last().copied().unwrap_or(DIRECTORY) + 1;
        let empty = FileContent {
            bytes: Arc::default(),
            modified_ns,
        };
        self.files.insert(number, empty.clone());
        self.first_files.insert(number, empty);
        self.rename_as(NameChange::Add {
            name: name.to_owned(),
            file: number,
        });
        Some(number)
    }

    /// Changes the names of the directory.
    pub(super) fn rename_as(&mut self, change: NameChange) {
        let moment = self.tick();
        apply_to_names(&mut self.names, &change);
        self.name_changes.push((moment, change));
    }

    /// The first moment that has not come yet.
    pub(super) fn end_moment(&self) -> Moment {
        self.clock + 1
    }
}

/// Does what an operation does, but only to the sectors that are wanted, by their number in the
/// file.
pub(super) fn apply(bytes: &mut Vec<u8>, change: &Change, wants: impl FnMut(usize) -> bool) {
    match change {
        Change::Write { offset, bytes: new } => {
            let end = offset + new.len() as u64;
            put(bytes, *offset..end, true, wants, |target, at| {
                target.copy_from_slice(&new[at..at + target.len()]);
            });
        }
        Change::Zero { range, grows } => {
            put(bytes, range.clone(), *grows, wants, |target, _| {
                target.fill(0);
            });
        }
        Change::Resize { bytes: length } => bytes.resize(size(*length), 0),
    }
}

/// Changes the wanted sectors of a range. `change` gets the bytes of each, and where they begin in
/// the range.
fn put(
    bytes: &mut Vec<u8>,
    range: Range<u64>,
    grows: bool,
    mut wants: impl FnMut(usize) -> bool,
    change: impl Fn(&mut [u8], usize),
) {
    let (start, mut end) = (size(range.start), size(range.end));
    if grows && end > bytes.len() {
        bytes.resize(end, 0);
    }
    end = end.min(bytes.len());
    let mut from = start;
    while from < end {
        let to = ((from / SECTOR + 1) * SECTOR).min(end);
        if wants(from / SECTOR) {
            change(&mut bytes[from..to], from - start);
        }
        from = to;
    }
}

pub(super) fn apply_to_names(names: &mut BTreeMap<OsString, FileNumber>, change: &NameChange) {
    match change {
        NameChange::Add { name, file } => {
            names.insert(name.clone(), *file);
        }
        NameChange::Remove { name } => {
            names.remove(name);
        }
        NameChange::Rename { from, to } => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
    }
}
