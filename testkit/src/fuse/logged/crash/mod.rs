//! What a power cut leaves of the files of a logged directory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::log::{FileNumber, Log, Moment, Operation, apply, apply_to_names};
use crate::images::Random;
use crate::size;

/// The files of a directory.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// By name.
    pub files: BTreeMap<OsString, FileContent>,
}

/// A file.
#[derive(Clone, Debug, Default)]
pub struct FileContent {
    /// Its bytes.
    pub bytes: Arc<Vec<u8>>,
    /// When it was last changed, in nanoseconds since 1970.
    pub modified_ns: i64,
}

/// Bytes of a block that is left out of a file if it is full of zeroes.
const BLOCK: usize = 4096;
static ZEROES: [u8; BLOCK] = [0; BLOCK];

impl Content {
    /// Writes those files to a directory whose names are `wanted`, with their times. What is zero
    /// becomes a hole.
    ///
    /// # Errors
    /// If a file cannot be made.
    pub fn write_to(&self, directory: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        for (name, content) in &self.files {
            if !wanted(&name.to_string_lossy()) {
                continue;
            }
            let file = File::create(directory.join(name))?;
            file.set_len(content.bytes.len() as u64)?;
            for (place, block) in content.bytes.chunks(BLOCK).enumerate() {
                if block != &ZEROES[..block.len()] {
                    file.write_all_at(block, (place * BLOCK) as u64)?;
                }
            }
            let since = Duration::from_nanos(content.modified_ns.unsigned_abs());
            file.set_modified(UNIX_EPOCH + since)?;
        }
        Ok(())
    }

    /// The files of a directory.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn read_from(directory: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if !metadata.is_file() {
                continue;
            }
            let content = FileContent {
                bytes: Arc::new(fs::read(entry.path())?),
                modified_ns: nanoseconds(metadata.modified()?),
            };
            files.insert(entry.file_name(), content);
        }
        Ok(Self { files })
    }
}

/// Nanoseconds since 1970.
pub(super) fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).expect("before the year 2262")
}

/// What is left of operations that were not flushed.
#[derive(Clone, Copy, Debug)]
enum Kept {
    Nothing,
    Everything,
    /// The first ones, and some sectors of the next one.
    Prefix,
    /// Any of them, each as a whole.
    Operations,
    /// Any sectors of 512 bytes, or pages of 4096.
    Parts {
        sectors: usize,
    },
}

impl Kept {
    fn any(random: &mut Random) -> Self {
        match random.within(0..16) {
            0..2 => Self::Nothing,
            2..4 => Self::Everything,
            4..7 => Self::Prefix,
            7..11 => Self::Operations,
            11..14 => Self::Parts { sectors: 1 },
            _ => Self::Parts { sectors: 8 },
        }
    }
}

impl Log {
    /// What the directory holds when the power fails at `moment`: everything that was flushed, and
    /// of the rest of each file another part. `atom` is how many sectors of a file are never torn.
    pub(super) fn crash(
        &self,
        moment: Moment,
        atom: impl Fn(&str) -> usize,
        random: &mut Random,
    ) -> Content {
        let names = self.names_left(moment, random);
        let files = names.into_iter().map(|(name, number)| {
            let kept = Kept::any(random);
            let atom = atom(&name.to_string_lossy());
            (name, self.file_left(number, moment, (kept, atom), random))
        });
        Content {
            files: files.collect(),
        }
    }

    /// A journal keeps the order of changes of names: the first ones are left.
    fn names_left(&self, moment: Moment, random: &mut Random) -> BTreeMap<OsString, FileNumber> {
        let synced = self.name_syncs.iter().filter(|(_, end)| *end <= moment);
        let synced = synced.map(|(begin, _)| *begin).max().unwrap_or(0);
        let all: Vec<_> = self.name_changes.iter().collect();
        let durable = all.iter().filter(|(at, _)| *at < synced).count();
        let begun = all.iter().filter(|(at, _)| *at <= moment).count();
        let count = random.within(durable as u64..begun as u64 + 1);
        let mut names = self.first_names.clone();
        for (_, change) in all.into_iter().take(usize::try_from(count).expect("few")) {
            apply_to_names(&mut names, change);
        }
        names
    }

