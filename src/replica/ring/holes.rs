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
use std::time::{Duration, Instant};

use log::debug;
use rustix::fs::{FileType, SeekFrom, fstat, fstatfs, seek};
use rustix::io::Errno;
use slab::Slab;
use vmm_sys_util::eventfd::EventFd;

use crate::common::operation::{Action, Operation};
use crate::common::{FoundData, NOT_POISONED, ReplicaIndex, ReplicaSet, SECTOR_BYTES, SectorRange};
use crate::limits::{HOLE_BYTES_MIN, HOLES_ANSWER_TIME, HOLES_PER_ANSWER_MAX, REPLICAS_MAX};
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

/// The answers that the ring has not taken, each with its slot.
struct Answers {
    list: Mutex<Vec<(usize, FoundData)>>,
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
            self.answers.add(slot, FoundData::everywhere(range));
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
        answers.into_iter().map(|(slot, answer)| {
            let (mut operation, since) = self.asked.remove(slot);
            self.by_replica[operation.replica.as_usize()] -= 1;
            if let Action::FindData { found, .. } = &mut operation.action {
                *found = answer;
            }
            (operation, since)
        })
    }
}

impl Answers {
    fn add(&self, slot: usize, found: FoundData) {
        let mut list = self.list.lock().expect(NOT_POISONED);
        list.push((slot, found));
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
            let found = match answers_right {
                true => self.find_data(range, HOLES_ANSWER_TIME).ok(),
                false => None,
            };
            answers.add(slot, found.unwrap_or(FoundData::everywhere(range)));
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

    /// Where there is data, from the start of `range` on: as far as it finds out in about this
    /// time, and in any case up to the end of the first data.
    fn find_data(&self, range: SectorRange, time: Duration) -> io::Result<FoundData> {
        let began = Instant::now();
        let mut found = FoundData::from(range.start);
        while found.until() < range.end() {
            let data = self.next_data(found.until())?;
            let behind_data = match data < range.end() {
                true => self.next_hole(data)?,
                false => data,
            };
            // A short hole takes no longer to read than to skip.
            if found.runs().is_empty() || data - found.until() >= HOLE_BYTES_MIN / SECTOR_BYTES {
                found.hole_until(data.min(range.end()));
            }
            found.data_until(behind_data.min(range.end()));
            if found.runs().len() >= HOLES_PER_ANSWER_MAX || began.elapsed() >= time {
                break;
            }
        }
        Ok(found)
    }

    /// The first sector with data, from `sector` on; behind the end of the file all counts as data.
    fn next_data(&self, sector: u64) -> io::Result<u64> {
        // No operation depends on the position in the file.
        let data = match seek(&self.file, SeekFrom::Data(sector * SECTOR_BYTES)) {
            Ok(data) => data,
            // A hole up to the end of the file, which another program may have cut.
            Err(Errno::NXIO) => seek(&self.file, SeekFrom::End(0))?,
            Err(error) => return Err(error.into()),
        };
        Ok((data / SECTOR_BYTES).max(sector))
    }

    /// The first sector behind the data that begins at `sector`.
    fn next_hole(&self, sector: u64) -> io::Result<u64> {
        match seek(&self.file, SeekFrom::Hole(sector * SECTOR_BYTES)) {
            Ok(hole) if hole > sector * SECTOR_BYTES => Ok(hole.div_ceil(SECTOR_BYTES)),
            // It was data a moment ago, or is behind the end of the file.
            Ok(_) | Err(Errno::NXIO) => Ok(u64::MAX),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const A_MINUTE: Duration = Duration::from_secs(60);

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
        let sectors = |mebibytes: u64| (mebibytes << 20) / SECTOR_BYTES;
        let data = |start, count| {
            let range = SectorRange::new(start, count);
            let found = file.find_data(range, A_MINUTE).unwrap();
            assert_eq!(found.until(), range.end());
            found.runs().to_vec()
        };
        let island = SectorRange::new(sectors(16), 8);
        assert_eq!(data(0, sectors(64)), [island]);
        assert_eq!(data(0, 8), []);
        assert_eq!(data(sectors(16), sectors(48)), [island]);
        assert_eq!(data(sectors(16), 4), [SectorRange::new(sectors(16), 4)]);
        assert_eq!(
            data(sectors(16) + 4, 4),
            [SectorRange::new(sectors(16) + 4, 4)]
        );
        let behind = |start, count| [SectorRange::new(sectors(start), count)];
        assert_eq!(data(sectors(32), sectors(64)), behind(64, sectors(32)));
        assert_eq!(data(sectors(70), 8), behind(70, 8));
    }

    #[test]
    fn an_answer_has_a_bound() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let places = HOLES_PER_ANSWER_MAX as u64 + 10;
        for place in 0..places {
            file.write_all_at(&[1; 4096], place << 17).unwrap();
        }
        // The hole before it is short.
        file.write_all_at(&[1; 4096], 8 << 10).unwrap();
        let file = HoleFile {
            file: Arc::new(file.into()),
            cached: true,
        };
        if !file.answers_right().unwrap() {
            return;
        }
        let range = SectorRange::new(0, (64 << 20) / SECTOR_BYTES);
        let found = file.find_data(range, A_MINUTE).unwrap();
        assert_eq!(found.runs().len(), HOLES_PER_ANSWER_MAX);
        let at = |place: u64, count| SectorRange::new((place << 17) / SECTOR_BYTES, count);
        assert_eq!(found.runs()[..2], [at(0, 24), at(1, 8)]);
        assert_eq!(found.until(), at(HOLES_PER_ANSWER_MAX as u64 - 1, 8).end());
        let found = file.find_data(range, Duration::ZERO).unwrap();
        assert_eq!((found.runs(), found.until()), (&[at(0, 8)][..], 8));
        let rest = SectorRange::new(8, range.count - 8);
        let found = file.find_data(rest, Duration::ZERO).unwrap();
        assert_eq!(found.runs(), [SectorRange::new(16, 8)]);
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
