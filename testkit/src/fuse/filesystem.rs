//! The file system as the kernel sees it: each request goes to the server.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::answers;
use super::faults::{Effect, Operation};
use super::server::Server;

/// The inode of the file.
pub(super) const FILE_INODE: INodeNo = INodeNo(2);
/// How long the kernel may cache the attributes of the file: not at all, so that a test can make
/// the question for them hang.
const ATTRIBUTES_VALID: Duration = Duration::ZERO;
/// Requests that the kernel hands over without waiting for answers; a test hangs more than the
/// default, 16.
const REQUESTS_MAX: u16 = 4096;

/// The file system as the kernel sees it.
pub(super) struct Disk(pub(super) Arc<Server>);

impl Disk {
    fn getattr_of(&self, inode: INodeNo, reply: ReplyAttr) {
        let serve = move |server: &Server, fault: Result<Effect, Errno>| match fault
            .and_then(|_| Ok(server.attributes(inode)?))
        {
            Ok(attributes) => reply.attr(&ATTRIBUTES_VALID, &attributes),
            Err(errno) => reply.error(errno),
        };
        self.0.serve(Operation::Attributes, 0..0, serve);
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.0.is_plain {
            return Ok(());
        }
        // An operation that hangs must hold up nothing but itself. Every kernel that has io_uring
        // has this.
        answers::add_parallel_requests(config)?;
        let set = config.set_max_background(REQUESTS_MAX);
        set.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.attributes(FILE_INODE) {
            Ok(attributes) if name == self.0.name => {
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
        let Some(size) = size else {
            return self.getattr_of(inode, reply);
        };
        self.0.serve(Operation::Resize, 0..0, move |server, fault| {
            let resized = fault.and_then(|_| Ok(server.backing.set_len(size)?));
            match resized.and_then(|()| Ok(server.attributes(inode)?)) {
                Ok(attributes) => reply.attr(&ATTRIBUTES_VALID, &attributes),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match self.0.is_plain {
            true => FopenFlags::FOPEN_DIRECT_IO,
            false => answers::UNCACHED,
        };
        self.0
            .serve(Operation::Open, 0..0, move |_, fault| match fault {
                Ok(_) => reply.opened(FileHandle(0), flags),
                Err(errno) => reply.error(errno),
            });
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
        self.0.serve(Operation::Read, range, move |server, fault| {
            match fault.and_then(|effect| server.read(offset, size as usize, effect)) {
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
        self.0.serve(Operation::Write, range, move |server, fault| {
            match fault.and_then(|effect| server.write(offset, &mut bytes, effect)) {
                Ok(written) => reply.written(written),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.0
            .serve(Operation::FindData, 0..0, move |server, fault| match fault
                .and_then(|_| Ok(server.seek(offset, whence)?))
            {
                Ok(found) => reply.offset(found),
                Err(errno) => reply.error(errno),
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
