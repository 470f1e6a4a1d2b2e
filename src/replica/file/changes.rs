//! Notices what becomes of an image that is open: other programs truncate, delete or move it, or
//! put another one in its place (O2); its file system is gone (W13).
//!
//! Nothing here is on the path of a request. Looking at an image may wait for its file system for
//! ever, so each look has a thread of its own, and a replica has one at a time.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use log::debug;
use rustix::io::Errno;

use super::{ImageIdentity, ReplicaFile, spawner};
use crate::common::ReplicaIndex;
use crate::common::image::ImageChanges;
use crate::limits::IMAGE_LOOK_INTERVAL;
use crate::replica::table::ReplicaTable;
use crate::sandbox::{self, ThreadKind};

/// Bits of [`Seen`].
const TRUNCATED: u8 = 1;
const UNLINKED: u8 = 2;
const MOVED: u8 = 4;
/// A thread looks at the image.
const LOOKING: u8 = 8;

/// What the last look has found. Shared with the thread that looks.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<AtomicU8>);

impl Seen {
    pub(super) fn changes(&self) -> ImageChanges {
        let bits = self.0.load(Ordering::Relaxed);
        ImageChanges {
            truncated: bits & TRUNCATED != 0,
            unlinked: bits & UNLINKED != 0,
            moved: bits & MOVED != 0,
        }
    }

    /// Returns whether no other thread looks.
    fn begin(&self) -> bool {
        self.0.fetch_or(LOOKING, Ordering::Relaxed) & LOOKING == 0
    }

    /// Ends a look, with what it has found, if it could see anything. Returns whether that is new.
    fn end(&self, found: Option<ImageChanges>) -> bool {
        let before = self.changes();
        let found = found.unwrap_or(before);
        let bit = |holds: bool, bit| if holds { bit } else { 0 };
        let bits = bit(found.truncated, TRUNCATED)
            | bit(found.unlinked, UNLINKED)
            | bit(found.moved, MOVED);
        self.0.store(bits, Ordering::Relaxed);
        found != before
    }
}

/// What a look has found.
#[derive(Debug)]
pub enum Watched {
    /// Other programs have changed the image, or have undone that.
    Changed(ImageChanges),
    /// The open file cannot be used any more, and why. Found again at each look.
    Lost(io::Error),
}

/// What a look needs. It does not keep the image locked.
struct Look {
    file: File,
    path: PathBuf,
    node_name: Arc<str>,
    identity: ImageIdentity,
    disk_bytes: u64,
    seen: Seen,
}

/// Looks at the images of `table` again and again, on threads of its own, until the table is gone,
/// and calls `tell` with what is found. `disk_bytes` returns the size of the disk.
///
/// # Errors
/// If there is no thread for it.
pub fn watch(
    table: Weak<ReplicaTable>,
    disk_bytes: impl Fn() -> u64 + Send + 'static,
    tell: impl Fn(ReplicaIndex, &Arc<ReplicaFile>, Watched) + Send + Sync + 'static,
) -> io::Result<()> {
    let tell = Arc::new(tell);
    let thread = std::thread::Builder::new().name("images".into());
    thread.spawn(move || {
        sandbox::enter(ThreadKind::Images);
        loop {
            std::thread::sleep(IMAGE_LOOK_INTERVAL);
            spawner::report_end();
            let Some(table) = table.upgrade() else {
                return;
            };
            // Before the sizes of the images, which grow first.
            let disk_bytes = disk_bytes();
            for (index, replica) in table.in_use() {
                let (tell, file) = (Arc::clone(&tell), Arc::clone(&replica));
                look(&replica, disk_bytes, move |found| tell(index, &file, found));
            }
        }
    })?;
    Ok(())
}

fn look(replica: &ReplicaFile, disk_bytes: u64, tell: impl FnOnce(Watched) + Send + 'static) {
    let seen = replica.seen.clone();
    if !seen.begin() {
        return;
    }
    let started = replica.file.try_clone().and_then(|file| {
        let look = Look {
            file,
            path: replica.path.clone(),
            node_name: replica.node_name(),
            identity: replica.identity,
            disk_bytes,
            seen: seen.clone(),
        };
        let thread = std::thread::Builder::new().name("image".into());
        thread.spawn(move || {
            if let Some(found) = look.run() {
                tell(found);
            }
        })
    });
    if let Err(error) = started {
        debug!(replica:% = replica.node_name(), error:%; "cannot look at an image");
        seen.end(None);
    }
}

