//! A file system of one file: an image on which a test injects faults. It hangs, is slow, fails or
//! returns corrupt data.
//!
//! The file is served over FUSE from a real image, past every cache of the kernel, so that what a
//! daemon asks of it arrives here one to one. It is detached from the directory tree as soon as it
//! is mounted and reached through a descriptor of this process: a test that is killed leaves
//! neither a mount nor a hanging process behind, because its end closes the FUSE connection and
//! with it the file.
//!
//! Needs `/dev/fuse` and the right to mount (root), no FUSE library.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use crate::process::wait_until;

const FILE_NAME: &str = "image";
const FILE_INODE: INodeNo = INodeNo(2);
/// How long the kernel may cache the attributes of the file: only it changes them.
const ATTRIBUTES_VALID: Duration = Duration::from_secs(3600);
/// Requests that the kernel hands over without waiting for answers; a test hangs more than the
/// default, 16.
const REQUESTS_MAX: u16 = 4096;
/// Time in which the last user of the file must have closed it.
pub const END_LIMIT: Duration = Duration::from_secs(30);

/// An operation on the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read.
    Read,
    /// Write.
    Write,
    /// fsync or fdatasync.
    Sync,
    /// ftruncate.
    Resize,
}

/// A fault of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It takes a time between these two, and others overtake it.
    Delay(Duration, Duration),
    /// It hangs until the faults are cleared.
    Hang,
    /// It fails with this errno.
    Fail(i32),
    /// It fails with this errno if it touches a byte from the first of these on and before the
    /// second.
    FailIn(i32, u64, u64),
    /// Its bytes are changed by xor with this.
    Corrupt(u8),
    /// At most this many complete in a second.
    PerSecond(u32),
}

/// An image served over FUSE. Drop it after the processes that have it open: dropping it clears its
/// faults and waits until the file is closed. A process cannot be killed while the file hangs, so a
/// test that holds such a process clears the faults first, by a [`FaultGuard`].
pub struct FuseImage {
    server: Arc<Server>,
    session: Option<BackgroundSession>,
    deferred: Option<JoinHandle<()>>,
    /// Keeps the detached file system alive. The path for other processes leads through it.
    file: Option<File>,
}

/// Clears the faults of an image when dropped.
pub struct FaultGuard(Arc<Server>);

/// The image behind the file, and its faults.
struct Server {
    backing: File,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    faults: [Option<Fault>; 4],
    /// [`Fault::PerSecond`]: when the next one may be done.
    next_free: [Instant; 4],
    asked: [u64; 4],
    done: [u64; 4],
    durable_writes: u64,
    /// Operations that complete later, in this order.
    waiting: BTreeMap<(Instant, u64), Job>,
    /// Operations that hang until the faults are cleared.
    hung: Vec<Job>,
    number: u64,
    ended: bool,
}

type Job = Box<dyn FnOnce(&Server) + Send>;

impl FuseImage {
    /// Serves the image at `backing`.
    pub fn serve(backing: &Path) -> Self {
        let server = Arc::new(Server::over(backing));
        let directory = tempfile::tempdir().expect("creating a directory");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("quorum-blk-test".into())];
        let session = fuser::spawn_mount(Disk(Arc::clone(&server)), directory.path(), &config)
            .expect(
                "mounting a FUSE file system; this takes /dev/fuse and the right to mount (root)",
            );
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(directory.path().join(FILE_NAME))
            .expect("looking the file up");
        detach(directory.path());
        let deferred = thread::spawn({
            let server = Arc::clone(&server);
            move || server.run_deferred()
        });
        Self {
            server,
            session: Some(session),
            deferred: Some(deferred),
            file: Some(file),
        }
    }

    /// A path to the file, for all processes.
    pub fn path(&self) -> PathBuf {
        let file = self.file.as_ref().expect("there until dropped");
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ))
    }

    /// From now on `operation` has this fault, and no other.
    pub fn inject(&self, operation: Operation, fault: Fault) {
        self.server.lock().faults[operation as usize] = Some(fault);
    }

    /// Clears all faults. Operations that hang or wait complete at once, in the order they came.
    pub fn clear_faults(&self) {
        self.server.clear_faults();
    }

    /// How many `operation`s were received since the file is served.
    pub fn asked(&self, operation: Operation) -> u64 {
        self.server.lock().asked[operation as usize]
    }

    /// How many of them have completed.
    pub fn done(&self, operation: Operation) -> u64 {
        self.server.lock().done[operation as usize]
    }

    /// How many of the writes had to be durable when they completed.
    pub fn durable_writes(&self) -> u64 {
        self.server.lock().durable_writes
    }

    /// Clears the faults when dropped.
    pub fn fault_guard(&self) -> FaultGuard {
        FaultGuard(Arc::clone(&self.server))
    }
}

impl Drop for FuseImage {
    fn drop(&mut self) {
        self.server.clear_faults();
        // With the last descriptor goes the mount, and with the mount the connection.
        drop(self.file.take());
        let session = self.session.take().expect("dropped once");
        let ended = wait_until(END_LIMIT, || session.guard.is_finished());
        self.server.lock().ended = true;
        self.server.changed.notify_all();
        if let Some(deferred) = self.deferred.take() {
            let _ = deferred.join();
        }
        if ended {
            let result = session.join();
            if !thread::panicking() {
                result.expect("serving the file");
            }
        } else {
            println!(
                "a FUSE image is still open after {END_LIMIT:?}; it stays until this process ends"
            );
        }
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        self.0.clear_faults();
    }
}

