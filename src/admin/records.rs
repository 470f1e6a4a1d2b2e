//! The records of images that become replicas of a disk that is served.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::warn;
use uuid::Uuid;

use super::{Admin, AdminError};
use crate::common::pulse;
use crate::record::format::{self, Unusable};
use crate::record::start::Kept;
use crate::record::{Fingerprint, Holder, Layout, PastJob, Record};
use crate::replica::file::{ImageStamp, ReplicaFile};
use crate::replica::record_file::{RecordAccess, RecordError, RecordFile, StateDirectory};

/// How often to look whether the records say what was changed.
const INTERVAL: Duration = Duration::from_millis(2);

/// The record of an image, as it was found.
#[derive(Debug)]
pub struct FoundRecord {
    /// What it says.
    pub kept: Kept,
    /// Its file, if there is one.
    pub file: Option<RecordFile>,
}

impl FoundRecord {
    /// Finds and reads the record of an image.
    ///
    /// # Errors
    /// If it is not known whether there is one, or it cannot be opened.
    pub fn of(access: &mut RecordAccess, state: &StateDirectory) -> Result<Self, RecordError> {
        let Some((record, content)) = access.find(state)? else {
            let (kept, file) = (Kept::Absent, None);
            return Ok(Self { kept, file });
        };
        let kept = match format::read_by(|offset, length| content.part(offset, length))? {
            Ok(read) => Kept::Read(Box::new(read)),
            // Zeroes that cannot be read are not zeroes.
            Err(Unusable::Blank) if content.unreadable_bytes > 0 => {
                let bytes = content.unreadable_bytes;
                Kept::Unusable(Unusable::Unread(format!("{bytes} bytes are unreadable")))
            }
            Err(unusable) => Kept::Unusable(unusable),
        };
        let file = Some(record);
        Ok(Self { kept, file })
    }

    /// The number of the last slot in it; 0 if there is none.
    pub fn sequence(&self) -> u64 {
        match &self.kept {
            Kept::Read(read) => read.record.sequence,
            Kept::Absent | Kept::Unusable(_) => 0,
        }
    }
}

/// The bytes of a record that says nothing yet. It has room for the maps of any capacity.
pub fn blank_record() -> Vec<u8> {
    vec![0; usize::try_from(Layout::FILE_BYTES_MAX).expect("a record is small")]
}

/// An image as a record describes it.
pub fn fingerprint(stamp: ImageStamp) -> Fingerprint {
    Fingerprint {
        bytes: stamp.bytes,
        modified_ns: stamp.modified_ns,
    }
}

impl Admin {
    /// The same, with records, which are here if they cannot be beside their images.
    #[must_use]
    pub fn with_records(self, directory: StateDirectory) -> Self {
        let records = Some(directory);
        Self { records, ..self }
    }

    /// Makes the record of an image that is to be added. It says nothing yet. `None`: the disk has
    /// no records.
    ///
    /// # Errors
    /// If the image is one of another disk, or a replica of this one, or a later version knows what
    /// it is; or there is no room.
    pub(super) fn make_record(
        &self,
        file: &ReplicaFile,
        access: &mut RecordAccess,
    ) -> Result<Option<Holder>, AdminError> {
        let Some(directory) = &self.records else {
            return Ok(None);
        };
        let found = FoundRecord::of(access, directory)?;
        let made = match (&found.kept, &found.file) {
            (Kept::Read(read), Some(record)) => {
                self.check_no_replica(file, &read.record, &record.path)?;
                // It was removed, and holds nothing that is needed.
                access.make_instead(&blank_record())
            }
            (Kept::Absent, _) | (_, None) => access.make(directory, &blank_record()),
            (Kept::Unusable(unusable @ Unusable::Incompatible(_)), Some(_)) => {
                return Err(AdminError::LaterVersion {
                    path: file.path.clone(),
                    unusable: unusable.clone(),
                });
            }
            (Kept::Unusable(_), Some(_)) => access.make_instead(&blank_record()),
        };
        file.keep_record(made?);
        Ok(Some(Holder {
            member: Uuid::new_v4(),
            sequence: 0,
        }))
    }

    /// Has the records keep the last jobs that have ended.
    pub fn keep_jobs(&self, jobs: Vec<PastJob>) {
        self.shared.keep_jobs(jobs);
        self.workers.tick_first();
    }

    /// Waits until the records say what was changed last: there is one change of the members at a
    /// time (S10). To be called before a change, and after it.
    ///
    /// # Errors
    /// If they do not say it in time.
    pub(super) fn settle_records(&self) -> Result<(), AdminError> {
        let until = Instant::now() + self.workers.drain_limit();
        while !self.shared.are_records_durable() {
            if Instant::now() > until {
                return Err(AdminError::Unrecorded);
            }
            self.workers.tick_all();
            pulse::waiting(|| std::thread::sleep(INTERVAL));
        }
        Ok(())
    }

    /// The same after a change, which cannot be undone.
    pub(super) fn is_recorded(&self) {
        if let Err(error) = self.settle_records() {
            warn!(error:%; "a change is not in the records yet");
        }
    }

    fn check_no_replica(
        &self,
        file: &ReplicaFile,
        record: &Record,
        record_path: &Path,
    ) -> Result<(), AdminError> {
        let known = self.shared.records(|keeper| {
            let own = keeper.record();
            let member = own.member(record.replica);
            (own.disk, member.map(|member| member.node_name.clone()))
        });
        let path: PathBuf = file.path.clone();
        match known {
            Some((disk, _)) if disk != record.disk => Err(AdminError::OfAnotherDisk {
                path,
                disk: record.disk,
                record: record_path.to_owned(),
            }),
            Some((_, Some(node_name))) => Err(AdminError::IsMember { path, node_name }),
            _ => Ok(()),
        }
    }
}
