//! The images that all systems serve in turn.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::interrupt::{self, Interrupted};
use super::plan::Storage;
use super::requests::WriteData;
use testkit::images::{are_identical, create_images};

/// Bytes of one read.
const READ_BYTES: usize = 1 << 20;

/// Images with the same random content, removed when dropped.
pub struct Images {
    storage: Storage,
    paths: Vec<PathBuf>,
    _directory: TempDir,
}

impl Images {
    /// Creates `count` images of `size_bytes` with writes of `fill_bytes`, on tmpfs or in
    /// `directory`.
    pub fn create(
        storage: Storage,
        count: usize,
        size_bytes: u64,
        fill_bytes: usize,
        directory: &Path,
    ) -> Result<Self, Interrupted> {
        let place = match storage {
            Storage::Cache | Storage::Disk => directory,
            Storage::Tmpfs => Path::new("/dev/shm"),
        };
        let directory = tempfile::Builder::new()
            .prefix("quorum-blk-bench-")
            .tempdir_in(place);
        let directory = directory.expect("creating a directory for images");
        let images = Self {
            storage,
            paths: create_images(directory.path(), count, size_bytes),
            _directory: directory,
        };
        let files: Vec<File> = images.files(count).collect();
        let mut data = WriteData::new();
        let mut buffer = vec![0; fill_bytes];
        for offset in (0..size_bytes).step_by(fill_bytes) {
            interrupt::check()?;
            data.fill(&mut buffer);
            for file in &files {
                file.write_all_at(&buffer, offset)
                    .expect("filling an image");
            }
        }
        Ok(images)
    }

    /// The first `count` images.
    pub fn first(&self, count: usize) -> &[PathBuf] {
        &self.paths[..count]
    }

    fn files(&self, count: usize) -> impl Iterator<Item = File> {
        let paths = self.first(count).iter();
        paths.map(|path| {
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .expect("opening an image")
        })
    }

    /// Writes back all dirty pages.
    pub fn sync(&self, count: usize) -> Result<(), Interrupted> {
        for file in self.files(count) {
            interrupt::check()?;
            file.sync_all().expect("syncing an image");
        }
        Ok(())
    }

    /// Syncs the images and makes the page cache hold all of them, or none of them if the storage
    /// does not use it.
    pub fn prepare(&self, count: usize) -> Result<(), Interrupted> {
        self.sync(count)?;
        let mut buffer = vec![0; READ_BYTES];
        for mut file in self.files(count) {
            interrupt::check()?;
            if self.storage == Storage::Disk {
                // SAFETY: posix_fadvise takes no pointer.
                let result = unsafe {
                    libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED)
                };
                assert_eq!(result, 0, "dropping an image from the page cache");
            } else {
                while file.read(&mut buffer).expect("reading an image") > 0 {}
            }
        }
        Ok(())
    }

    /// The same, where a daemon that has opened them has taken them out of the page cache.
    pub fn prepare_again(&self, count: usize) -> Result<(), Interrupted> {
        match self.storage {
            Storage::Cache => self.prepare(count),
            Storage::Disk | Storage::Tmpfs => Ok(()),
        }
    }

    /// Panics if the replicas differ: no measurement may leave them different.
    pub fn assert_identical(&self, count: usize) {
        assert!(
            are_identical(self.first(count)),
            "the replicas differ after the writes"
        );
    }
}