/// Removes a mount from the directory tree. It lives on while its file is open.
fn detach(mount_point: &Path) {
    let path = CString::new(mount_point.as_os_str().as_bytes()).expect("no NUL in a path");
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(result, 0, "umount2: {}", io::Error::last_os_error());
}

impl Server {
    fn over(backing: &Path) -> Self {
        let backing = OpenOptions::new().read(true).write(true).open(backing);
        Self {
            backing: backing.expect("opening an image"),
            state: Mutex::new(State {
                faults: [None; 4],
                next_free: [Instant::now(); 4],
                asked: [0; 4],
                done: [0; 4],
                durable_writes: 0,
                waiting: BTreeMap::new(),
                hung: Vec::new(),
                number: 0,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Also used while a panic unwinds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear_faults(&self) {
        let mut state = self.lock();
        state.faults = [None; 4];
        let now = Instant::now();
        let late: Vec<Job> = std::mem::take(&mut state.waiting).into_values().collect();
        let hung = std::mem::take(&mut state.hung);
        for job in late.into_iter().chain(hung) {
            state.defer(now, job);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Runs `job` with its fault, now or later.
    fn serve(
        &self,
        operation: Operation,
        bytes: Range<u64>,
        job: impl FnOnce(&File, Result<u8, Errno>) + Send + 'static,
    ) {
        let now = Instant::now();
        let mut state = self.lock();
        state.asked[operation as usize] += 1;
        let fault = state.faults[operation as usize];
        let effect = match fault {
            Some(Fault::Corrupt(mask)) => Ok(mask),
            Some(Fault::Fail(errno)) => Err(Errno::from_i32(errno)),
            Some(Fault::FailIn(errno, from, to)) if bytes.start < to && from < bytes.end => {
                Err(Errno::from_i32(errno))
            }
            _ => Ok(0),
        };
        let job = move |server: &Self| {
            job(&server.backing, effect);
            server.lock().done[operation as usize] += 1;
        };
        let due = match fault {
            None | Some(Fault::Corrupt(_) | Fault::Fail(_) | Fault::FailIn(..)) => {
                drop(state);
                return job(self);
            }
            Some(Fault::Hang) => {
                state.hung.push(Box::new(job));
                return;
            }
            Some(Fault::Delay(min, max)) => now + min + (max - min).mul_f64(state.fraction()),
            Some(Fault::PerSecond(count)) => {
                let due = state.next_free[operation as usize].max(now);
                state.next_free[operation as usize] = due + Duration::from_secs(1) / count;
                due
            }
        };
        state.defer(due, Box::new(job));
        drop(state);
        self.changed.notify_all();
    }

    /// Runs what waits, each when it is due, until the end.
    fn run_deferred(&self) {
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

    fn attributes(&self, inode: INodeNo) -> io::Result<FileAttr> {
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

    /// Something between 0 and 1 that looks random.
    fn fraction(&self) -> f64 {
        let mixed = self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        f64::from(u16::try_from(mixed).expect("16 bits are left")) / 65536.0
    }
}

/// The file system as the kernel sees it.
struct Disk(Arc<Server>);

impl Disk {
    fn getattr_of(&self, inode: INodeNo, reply: ReplyAttr) {
        match self.0.attributes(inode) {
            Ok(attributes) => reply.attr(&ATTRIBUTES_VALID, &attributes),
            Err(error) => reply.error(error.into()),
        }
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // An operation that hangs must hold up nothing but itself. Every kernel that has io_uring
        // has this.
        let added = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        added.map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        let set = config.set_max_background(REQUESTS_MAX);
        set.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.attributes(FILE_INODE) {
            Ok(attributes) if name == FILE_NAME => {
                reply.entry(&ATTRIBUTES_VALID, &attributes, Generation(0))
            }
            Ok(_) => reply.error(Errno::ENOENT),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.getattr_of(inode, reply);
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
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
        let server = Arc::clone(&self.0);
        let Some(size) = size else {
            return self.getattr_of(inode, reply);
        };
        self.0.serve(Operation::Resize, 0..0, move |file, fault| {
            let resized = fault.and_then(|_| Ok(file.set_len(size)?));
            match resized.and_then(|()| Ok(server.attributes(inode)?)) {
                Ok(attributes) => reply.attr(&ATTRIBUTES_VALID, &attributes),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let range = offset..offset + u64::from(size);
        self.0.serve(Operation::Read, range, move |file, fault| {
            match fault.and_then(|mask| {
                let mut bytes = vec![0; size as usize];
                let read = read_at(file, &mut bytes, offset)?;
                bytes.truncate(read);
                change(&mut bytes, mask);
                Ok(bytes)
            }) {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // Both also come from RWF_DSYNC and RWF_SYNC of the one write.
        if flags.0 & (libc::O_DSYNC | libc::O_SYNC) != 0 {
            self.0.lock().durable_writes += 1;
        }
        let mut bytes = data.to_vec();
        let range = offset..offset + data.len() as u64;
        self.0.serve(Operation::Write, range, move |file, fault| {
            match fault.and_then(|mask| {
                change(&mut bytes, mask);
                file.write_all_at(&bytes, offset)?;
                Ok(u32::try_from(bytes.len()).expect("at most 16 MiB"))
            }) {
                Ok(written) => reply.written(written),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Nothing is synced: no test takes the power away.
        self.0
            .serve(Operation::Sync, 0..0, move |_, fault| match fault {
                Ok(_) => reply.ok(),
                Err(errno) => reply.error(errno),
            });
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
