//! The logged directory as the kernel sees it: a flat one, whose files are in memory.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::super::answers;
use super::crash::nanoseconds;
use super::log::{Change, DIRECTORY, FileNumber, Log, NameChange};

/// How long the kernel may cache what it knows: not at all.
const VALID: Duration = Duration::ZERO;
/// No operation takes longer than this. Each takes another time, so that they overtake each other.
const DELAY_MAX: Duration = Duration::from_micros(250);

/// What is wrong with a file. What fails has the errno EIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// Writes, zeroing and syncs.
    ChangesAndSyncs,
    /// Writes and zeroing.
    Changes,
    /// Syncs.
    Syncs,
    /// Nothing fails, but each change and each sync takes [`SLOW`].
    Slow,
}

/// How long an operation takes on a file that is slow.
pub const SLOW: Duration = Duration::from_millis(800);

/// What the threads of the file system share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    log: Mutex<Log>,
    /// The file that fails, and how.
    failing: Mutex<Option<(FileNumber, Failing)>>,
    delays: AtomicU64,
}

impl Shared {
    pub(super) fn of(log: Log) -> Self {
        Self {
            log: Mutex::new(log),
            ..Self::default()
        }
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fail(&self, failing: Option<(FileNumber, Failing)>) {
        *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = failing;
    }

    fn failing(&self, file: FileNumber) -> Option<Failing> {
        let failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let failing = failing.filter(|(failing, _)| *failing == file);
        failing.map(|(_, how)| how)
    }

    /// Whether a change of this file fails now.
    fn fails(&self, file: FileNumber) -> bool {
        let how = self.failing(file);
        matches!(how, Some(Failing::Changes | Failing::ChangesAndSyncs))
    }

    fn wait(&self, file: FileNumber) {
        if self.failing(file) == Some(Failing::Slow) {
            return thread::sleep(SLOW);
        }
        let count = self.delays.fetch_add(1, Ordering::Relaxed);
        let mixed = count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
        // Half of the operations are done at once.
        if let Some(share) = mixed.checked_sub(8) {
            thread::sleep(DELAY_MAX.mul_f64(share as f64 / 8.0));
        }
    }

    /// Carries out a change: it begins, takes some time, and ends.
    /// Does it, unless it fails now. What fails may leave a part of itself.
    fn change(&self, file: FileNumber, change: Change, is_durable: bool) -> Result<(), Errno> {
        let now = nanoseconds(SystemTime::now());
        let place = self.log().begin(file, change, is_durable, now);
        self.wait(file);
        if self.fails(file) {
            self.log().fail(place);
            return Err(Errno::EIO);
        }
        self.log().end(place);
        Ok(())
    }
}

/// The file system.
pub(super) struct Logged(pub(super) Arc<Shared>);

impl Logged {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        if inode.0 == DIRECTORY {
            return Some(answers::attributes(inode, None, UNIX_EPOCH));
        }
        let log = self.0.log();
        let file = log.files.get(&inode.0)?;
        let modified = UNIX_EPOCH + Duration::from_nanos(file.modified_ns.unsigned_abs());
        let size_bytes = Some(file.bytes.len() as u64);
        Some(answers::attributes(inode, size_bytes, modified))
    }

    fn answer(&self, inode: INodeNo, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&VALID, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Syncs a file.
    fn sync(&self, file: FileNumber, with_time: bool) -> Result<(), Errno> {
        let how = self.0.failing(file);
        if matches!(how, Some(Failing::Syncs | Failing::ChangesAndSyncs)) {
            self.0.log().fail_sync(file);
            return Err(Errno::EIO);
        }
        let place = self.0.log().begin_sync(file, with_time);
        self.0.wait(file);
        self.0.log().end_sync(place);
        Ok(())
    }
}

impl Filesystem for Logged {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        answers::add_parallel_requests(config)
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = self.0.log().names.get(name).copied();
        match number.and_then(|number| self.attributes(INodeNo(number))) {
            Some(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(inode, reply);
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        bytes: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = bytes.map(|bytes| Change::Resize { bytes });
        match change.map(|change| self.0.change(inode.0, change, false)) {
            Some(Err(errno)) => reply.error(errno),
            _ => self.answer(inode, reply),
        }
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let now = nanoseconds(SystemTime::now());
        let number = self.0.log().create(name, now);
        match number.and_then(|number| self.attributes(INodeNo(number))) {
            Some(attributes) => reply.created(
                &VALID,
                &attributes,
                Generation(0),
                FileHandle(0),
                answers::UNCACHED,
            ),
            None => reply.error(Errno::EEXIST),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut log = self.0.log();
        let is_there = log.names.contains_key(name);
        if is_there {
            let name = name.to_owned();
            log.rename_as(NameChange::Remove { name });
        }
        answers::empty(reply, if is_there { Ok(()) } else { Err(Errno::ENOENT) });
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut log = self.0.log();
        if !log.names.contains_key(name) {
            return reply.error(Errno::ENOENT);
        }
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && log.names.contains_key(new_name) {
            return reply.error(Errno::EEXIST);
        }
        log.rename_as(NameChange::Rename {
            from: name.to_owned(),
            to: new_name.to_owned(),
        });
        reply.ok();
    }

    fn link(&self, _: &Request, inode: INodeNo, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut log = self.0.log();
        if log.names.contains_key(name) {
            return reply.error(Errno::EEXIST);
        }
        log.rename_as(NameChange::Add {
            name: name.to_owned(),
            file: inode.0,
        });
        drop(log);
        match self.attributes(inode) {
            Some(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), answers::UNCACHED);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(bytes) = self
            .0
            .log()
            .files
            .get(&inode.0)
            .map(|file| Arc::clone(&file.bytes))
        else {
            return reply.error(Errno::ENOENT);
        };
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let end = (start + size as usize).min(bytes.len());
        reply.data(&bytes[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // Both also come from RWF_DSYNC and RWF_SYNC of the one write.
        let is_durable = flags.0 & (libc::O_DSYNC | libc::O_SYNC) != 0;
        let bytes = data.into();
        let change = Change::Write { offset, bytes };
        match self.0.change(inode.0, change, is_durable) {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("at most 16 MiB")),
            Err(errno) => reply.error(errno),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0;
        let range = offset..offset + length;
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            let change = Change::Zero { range, grows };
            return answers::empty(reply, self.0.change(inode.0, change, false));
        }
        if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let bytes = self.attributes(inode).map_or(0, |file| file.size);
        let changed = match grows && range.end > bytes {
            true => {
                let bytes = range.end;
                self.0.change(inode.0, Change::Resize { bytes }, false)
            }
            false => Ok(()),
        };
        answers::empty(reply, changed);
    }

    /// All is data.
    fn lseek(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let end = self.attributes(inode).map_or(0, |file| file.size);
        match u64::try_from(offset) {
            Ok(offset) if offset < end => reply.offset(match whence {
                libc::SEEK_HOLE => end.cast_signed(),
                _ => offset.cast_signed(),
            }),
            _ => reply.error(Errno::ENXIO),
        }
    }

    fn fsync(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        answers::empty(reply, self.sync(inode.0, !data_only));
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let begin = self.0.log().tick();
        self.0.wait(DIRECTORY);
        let mut log = self.0.log();
        let end = log.tick();
        log.name_syncs.push((begin, end));
        reply.ok();
    }
}
