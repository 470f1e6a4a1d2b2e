//! An image of the command line, with its record.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use crate::admin::records::{FoundRecord, fingerprint};
use crate::daemon::Error;
use crate::daemon::error::system;
use crate::record::start::{Candidate, Found, Kept};
use crate::replica::file::{Opened, ReplicaFile, ReplicaSource};
use crate::replica::record_file::{RecordAccess, RecordError, StateDirectory};
use crate::replica::table::MissingReplica;

/// An image of the command line.
pub(super) struct Image {
    source: ReplicaSource,
    open: Result<Open, LeftOut>,
    /// The member whose image it is, by its record, if it is shorter than the disk.
    shorter_image_of: Option<Uuid>,
}

/// Why an image is left out, in one line.
struct LeftOut {
    why: String,
    /// The same with what to do about it in a disk that has no records.
    advice: String,
}

struct Open {
    file: ReplicaFile,
    access: RecordAccess,
    record: FoundRecord,
    /// Of the last slot in the record; 0 if there is none.
    sequence: u64,
}

impl Image {
    pub(super) fn new(source: ReplicaSource, opened: Opened) -> Self {
        let open = opened.map(|(file, access)| Open {
            file,
            access,
            record: FoundRecord {
                kept: Kept::Absent,
                file: None,
            },
            sequence: 0,
        });
        Self {
            source,
            open: open.map_err(|error| LeftOut {
                why: error.of_missing(),
                advice: error.to_string(),
            }),
            shorter_image_of: None,
        }
    }

    pub(super) fn node_name(&self) -> String {
        self.source.node_name.clone()
    }

    /// Its file, if it is not left out.
    pub(super) fn file(&self) -> Option<&ReplicaFile> {
        self.open.as_ref().ok().map(|open| &open.file)
    }

    /// The same with the way to its record.
    pub(super) fn parts(&mut self) -> Option<(&ReplicaFile, &mut RecordAccess)> {
        let open = self.open.as_mut().ok()?;
        Some((&open.file, &mut open.access))
    }

    /// Its path, and that of its record, if it was found.
    pub(super) fn record_path(&self) -> Option<(PathBuf, PathBuf)> {
        let record = self.open.as_ref().ok()?.record.file.as_ref()?;
        Some((self.source.path.clone(), record.path.clone()))
    }

    /// Of the last slot in its record.
    pub(super) fn sequence(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.sequence)
    }

    /// Why it is left out, if it is.
    pub(super) fn why_left_out(&self) -> Option<String> {
        let left_out = self.open.as_ref().err()?;
        Some(left_out.why.clone())
    }

    /// The disk is served without it. It is closed.
    pub(super) fn leave_out(&mut self, why: &str) {
        let (why, advice) = (why.to_owned(), why.to_owned());
        self.open = Err(LeftOut { why, advice });
    }

    /// The same with the image of `member`, which is shorter than the disk.
    pub(super) fn leave_out_short(&mut self, member: Uuid, why: &str) {
        self.leave_out(why);
        self.shorter_image_of = Some(member);
    }

    /// Whether it was left out since it is the image of `member`, and shorter than the disk.
    pub(super) fn is_shorter_image_of(&self, member: Uuid) -> bool {
        self.shorter_image_of == Some(member)
    }

    /// Finds and reads its record.
    pub(super) fn find(&mut self, state: &StateDirectory) -> Result<(), RecordError> {
        let Ok(open) = &mut self.open else {
            return Ok(());
        };
        open.record.file = None;
        open.record = FoundRecord::of(&mut open.access, state)?;
        open.sequence = open.record.sequence();
        Ok(())
    }

    /// Makes its record. One that was made by a start that was cut short is kept beside it.
    pub(super) fn make(
        &mut self,
        state: &StateDirectory,
        content: &[u8],
    ) -> Result<(), RecordError> {
        let Ok(open) = &mut self.open else {
            return Ok(());
        };
        open.record.file = Some(match open.record.file.take() {
            None => open.access.make(state, content)?,
            Some(_) => open.access.make_instead(content)?,
        });
        open.sequence = 1;
        Ok(())
    }

    /// Makes a record in the place of one that cannot be used.
    pub(super) fn make_instead(&mut self, content: &[u8]) -> Result<(), RecordError> {
        let Ok(open) = &mut self.open else {
            return Ok(());
        };
        open.record.file = Some(open.access.make_instead(content)?);
        open.sequence = 1;
        Ok(())
    }

    /// Writes to its record.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RecordError> {
        match &mut self.open {
            Ok(open) => open.access.write(offset, bytes),
            Err(_) => Ok(()),
        }
    }

    /// What the decision about a start needs to know of it.
    pub(super) fn candidate(&self) -> Candidate {
        let image = self.open.as_ref().map(|open| Found {
            fingerprint: open.file.stamp.map(fingerprint),
            kept: open.record.kept.clone(),
        });
        Candidate {
            node_name: self.source.node_name.clone(),
            path: self.source.path.clone(),
            image: image.map_err(|left_out| left_out.advice.clone()),
        }
    }

    /// What it is in the table of the disk.
    pub(super) fn into_member(self) -> Result<ReplicaFile, MissingReplica> {
        let source = self.source;
        let open = self
            .open
            .map_err(|left_out| MissingReplica::new(&source, &left_out.why))?;
        if let Some(record) = open.record.file {
            open.file.keep_record(record);
        }
        Ok(open.file)
    }
}

/// Does `step` with all of them at the same time, each on a thread of its own.
pub(super) fn each<T: Send, R: Send>(
    items: impl Iterator<Item = T>,
    step: impl Fn(T) -> R + Sync,
) -> Result<Vec<R>, Error> {
    std::thread::scope(|scope| {
        let step = &step;
        let threads = items.map(|item| {
            let builder = std::thread::Builder::new().name("records".into());
            builder.spawn_scoped(scope, move || step(item))
        });
        let threads: Vec<_> = threads.collect();
        let ended = threads.into_iter().map(|thread| {
            let ended = thread?.join();
            ended.map_err(|_| io::Error::other("it has panicked"))
        });
        // All of them have ended when this returns.
        ended.collect::<Vec<io::Result<R>>>()
    })
    .into_iter()
    .collect::<io::Result<Vec<R>>>()
    .map_err(system("cannot start a thread"))
}
