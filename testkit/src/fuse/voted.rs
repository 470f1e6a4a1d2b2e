//! A disk that a daemon serves, as a file of this host: a file system can be made on it, and a loop
//! device makes it one that the kernel mounts.
//!
//! Every operation on the file becomes a request to the disk, past the page cache. Needs
//! `/dev/fuse` and the right to mount (root).

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, Filesystem, Generation, INodeNo,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use tempfile::TempDir;

use super::answers;
use super::filesystem::FILE_INODE;
use crate::client::{Client, Failed, Request as DiskRequest};

/// Connections to the daemon, each with one request at a time.
const CONNECTIONS: usize = 3;
const FILE_NAME: &str = "disk";
const VALID: Duration = Duration::from_secs(1);

/// The file. Drop it before the daemon, and after all that uses it.
pub struct VotedFile {
    session: Option<BackgroundSession>,
    mount_point: TempDir,
}

impl VotedFile {
    /// Mounts the disk of the daemon that listens at `socket`. It must run with `--shared`.
    pub fn mount(socket: &Path) -> Self {
        let connect = |_| Mutex::new(Client::connect(socket, 1));
        let clients: Vec<Mutex<Client>> = (0..CONNECTIONS).map(connect).collect();
        let first = clients[0].lock().unwrap_or_else(PoisonError::into_inner);
        let size_bytes = first.capacity_bytes();
        drop(first);
        let voted = Voted {
            clients,
            next: AtomicUsize::new(0),
            size_bytes,
        };
        let mount_point = tempfile::tempdir().expect("creating a directory");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("quorum-blk-test".into())];
        config.n_threads = Some(CONNECTIONS);
        let session = fuser::spawn_mount(voted, mount_point.path(), &config).expect(
            "mounting a FUSE file system; this takes /dev/fuse and the right to mount (root)",
        );
        Self {
            session: Some(session),
            mount_point,
        }
    }

    /// The path of the file.
    pub fn path(&self) -> PathBuf {
        self.mount_point.path().join(FILE_NAME)
    }
}

impl Drop for VotedFile {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // Unmounts it, and waits for its threads.
            let _ = session.umount_and_join();
        }
    }
}

struct Voted {
    clients: Vec<Mutex<Client>>,
    next: AtomicUsize,
    size_bytes: u64,
}

impl Voted {
    /// A connection without a request, or one that has to be waited for.
    fn client(&self) -> MutexGuard<'_, Client> {
        let free = self
            .clients
            .iter()
            .find_map(|client| client.try_lock().ok());
        free.unwrap_or_else(|| {
            let next = self.next.fetch_add(1, Ordering::Relaxed) % CONNECTIONS;
            self.clients[next]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        })
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let size_bytes = (inode == FILE_INODE).then_some(self.size_bytes);
        answers::attributes(inode, size_bytes, UNIX_EPOCH)
    }
}

fn errno(failed: Failed) -> Errno {
    Errno::from_i32(failed.0)
}

impl Filesystem for Voted {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        answers::add_parallel_requests(config)
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == FILE_NAME {
            reply.entry(&VALID, &self.attributes(FILE_INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&VALID, &self.attributes(inode));
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
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = (offset + u64::from(size)).min(self.size_bytes);
        let bytes = usize::try_from(end.saturating_sub(offset)).expect("at most size");
        if bytes == 0 {
            return reply.data(&[]);
        }
        match self.client().read(0, offset, bytes) {
            Ok(read) => reply.data(&read),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.client().write(0, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("at most 16 MiB")),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let request = if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            DiskRequest::WriteZeroes {
                offset,
                len: length,
                unmap: true,
            }
        } else if mode & libc::FALLOC_FL_ZERO_RANGE != 0 {
            DiskRequest::WriteZeroes {
                offset,
                len: length,
                unmap: false,
            }
        } else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        answers::empty(reply, self.client().run(0, &[request])[0].map_err(errno));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answers::empty(reply, self.client().flush(0).map_err(errno));
    }
}
