//! The daemon's way to the record of an image, through the process that has opened the image.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::keeper::{Keeper, RecordDone, RecordOrder};
use super::{RecordContent, RecordError, RecordFile, StateDirectory, memory};
use crate::limits::OPEN_LIMIT;
use crate::replica::file::{Look, Looked, NoAnswer, OpenError, Opener, ReplicaFile, look};

/// The way to the record of an open image. Each step has [`OPEN_LIMIT`]; after one that has failed
/// for this, all others fail at once.
///
/// With several images, each has a thread take its steps: what one of them waits for delays no
/// other one.
#[derive(Debug)]
pub struct RecordAccess {
    image: PathBuf,
    way: Way,
    limit: Duration,
}

#[derive(Debug)]
enum Way {
    /// The calling thread makes the system calls.
    Here(Keeper),
    /// The process that has opened the image makes them.
    Apart(Opener),
    /// An answer did not come in time. One that comes now would be that of an earlier step.
    GivenUp,
}

impl RecordAccess {
    /// For the image at `image`: by `opener`, or by `keeper` if there is none.
    pub(in crate::replica) fn new(image: PathBuf, opener: Option<Opener>, keeper: Keeper) -> Self {
        Self {
            image,
            way: opener.map_or(Way::Here(keeper), Way::Apart),
            limit: OPEN_LIMIT,
        }
    }

    /// With another limit than [`OPEN_LIMIT`].
    #[cfg(test)]
    pub(super) fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Looks for the record and reads it. `None`: the image has none.
    ///
    /// # Errors
    /// If it is not known whether there is one, or what is there cannot be opened.
    pub fn find(
        &mut self,
        state: &StateDirectory,
    ) -> Result<Option<(RecordFile, RecordContent)>, RecordError> {
        let (done, file) = self.carry_out(RecordOrder::Find(state.clone()), None)?;
        if matches!(done, RecordDone::Absent) {
            return Ok(None);
        }
        let record = self.opened(done, file)?;
        match self.carry_out(RecordOrder::Read, None)? {
            (RecordDone::Content { unreadable_bytes }, Some(content)) => {
                if unreadable_bytes > 0 {
                    log::warn!(
                        file:% = record.path.display(), bytes = unreadable_bytes;
                        "a part of a record cannot be read"
                    );
                }
                let content = RecordContent {
                    image: self.image.clone(),
                    file: content,
                    unreadable_bytes,
                };
                Ok(Some((record, content)))
            }
            _ => Err(self.invalid()),
        }
    }

    /// Makes the record of an image that has none, with all its bytes, and returns when it is
    /// durable. The image must be locked, and not open for reading only.
    ///
    /// # Errors
    /// If there is no room for it, or there is one.
    pub fn make(
        &mut self,
        state: &StateDirectory,
        content: &[u8],
    ) -> Result<RecordFile, RecordError> {
        let (done, file) = self.carry_out(RecordOrder::Make(state.clone()), Some(content))?;
        self.opened(done, file)
    }

    /// Makes a record in the place of that which [`Self::find`] has found, which is not usable. The
    /// old one is kept beside it, as NAME.unusable.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn make_instead(&mut self, content: &[u8]) -> Result<RecordFile, RecordError> {
        let (done, file) = self.carry_out(RecordOrder::MakeInstead, Some(content))?;
        self.opened(done, file)
    }

    /// Writes to the record that was found or made, and returns when that is durable.
    ///
    /// # Errors
    /// If the write fails, or would make the file longer.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RecordError> {
        match self.carry_out(RecordOrder::Write(offset), Some(bytes))? {
            (RecordDone::Written, _) => Ok(()),
            _ => Err(self.invalid()),
        }
    }

    /// Looks at the image itself, which is open as `file`.
    ///
    /// # Errors
    /// If its file system does not answer.
    pub(in crate::replica) fn look(
        &mut self,
        file: &ReplicaFile,
        at: Look,
    ) -> Result<Looked, OpenError> {
        let looked = match &mut self.way {
            Way::Here(_) => Ok(look(&file.file, at)),
            Way::Apart(opener) => opener.look(at, Instant::now() + self.limit),
            Way::GivenUp => Err(NoAnswer::Silent),
        };
        looked.map_err(|no_answer| {
            self.way = Way::GivenUp;
            OpenError::of_no_answer(no_answer, self.image.clone())
        })
    }

    /// Gives the record that [`Self::find`] has found another name, NAME.forgotten, under which it
    /// is not found again, and returns when that is durable. Returns its new path.
    ///
    /// # Errors
    /// If that fails.
    pub fn forget(&mut self) -> Result<PathBuf, RecordError> {
        match self.carry_out(RecordOrder::Forget, None)? {
            (RecordDone::Forgotten { path }, _) => Ok(path),
            _ => Err(self.invalid()),
        }
    }

    fn carry_out(
        &mut self,
        order: RecordOrder,
        written: Option<&[u8]>,
    ) -> Result<(RecordDone, Option<File>), RecordError> {
        let written = written.map(memory::file_of).transpose();
        let written = written.map_err(|error| self.failed(error))?;
        let answered = match &mut self.way {
            Way::Here(keeper) => Ok(keeper.carry_out(order, written.as_ref())),
            Way::Apart(opener) => {
                opener.record(order, written.as_ref(), Instant::now() + self.limit)
            }
            Way::GivenUp => Err(NoAnswer::Silent),
        };
        match answered {
            Ok((Ok(done), file)) => Ok((done, file)),
            Ok((Err(fault), _)) => Err(fault.about(self.image.clone())),
            Err(no_answer) => {
                self.way = Way::GivenUp;
                Err(RecordError::of_no_answer(no_answer, self.image.clone()))
            }
        }
    }

    fn opened(&self, done: RecordDone, file: Option<File>) -> Result<RecordFile, RecordError> {
        match (done, file) {
            (RecordDone::Open { path, size_bytes }, Some(file)) => Ok(RecordFile {
                path,
                file,
                size_bytes,
            }),
            _ => Err(self.invalid()),
        }
    }

    fn invalid(&self) -> RecordError {
        self.failed(io::Error::other("its answer is not valid"))
    }

    fn failed(&self, source: io::Error) -> RecordError {
        let image = self.image.clone();
        RecordError::Opener { image, source }
    }
}