impl Look {
    /// What is new since the last look, or that the file is lost.
    fn run(self) -> Option<Watched> {
        if let Err(error) = self.is_usable() {
            self.seen.end(None);
            return Some(Watched::Lost(error));
        }
        let found = self.changes();
        if let Err(error) = &found {
            debug!(replica:% = self.node_name, error:%; "cannot look at an image");
        }
        let found = found.ok();
        let is_new = self.seen.end(found);
        found.filter(|_| is_new).map(Watched::Changed)
    }

    /// Whether the open file still leads to something: an error if its file system is gone,
    /// whatever has become of the path. The node of a block device outlives what it stands for.
    fn is_usable(&self) -> io::Result<()> {
        match rustix::fs::fstat(&self.file) {
            Err(error) if is_gone(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn changes(&self) -> io::Result<ImageChanges> {
        // No operation depends on the position in the file.
        let bytes = (&self.file).seek(SeekFrom::End(0))?;
        let is_file = matches!(self.identity, ImageIdentity::File { .. });
        let unlinked = is_file && self.file.metadata()?.nlink() == 0;
        Ok(ImageChanges {
            truncated: bytes < self.disk_bytes,
            unlinked,
            moved: !unlinked && is_elsewhere(&self.path, self.identity)?,
        })
    }
}

/// Whether an error says that there is nothing behind an open file any more: a FUSE server has
/// ended, or an NFS server does not know the file.
fn is_gone(error: Errno) -> bool {
    [
        Errno::NOTCONN,
        Errno::STALE,
        Errno::NODEV,
        Errno::NXIO,
        Errno::SHUTDOWN,
    ]
    .contains(&error)
}

/// Whether `path` does not lead to the image.
fn is_elsewhere(path: &Path, identity: ImageIdentity) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(ImageIdentity::of(&metadata) != identity),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{OpenOptions, open};
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn changes(replica: &ReplicaFile) -> ImageChanges {
        let look = Look {
            file: replica.file.try_clone().unwrap(),
            path: replica.path.clone(),
            node_name: replica.node_name(),
            identity: replica.identity,
            disk_bytes: SIZE,
            seen: replica.seen.clone(),
        };
        assert!(replica.seen.begin());
        assert!(!replica.seen.begin(), "one look at a time");
        let new = look.run();
        let seen = replica.seen.changes();
        assert!(match new {
            Some(Watched::Changed(changes)) => changes == seen,
            None => true,
            Some(Watched::Lost(error)) => panic!("{error}"),
        });
        seen
    }

    #[test]
    fn a_truncated_moved_or_deleted_image_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let image = |name: &str| File::create(path(name)).unwrap().set_len(SIZE).unwrap();
        image("a");
        let options = OpenOptions {
            raw_anyway: false,
            block_bytes: 512,
            read_only: false,
            direct: false,
        };
        let replica = open(&path("a"), "a", options).unwrap();
        let none = ImageChanges::default();
        assert_eq!(changes(&replica), none);

        replica.file.set_len(SIZE - 512).unwrap();
        let truncated = ImageChanges {
            truncated: true,
            ..none
        };
        assert_eq!(changes(&replica), truncated);
        replica.file.set_len(2 * SIZE).unwrap();
        assert_eq!(changes(&replica), none, "longer is as good");

        std::fs::rename(path("a"), path("b")).unwrap();
        let moved = ImageChanges {
            moved: true,
            ..none
        };
        assert_eq!(changes(&replica), moved);
        image("a");
        assert_eq!(changes(&replica), moved, "another file has its name");

        std::fs::remove_file(path("b")).unwrap();
        let unlinked = ImageChanges {
            unlinked: true,
            ..none
        };
        assert_eq!(changes(&replica), unlinked);
    }
}
