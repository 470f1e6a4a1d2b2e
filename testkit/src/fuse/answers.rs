//! What the file systems of this module answer in the same way.

use std::io;
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, FopenFlags, INodeNo, InitFlags, KernelConfig, ReplyEmpty};

/// How a file is opened whose operations all arrive here, several at a time.
pub(super) const UNCACHED: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// Has the kernel pass on the requests of one caller side by side.
pub(super) fn add_parallel_requests(config: &mut KernelConfig) -> io::Result<()> {
    let added = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
    added.map_err(|_| io::Error::from(io::ErrorKind::Unsupported))
}

pub(super) fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

/// The attributes of a file of this size, or of a directory.
pub(super) fn attributes(
    inode: INodeNo,
    size_bytes: Option<u64>,
    modified: SystemTime,
) -> FileAttr {
    let (kind, perm) = match size_bytes {
        Some(_) => (FileType::RegularFile, 0o600),
        None => (FileType::Directory, 0o700),
    };
    let size = size_bytes.unwrap_or(0);
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
