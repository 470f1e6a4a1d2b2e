//! The image behind the file, and when its operations are done.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo};

use super::END_LIMIT;
use super::faults::{Effect, Faults, OPERATIONS, Operation, Time};
use super::filesystem::FILE_INODE;

/// The image behind the file, and its faults.
pub(super) struct Server {
    pub(super) backing: File,
    /// The name of the file.
    pub(super) name: OsString,
    /// It sets no option of the file system.
    pub(super) is_plain: bool,
    state: Mutex<State>,
    pub(super) changed: Condvar,
}

pub(super) struct State {
    pub(super) faults: Faults,
    pub(super) asked: [u64; OPERATIONS],
    pub(super) done: [u64; OPERATIONS],
    pub(super) durable_writes: u64,
    pub(super) written_bytes: u64,
    pub(super) answers_where_holes_are: bool,
    /// Operations that complete later, in this order.
    waiting: BTreeMap<(Instant, u64), Job>,
    /// Operations that hang until the faults are cleared.
    hung: Vec<Job>,
    number: u64,
    pub(super) ended: bool,
}

type Job = Box<dyn FnOnce(&Server) + Send>;

impl Server {
    pub(super) fn over(backing: &Path, name: OsString, is_plain: bool) -> Self {
        let backing = OpenOptions::new().read(true).write(true).open(backing);
        Self {
            backing: backing.expect("opening an image"),
            name,
            is_plain,
            state: Mutex::new(State {
                faults: Faults::none(),
                asked: [0; OPERATIONS],
                done: [0; OPERATIONS],
                durable_writes: 0,
                written_bytes: 0,
                answers_where_holes_are: false,
                waiting: BTreeMap::new(),
                hung: Vec::new(),
                number: 0,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Also used while a panic unwinds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear_faults(&self) {
        let mut state = self.lock();
        state.faults.clear();
        let now = Instant::now();
        let late: Vec<Job> = std::mem::take(&mut state.waiting).into_values().collect();
        let hung = std::mem::take(&mut state.hung);
        for job in late.into_iter().chain(hung) {
            state.defer(now, job);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Runs `job` with its faults, now or later.
    pub(super) fn serve(
        &self,
        operation: Operation,
        bytes: Range<u64>,
        job: impl FnOnce(&Self, Result<Effect, Errno>) + Send + 'static,
    ) {
        let now = Instant::now();
        let mut state = self.lock();
        state.asked[operation as usize] += 1;
        let (effect, time) = state.faults.of(operation, &bytes, now);
        let job = move |server: &Self| {
            job(server, effect);
            server.lock().done[operation as usize] += 1;
        };
        match time {
            Time::AtOnce => {
                drop(state);
                job(self);
            }
            Time::Never => state.hung.push(Box::new(job)),
            Time::At(due) => {
                state.defer(due, Box::new(job));
                drop(state);
                self.changed.notify_all();
            }
        }
    }

    /// Reads from the image, unless a byte of the range is unreadable.
    pub(super) fn read(&self, offset: u64, size: usize, effect: Effect) -> Result<Vec<u8>, Errno> {
        let size = size.min(effect.bytes_max);
        let range = offset..(offset + size as u64).min(effect.end).max(offset);
        if self.lock().faults.is_unreadable(&range) {
            return Err(Errno::EIO);
        }
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("at most size")];
        let read = read_at(&self.backing, &mut bytes, offset)?;
        bytes.truncate(read);
        change(&mut bytes, effect.mask);
        Ok(bytes)
    }

    /// Writes to the image; what is written is readable again.
    pub(super) fn write(
        &self,
        offset: u64,
        bytes: &mut [u8],
        effect: Effect,
    ) -> Result<u32, Errno> {
        let size = bytes.len().min(effect.bytes_max);
        let bytes = &mut bytes[..size];
        change(bytes, effect.mask);
        self.backing.write_all_at(bytes, offset)?;
        let mut state = self.lock();
        state.written_bytes += size as u64;
        state.faults.make_readable(&(offset..offset + size as u64));
        Ok(u32::try_from(size).expect("at most 16 MiB"))
    }

    /// Where data or a hole of the image begins, from `offset` on. As long as it does not answer
    /// that, all is data: what the kernel takes it for where a file system does not know.
    pub(super) fn seek(&self, offset: i64, whence: i32) -> io::Result<i64> {
        let size = self.backing.metadata()?.len().cast_signed();
        if !self.lock().answers_where_holes_are && offset < size {
            return Ok(if whence == libc::SEEK_HOLE {
                size
            } else {
                offset
            });
        }
        // SAFETY: the call takes no memory. Nothing else depends on the position of the file.
        match unsafe { libc::lseek(self.backing.as_raw_fd(), offset, whence) } {
            -1 => Err(io::Error::last_os_error()),
            found => Ok(found),
        }
    }

    /// Runs what waits, each when it is due, until the end.
    pub(super) fn run_deferred(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let wait = match state.waiting.first_key_value() {
                Some(((due, _), _)) => due.saturating_duration_since(now),
                None if state.ended => return,
                None => END_LIMIT,
            };
            if wait.is_zero() {
                let (_, job) = state.waiting.pop_first().expect("just seen");
                drop(state);
                job(self);
                state = self.lock();
            } else {
                let waited = self.changed.wait_timeout(state, wait);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    pub(super) fn attributes(&self, inode: INodeNo) -> io::Result<FileAttr> {
        let metadata = self.backing.metadata()?;
        let is_file = inode == FILE_INODE;
        Ok(FileAttr {
            ino: inode,
            size: if is_file { metadata.len() } else { 0 },
            blocks: metadata.blocks(),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: metadata.uid(),
            gid: metadata.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl State {
    fn defer(&mut self, due: Instant, job: Job) {
        self.number += 1;
        self.waiting.insert((due, self.number), job);
    }
}

/// Reads until `bytes` are full or the file ends.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

fn change(bytes: &mut [u8], mask: u8) {
    if mask != 0 {
        for byte in bytes {
            *byte ^= mask;
        }
    }
}
