//! An image on its way to become a replica: opened, aligned, locked.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{OnceLock, RwLock};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::alignment::Alignment;
use super::changes::Seen;
use super::contents::Contents;
use super::error::with_path;
use super::examine::{self, Facts, Fault, Image, Locked};
use super::format::Format;
use super::opener::{Answer, NoAnswer, Opener};
use super::{OpenError, OpenOptions, Opening, ReplicaFile, ReplicaSource, spawner};
use crate::common::buffer::BUFFER_ALIGNMENT_BYTES;
use crate::limits::OPEN_LIMIT;
use crate::replica::image_lock::Locking;
use crate::replica::record_file::{Keeper, RecordAccess};

/// How long to wait for an image in use. The kernel closes the files of an io_uring some 50 ms
/// after its process is gone, on a busy machine much later. The wait lets a daemon start
/// immediately after the previous one was killed.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_LOGGED_AFTER: Duration = Duration::from_millis(500);
const BUSY_INTERVAL: Duration = Duration::from_millis(10);

/// An image that is being opened.
pub(super) struct Started<'a> {
    source: &'a ReplicaSource,
    options: OpenOptions,
    /// It is opened without leaving this directory.
    directory: Option<&'a Path>,
    /// `None`: the calling thread opens it.
    opener: io::Result<Option<Opener>>,
    by: Instant,
}

/// An image that is open.
pub(super) struct Candidate {
    replica: ReplicaFile,
    facts: Facts,
    options: OpenOptions,
    opener: Option<Opener>,
}

