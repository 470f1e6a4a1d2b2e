//! Where a file has holes: questions that io_uring cannot answer.
//!
//! The answer may wait for the file system, so each replica that is asked gets a thread, which
//! lasts as long as the ring uses the file. What is not known to be a hole is data: a block device,
//! a file on a file system that is not known to answer right, and any error.
//!
//! A hole that is reported must read as zeroes, also while writes are only in the page cache. The
//! file systems of [`HoleFile::answers_right`] see to that. FUSE does not know what is in the page
//! cache, so it is asked about files with direct I/O only.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use log::debug;
use rustix::fs::{FileType, SeekFrom, fstat, fstatfs, seek};
use rustix::io::Errno;
use slab::Slab;
use vmm_sys_util::eventfd::EventFd;

use crate::common::operation::{Action, Operation};
use crate::common::{NOT_POISONED, ReplicaIndex, ReplicaSet, SECTOR_BYTES, SectorRange};
use crate::limits::REPLICAS_MAX;
use crate::statistics::Since;

/// The questions of a ring.
pub(super) struct Questions {
    /// Those without an answer.
    asked: Slab<(Operation, Since)>,
    by_replica: [usize; REPLICAS_MAX],
    /// The threads.
    askers: Vec<Option<Sender<Question>>>,
    answers: Arc<Answers>,
}

/// One question for a thread.
struct Question {
    slot: usize,
    range: SectorRange,
}

/// The answers that the ring has not taken: a slot, and how many sectors are a hole.
struct Answers {
    list: Mutex<Vec<(usize, u64)>>,
    event: Arc<EventFd>,
}

/// A file to ask.
#[derive(Clone, Debug)]
pub(super) struct HoleFile {
    pub(super) file: Arc<OwnedFd>,
    /// It is written through the page cache.
    pub(super) cached: bool,
}

impl Questions {
    /// No questions. `event` is signalled after each answer.
    pub(super) fn new(event: Arc<EventFd>) -> Self {
        Self {
            asked: Slab::new(),
            by_replica: [0; REPLICAS_MAX],
            askers: (0..REPLICAS_MAX).map(|_| None).collect(),
            answers: Arc::new(Answers {
                list: Mutex::default(),
                event,
            }),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    /// The replicas that have not answered.
    pub(super) fn replicas(&self) -> ReplicaSet {
        let all = ReplicaSet::first(REPLICAS_MAX).iter();
        all.filter(|replica| self.by_replica[replica.as_usize()] > 0)
            .collect()
    }

    /// Asks `file` for what `operation` wants to know. If the replica has not answered the last
    /// question, there is no hole.
    pub(super) fn ask(&mut self, operation: Operation, since: Since, file: Option<&HoleFile>) {
        let replica = operation.replica.as_usize();
        let (_, range) = operation.action.describe();
        // It hangs, perhaps, and each question would wait behind it.
        let is_busy = self.by_replica[replica] > 0;
        self.by_replica[replica] += 1;
        let slot = self.asked.insert((operation, since));
        let question = Question { slot, range };
        if self.askers[replica].is_none()
            && !is_busy
            && let Some(file) = file
        {
            self.askers[replica] = self.start(file);
        }
        let is_asked = match &self.askers[replica] {
            Some(asker) if !is_busy => asker.send(question).is_ok(),
            Some(_) | None => false,
        };
        if !is_asked {
            self.answers.add(slot, 0);
        }
    }

    fn start(&self, file: &HoleFile) -> Option<Sender<Question>> {
        let (file, answers) = (file.clone(), Arc::clone(&self.answers));
        let (asker, questions) = channel();
        let thread = std::thread::Builder::new().name("holes".into());
        match thread.spawn(move || file.answer(&questions, &answers)) {
            Ok(_) => Some(asker),
            Err(error) => {
                debug!(error:%; "no thread to ask for holes");
                None
            }
        }
    }

    /// The replica has another file from now on.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.askers[replica.as_usize()] = None;
    }

    /// Takes the answers that have come: the operations, with the answer.
    pub(super) fn take(&mut self) -> impl Iterator<Item = (Operation, Since)> + '_ {
        let answers = std::mem::take(&mut *self.answers.list.lock().expect(NOT_POISONED));
        answers.into_iter().map(|(slot, sectors)| {
            let (mut operation, since) = self.asked.remove(slot);
            self.by_replica[operation.replica.as_usize()] -= 1;
            if let Action::FindData { hole_sectors, .. } = &mut operation.action {
                *hole_sectors = sectors;
            }
            (operation, since)
        })
    }
}

impl Answers {
    fn add(&self, slot: usize, hole_sectors: u64) {
        let mut list = self.list.lock().expect(NOT_POISONED);
        list.push((slot, hole_sectors));
        drop(list);
        // The counter cannot overflow: each write adds one.
        let _ = self.event.write(1);
    }
}

impl HoleFile {
    /// Answers until no question can come.
    fn answer(&self, questions: &Receiver<Question>, answers: &Answers) {
        let answers_right = self.answers_right().unwrap_or(false);
        while let Ok(Question { slot, range }) = questions.recv() {
            let hole_sectors = match answers_right {
                true => self.hole_sectors(range).unwrap_or(0),
                false => 0,
            };
            answers.add(slot, hole_sectors);
        }
    }

    /// Whether a hole that the file system reports reads as zeroes.
    fn answers_right(&self) -> io::Result<bool> {
        let mode = fstat(&self.file)?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::RegularFile {
            return Ok(false);
        }
        Ok(match fstatfs(&self.file)?.f_type {
            libc::EXT4_SUPER_MAGIC
            | libc::XFS_SUPER_MAGIC
            | libc::BTRFS_SUPER_MAGIC
            | libc::TMPFS_MAGIC
            | libc::NFS_SUPER_MAGIC => true,
            libc::FUSE_SUPER_MAGIC => !self.cached,
            _ => false,
        })
    }

    /// How many sectors are a hole, from the start of `range` on.
    fn hole_sectors(&self, range: SectorRange) -> io::Result<u64> {
        let (start, bytes) = (range.start * SECTOR_BYTES, range.bytes());
        // No operation depends on the position in the file.
        let data = match seek(&self.file, SeekFrom::Data(start)) {
            Ok(data) => data,
            // A hole up to the end of the file, which another program may have cut.
            Err(Errno::NXIO) => seek(&self.file, SeekFrom::End(0))?,
            Err(error) => return Err(error.into()),
        };
        Ok(data.saturating_sub(start).min(bytes) / SECTOR_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_hole_ends_at_data_and_at_the_end_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4096], 16 << 20).unwrap();
        let file = HoleFile {
            file: Arc::new(file.into()),
            cached: true,
        };
        if !file.answers_right().unwrap() {
            return;
        }
        let hole = |start, count| file.hole_sectors(SectorRange::new(start, count)).unwrap();
        let sectors = |mebibytes: u64| (mebibytes << 20) / SECTOR_BYTES;
        assert_eq!(hole(0, sectors(64)), sectors(16));
        assert_eq!(hole(0, 8), 8);
        assert_eq!(hole(sectors(16), sectors(48)), 0);
        assert_eq!(hole(sectors(32), sectors(64)), sectors(32));
        assert_eq!(hole(sectors(70), 8), 0, "behind the end of the file");
    }

    #[test]
    fn what_is_no_file_has_no_holes() {
        let null = HoleFile {
            file: Arc::new(File::open("/dev/null").unwrap().into()),
            cached: true,
        };
        assert!(!null.answers_right().unwrap());
    }
}
