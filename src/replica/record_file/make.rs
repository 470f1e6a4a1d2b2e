//! Makes the file of a record: complete, synced, and only then under its name.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, RenameFlags, Uid, fallocate, fchown, fsync, linkat,
    openat, renameat, renameat_with, syncfs, unlinkat,
};
use rustix::io::Errno;

use super::error::{RecordFault, Step};
use super::place::{Place, SUFFIX_BYTES_MAX};

/// What the name of an unusable record has at its end when another one has taken its place.
const UNUSABLE: &str = ".unusable";
/// The same while a record is being made, after a number.
const NEW: &str = ".new";
/// Digits of that number, and the dot before it.
const NUMBER_BYTES: usize = 9;
const _: () = assert!(UNUSABLE.len() <= SUFFIX_BYTES_MAX);
const _: () = assert!(NUMBER_BYTES + NEW.len() <= SUFFIX_BYTES_MAX);
/// What the name of a record has at its end when its image is part of no disk any more. If there is
/// one already, a number follows.
const FORGOTTEN: &str = ".forgotten";
/// Names that are tried while a record is being made, or put aside.
const TRIES: u32 = 16;

impl Place {
    /// Makes a record with this content here. There must be none.
    pub(super) fn make(&self, content: &[u8]) -> Result<File, RecordFault> {
        self.make_as(content, Step::Make, |temporary| {
            self.rename(temporary, &self.name)
        })
    }

    /// Gives a file in the directory a name that no other one has.
    fn rename(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        let directory = &self.directory;
        match renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
            // Not every file system has the flag.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                linkat(directory, from, directory, to, AtFlags::empty())?;
                unlinkat(directory, from, AtFlags::empty())
            }
            renamed => renamed,
        }
    }

    /// Makes a record with this content here, in the place of one that is not usable and is kept
    /// under another name. That name may be taken, by an earlier one that was not usable: the
    /// first one is kept, since it may be a file that is no record.
    pub(super) fn make_instead(&self, content: &[u8]) -> Result<File, RecordFault> {
        let (directory, name) = (&self.directory, &self.name);
        let mut kept = name.clone();
        kept.push(UNUSABLE);
        match linkat(directory, name, directory, &kept, AtFlags::empty()) {
            // The place is empty: another program has moved it away.
            Ok(()) | Err(Errno::EXIST | Errno::NOENT) => {}
            Err(errno) => {
                let kept = self.path_of(&kept);
                return Err(RecordFault::NotKept(
                    self.path(),
                    kept,
                    errno.raw_os_error(),
                ));
            }
        }
        self.make_as(content, Step::Replace, |temporary| {
            renameat(directory, temporary, directory, name)
        })
    }

    /// Gives the record `file` here another name, which no file has yet. Returns its new path.
    pub(super) fn forget(&self, file: &File) -> Result<PathBuf, RecordFault> {
        let names = (0..TRIES).map(|number| {
            let mut name = self.name.clone();
            name.push(FORGOTTEN);
            if number > 0 {
                name.push(format!(".{number}"));
            }
            name
        });
        let failed = |errno| RecordFault::of(Step::Forget, self.path(), errno);
        for name in names {
            match self.rename(&self.name, &name) {
                Err(Errno::EXIST) => {}
                renamed => {
                    let done = renamed.and_then(|()| self.sync(file));
                    return done.map(|()| self.path_of(&name)).map_err(failed);
                }
            }
        }
        Err(failed(Errno::EXIST))
    }

    /// Makes a record under a name of its own and has `put` give it the right one.
    fn make_as(
        &self,
        content: &[u8],
        step: Step,
        put: impl FnOnce(&OsString) -> Result<(), Errno>,
    ) -> Result<File, RecordFault> {
        let failed = |errno: Errno| match errno {
            Errno::EXIST => RecordFault::Exists(self.path()),
            errno => RecordFault::of(step, self.path(), errno),
        };
        let (temporary, file) = self.temporary().map_err(failed)?;
        let filled = fill(&file, content, self.owner);
        if let Err(errno) = filled.and_then(|()| put(&temporary)) {
            let _ = unlinkat(&self.directory, &temporary, AtFlags::empty());
            return Err(failed(errno));
        }
        self.sync(&file).map_err(failed)?;
        Ok(file)
    }

    /// An empty file in the directory, and its name. The name may be that of one that an earlier
    /// process has not finished, so there are several.
    fn temporary(&self) -> Result<(OsString, File), Errno> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = since.map_or(0, |since| since.subsec_nanos());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::DSYNC | OFlags::CLOEXEC;
        let mut number = time ^ std::process::id().rotate_left(16);
        for _ in 0..TRIES {
            let mut name = self.name.clone();
            name.push(format!(".{number:08x}{NEW}"));
            let open = || openat(&self.directory, &name, flags, Mode::RUSR | Mode::WUSR);
            match rustix::io::retry_on_intr(open) {
                Err(Errno::EXIST) => number = number.wrapping_add(1),
                opened => return Ok((name, File::from(opened?))),
            }
        }
        Err(Errno::EXIST)
    }

    /// Makes the name of a new file durable.
    fn sync(&self, file: &File) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let synced = openat(&self.directory, ".", flags, Mode::empty()).and_then(fsync);
        match synced {
            // This user may not read the directory, or the file system does not sync directories.
            Err(Errno::ACCESS | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => syncfs(file),
            synced => synced,
        }
    }
}

/// Gives a new file its content, its space and its owner, and syncs it.
fn fill(file: &File, content: &[u8], owner: Option<(u32, u32)>) -> Result<(), Errno> {
    let length = u64::try_from(content.len()).map_err(|_| Errno::FBIG)?;
    match fallocate(file, FallocateFlags::empty(), 0, length) {
        // Not every file system has it. Each byte is written in any case, also because a later
        // write to space that was only reserved would cost a write to the journal.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => return Err(errno),
    }
    let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    file.write_all_at(content, 0).map_err(errno)?;
    if let Some((user, group)) = owner {
        // Only root may give files away. What a user without that right made stays that user's.
        let _ = fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)));
    }
    fsync(file)
}