impl Candidate {
    /// Begins to open an image.
    pub(super) fn start<'a>(
        source: &'a ReplicaSource,
        options: OpenOptions,
        opening: Opening,
        directory: Option<&'a Path>,
    ) -> Started<'a> {
        let opener = match opening {
            Opening::Here => Ok(None),
            Opening::Apart => match Opener::start(&source.path, options, directory) {
                Ok(opener) => Ok(Some(opener)),
                Err(error) if spawner::is_needed() => Err(error),
                Err(error) => {
                    log::warn!(
                        file:% = source.path.display(), error:%;
                        "cannot start a process that opens an image: the daemon opens it itself, \
                         and waits as long as the file system does not answer"
                    );
                    Ok(None)
                }
            },
        };
        Started {
            source,
            options,
            directory,
            opener,
            by: Instant::now() + OPEN_LIMIT,
        }
    }

    /// The replica, which is not locked yet.
    pub(super) fn replica(&self) -> &ReplicaFile {
        &self.replica
    }

    /// Finds the alignment that direct I/O needs, and checks that the image is raw.
    ///
    /// Not before it is known that the image is none that is open already, because this may read,
    /// and a read of an image that hangs does not return: perhaps one that was removed from this
    /// disk for that reason.
    pub(super) fn examine(&mut self) -> Result<(), OpenError> {
        if self.replica.size_bytes == 0 {
            return Ok(());
        }
        if self.options.direct {
            self.align()?;
        }
        if self.options.raw_anyway {
            return Ok(());
        }
        self.check_format()
    }

    fn align(&mut self) -> Result<(), OpenError> {
        let Alignment {
            offset_bytes,
            memory_bytes,
        } = match &mut self.opener {
            None => examine::alignment(&self.replica.file, &self.facts),
            Some(opener) => {
                let found = opener.alignment(Instant::now() + OPEN_LIMIT);
                self.answered(found)?
            }
        };
        let is_direct = offset_bytes <= self.options.block_bytes
            && memory_bytes as usize <= BUFFER_ALIGNMENT_BYTES;
        if !is_direct {
            self.use_page_cache()?;
            log::warn!(
                replica:% = self.replica.node_name(), alignment = offset_bytes.max(memory_bytes),
                "block-size" = self.options.block_bytes;
                "direct I/O on an image needs a larger alignment than the blocks of the disk have: \
                 the image is accessed through the page cache, which costs time"
            );
        }
        self.replica.is_direct = is_direct;
        Ok(())
    }

    fn use_page_cache(&self) -> Result<(), OpenError> {
        let file = &self.replica.file;
        let changed = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags - OFlags::DIRECT));
        changed.map_err(|error| OpenError::Examine {
            path: self.replica.path.clone(),
            operation: "F_SETFL",
            source: error.into(),
        })
    }

    /// Checks that the first `size_bytes` bytes hold no data. Reads.
    pub(super) fn check_holds_nothing(&mut self, size_bytes: u64) -> Result<(), OpenError> {
        let contents = match &mut self.opener {
            None => Contents::of(&self.replica.file, size_bytes),
            Some(opener) => {
                let found = opener.contents(size_bytes, Instant::now() + OPEN_LIMIT);
                self.answered(found)?
            }
        };
        let path = self.replica.path.clone();
        match contents {
            Contents::Nothing => Ok(()),
            Contents::Data(at) => Err(OpenError::HoldsData { path, at }),
            Contents::Zeroes => Err(OpenError::MayHoldData { path, at: 0 }),
            Contents::Unknown(at) => Err(OpenError::MayHoldData { path, at }),
        }
    }

    /// Begins a short look at what the first `size_bytes` bytes hold; [`Self::glanced`] ends it.
    pub(super) fn glance(&mut self, size_bytes: u64) -> Result<(), OpenError> {
        let begun = match &self.opener {
            None => Ok(Ok(())),
            Some(opener) => opener.glance(size_bytes).map(Ok).map_err(NoAnswer::from),
        };
        self.answered(begun)
    }

    /// What a short look at the first `size_bytes` bytes has found.
    pub(super) fn glanced(&mut self, size_bytes: u64) -> Result<Contents, OpenError> {
        match &mut self.opener {
            None => Ok(Contents::at_a_glance(&self.replica.file, size_bytes)),
            Some(opener) => {
                let found = opener.glanced(Instant::now() + OPEN_LIMIT);
                self.answered(found)
            }
        }
    }

    fn check_format(&mut self) -> Result<(), OpenError> {
        let format = match &mut self.opener {
            None => Format::of(&self.replica.file, self.facts.size_bytes),
            Some(opener) => {
                let found = opener.format(Instant::now() + OPEN_LIMIT);
                self.answered(found)?
            }
        };
        match format {
            None => Ok(()),
            Some(format) => Err(OpenError::NotRaw {
                path: self.replica.path.clone(),
                format,
            }),
        }
    }

    /// Claims and locks the image.
    pub(super) fn lock(&mut self) -> Result<(), OpenError> {
        self.replica._claim = self.when_free(examine::claim, Opener::claim)?;
        let Locked {
            locking,
            stamp,
            cache_forgotten,
        } = self.when_free(examine::lock, Opener::lock)?;
        self.replica.stamp = stamp;
        self.replica.opened_again = match &mut self.opener {
            None => examine::open_again(&self.replica.file, self.options),
            Some(opener) => {
                let again = opener.open_again(Instant::now() + OPEN_LIMIT).map(Ok);
                self.answered(again)?
            }
        };
        if !cache_forgotten {
            log::warn!(
                replica:% = self.replica.node_name(), file:% = self.replica.path.display();
                "the kernel has much of an image to write back; what it could not write before \
                 may be read from its page cache for some time"
            );
        }
        if locking == Locking::Unsupported {
            log::warn!(
                replica:% = self.replica.node_name(), file:% = self.replica.path.display();
                "cannot lock an image: its file system has no open file description locks; make \
                 sure that no other process uses it"
            );
        }
        Ok(())
    }

    /// The replica that it has become, and the way to its record.
    pub(super) fn into_parts(self) -> (ReplicaFile, RecordAccess) {
        let path = &self.replica.path;
        let keeper = Keeper::new(path, self.facts.identity, self.options.read_only);
        let records = RecordAccess::new(path.clone(), self.opener, keeper);
        (self.replica, records)
    }

    /// The replica that it has become.
    pub(super) fn into_replica(self) -> ReplicaFile {
        self.replica
    }

    /// Does a step, by itself or through the opener; waits some time for another process that has
    /// the image in use.
    fn when_free<T>(
        &mut self,
        here: fn(&File, OpenOptions) -> Result<T, Fault>,
        apart: fn(&mut Opener, Instant) -> Result<Answer<T>, NoAnswer>,
    ) -> Result<T, OpenError> {
        let since = Instant::now();
        let mut logged = false;
        loop {
            let done = match &mut self.opener {
                None => Ok(here(&self.replica.file, self.options)),
                Some(opener) => apart(opener, Instant::now() + OPEN_LIMIT),
            };
            match done {
                Ok(Err(fault)) if fault.is_busy() && since.elapsed() < BUSY_LIMIT => {
                    std::thread::sleep(BUSY_INTERVAL);
                    if !logged && since.elapsed() >= BUSY_LOGGED_AFTER {
                        logged = true;
                        log::info!(
                            replica:% = self.replica.node_name(),
                            file:% = self.replica.path.display();
                            "waiting for another process to release an image"
                        );
                    }
                }
                done => return self.answered(done),
            }
        }
    }

    fn answered<T>(&self, answer: Result<Result<T, Fault>, NoAnswer>) -> Result<T, OpenError> {
        with_path(answer, &self.replica.path, self.options.read_only)
    }
}

impl Started<'_> {
    /// Waits until the image is open.
    pub(super) fn open(self) -> Result<Candidate, OpenError> {
        let path = &self.source.path;
        let not_started = |source| OpenError::Opener {
            path: path.clone(),
            source,
        };
        let mut opener = self.opener.map_err(not_started)?;
        let opened = match &mut opener {
            None => Ok(Image::open(path, self.options, self.directory)),
            Some(opener) => opener.image(self.by),
        };
        let Image { file, facts } = with_path(opened, path, self.options.read_only)?;
        Ok(Candidate {
            replica: ReplicaFile {
                path: path.clone(),
                node_name: RwLock::new(self.source.node_name.as_str().into()),
                file,
                _claim: None,
                size_bytes: facts.size_bytes,
                is_direct: false,
                physical_block_bytes: facts.physical_block_bytes,
                waits_in_submission: facts.waits_in_submission,
                is_block_device: facts.is_block_device,
                identity: facts.identity,
                stamp: None,
                opened_again: Err(libc::EBADF),
                record: OnceLock::new(),
                location: facts.location.clone(),
                seen: Seen::default(),
            },
            facts,
            options: self.options,
            opener,
        })
    }
}