    fn file_left(
        &self,
        number: FileNumber,
        moment: Moment,
        (kept, atom): (Kept, usize),
        random: &mut Random,
    ) -> FileContent {
        let first = &self.first_files[&number];
        let ended = |end: Option<Moment>| end.filter(|end| *end <= moment);
        let done = self.syncs.iter().filter(|sync| sync.file == number);
        let done = done.filter(|sync| ended(sync.end).is_some());
        let with_time = done.clone().filter(|sync| sync.with_time);
        let time_synced = with_time.map(|sync| sync.begin).max().unwrap_or(0);
        // The first sync after a change decides: true if it has succeeded.
        let failed = self.failed_syncs.iter();
        let failed = failed.filter(|(file, at)| *file == number && *at <= moment);
        let failed = failed.map(|(_, at)| (*at, false));
        let mut syncs: Vec<(Moment, bool)> = done.map(|sync| (sync.begin, true)).collect();
        syncs.extend(failed);
        syncs.sort_unstable();
        let is_synced = |end: Moment| {
            let next = syncs.partition_point(|(begin, _)| *begin <= end);
            syncs.get(next).is_some_and(|(_, succeeded)| *succeeded)
        };

        let begun = self.operations.iter();
        let begun = begun.filter(|operation| operation.file == number && operation.begin <= moment);
        let mut begun: Vec<&Operation> = begun.collect();
        begun.sort_by_key(|operation| {
            let end = ended(operation.end).unwrap_or(Moment::MAX);
            (end, operation.begin)
        });
        let is_durable = |operation: &Operation| {
            let end = ended(operation.end).filter(|_| !operation.failed);
            end.is_some_and(|end| operation.is_durable || is_synced(end))
        };
        let volatile = begun.iter().filter(|operation| !is_durable(operation));
        let prefix = random.within(0..volatile.count() as u64 + 1);
        let quarters = random.within(1..4);

        let mut bytes = Vec::clone(&first.bytes);
        let mut times = vec![first.modified_ns];
        let mut place = 0;
        for operation in begun {
            if ended(operation.end).is_some_and(|end| end < time_synced) {
                times = vec![operation.modified_ns];
            } else {
                times.push(operation.modified_ns);
            }
            if is_durable(operation) {
                apply(&mut bytes, &operation.change, |_| true);
                continue;
            }
            place += 1;
            match kept {
                Kept::Nothing => {}
                Kept::Everything => apply(&mut bytes, &operation.change, |_| true),
                Kept::Prefix if place <= prefix => {
                    apply(&mut bytes, &operation.change, |_| true);
                }
                Kept::Prefix if place == prefix + 1 => {
                    let count = size(random.within(0..17));
                    let mut cut = None;
                    apply(&mut bytes, &operation.change, |sector| {
                        let atom = sector / atom;
                        atom < *cut.get_or_insert(atom + count)
                    });
                }
                Kept::Prefix => {}
                Kept::Operations => {
                    if random.within(0..4) < quarters {
                        apply(&mut bytes, &operation.change, |_| true);
                    }
                }
                Kept::Parts { sectors } => {
                    let mut last = None;
                    apply(&mut bytes, &operation.change, |sector| {
                        let part = sector / sectors.max(atom);
                        if last.is_none_or(|(known, _)| known != part) {
                            last = Some((part, random.within(0..4) < quarters));
                        }
                        last.is_some_and(|(_, is_kept)| is_kept)
                    });
                }
            }
        }
        let time = match kept {
            Kept::Nothing => 0,
            Kept::Everything => times.len() - 1,
            _ => size(random.within(0..times.len() as u64)),
        };
        FileContent {
            bytes: Arc::new(bytes),
            modified_ns: times[time],
        }
    }
}

#[cfg(test)]
mod tests;
