//! The system calls on the record of one image. Each of them may wait for the file system for
//! ever, so the daemon has the process that has opened the image make them (`file/opener.rs`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::device_name::Devices;
use super::error::{RecordFault, Step};
use super::place::{Place, places};
use super::{StateDirectory, check_range, memory, path_in_hex};
use crate::limits::RECORD_BYTES_MAX;
use crate::replica::file::ImageIdentity;

/// What is read by itself after a read has failed: a part that cannot be read must not cost the
/// others their content.
const BLOCK_BYTES: usize = 4096;

/// What is read at a time before.
const CHUNK_BYTES: usize = 64 << 10;

/// What is to be done about the record of an image. What is to be written comes in a file
/// (`memory.rs`) with the order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum RecordOrder {
    /// Look for it and open it.
    Find(StateDirectory),
    /// Read what was found.
    Read,
    /// Make one where none is.
    Make(StateDirectory),
    /// Make one in the place of that which was found.
    MakeInstead,
    /// Write at this offset.
    Write(u64),
    /// Give that which was found another name.
    Forget,
}

/// What was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::replica) enum RecordDone {
    /// There is none.
    Absent,
    /// The record comes with the answer.
    Open {
        #[serde(with = "path_in_hex")]
        path: PathBuf,
        size_bytes: u64,
    },
    /// Its content comes with the answer, in a file.
    Content { unreadable_bytes: u64 },
    /// What was to be written is durable.
    Written,
    /// It has this path now.
    Forgotten {
        #[serde(with = "path_in_hex")]
        path: PathBuf,
    },
}

/// The answer to an order. Some carry a file.
pub(in crate::replica) type RecordAnswer = Result<RecordDone, RecordFault>;

/// The record of one image.
#[derive(Debug)]
pub(in crate::replica) struct Keeper {
    image: PathBuf,
    identity: ImageIdentity,
    read_only: bool,
    devices: Devices,
    /// The record, as it was found or made.
    record: Option<(Place, File)>,
}

impl Keeper {
    /// For the image that `path` leads to, which is open. `read_only`: its record is not written.
    pub(in crate::replica) fn new(path: &Path, identity: ImageIdentity, read_only: bool) -> Self {
        Self {
            image: path.to_owned(),
            identity,
            read_only,
            devices: Devices::of_host(),
            record: None,
        }
    }

    /// With names of devices from elsewhere.
    #[cfg(test)]
    pub(super) fn with_devices(self, devices: Devices) -> Self {
        Self { devices, ..self }
    }

    /// Does what is to be done. `written` is the file that comes with the order, and the result has
    /// that which goes with the answer.
    pub(in crate::replica) fn carry_out(
        &mut self,
        order: RecordOrder,
        written: Option<&File>,
    ) -> (RecordAnswer, Option<File>) {
        let done = match order {
            RecordOrder::Find(state) => self.find(&state),
            RecordOrder::Read => self.read(),
            RecordOrder::Make(state) => self.make(&state, written),
            RecordOrder::MakeInstead => self.make_instead(written),
            RecordOrder::Write(offset) => self.write(offset, written),
            RecordOrder::Forget => self.forget(),
        };
        match done {
            Ok((done, file)) => (Ok(done), file),
            Err(fault) => (Err(fault), None),
        }
    }

    fn find(&mut self, state: &StateDirectory) -> Result<(RecordDone, Option<File>), RecordFault> {
        self.record = None;
        let places = self.places(state, false)?;
        let is_file = matches!(self.identity, ImageIdentity::File { .. });
        if places.is_empty() && is_file && !self.read_only {
            // It is not known that there is none.
            return Err(RecordFault::NoDirectory);
        }
        for place in places {
            let Some(file) = place.open(self.read_only)? else {
                continue;
            };
            if let Some((first, _)) = &self.record {
                return Err(RecordFault::Two(first.path(), place.path()));
            }
            self.record = Some((place, file));
        }
        match &self.record {
            None => Ok((RecordDone::Absent, None)),
            Some((place, file)) => opened(place, file),
        }
    }

    fn read(&self) -> Result<(RecordDone, Option<File>), RecordFault> {
        let (place, file) = self.record()?;
        let failed = |error: io::Error| RecordFault::of_io(Step::Read, place.path(), &error);
        let (content, unreadable_bytes) = read_all(file).map_err(failed)?;
        Ok((RecordDone::Content { unreadable_bytes }, Some(content)))
    }

    fn make(
        &mut self,
        state: &StateDirectory,
        content: Option<&File>,
    ) -> Result<(RecordDone, Option<File>), RecordFault> {
        let content = self.content(Step::Make, content)?;
        if self.read_only {
            return Err(RecordFault::Failed(
                Step::Make,
                self.image.clone(),
                libc::EROFS,
            ));
        }
        let mut refusal = None;
        for place in self.places(state, true)? {
            match place.make(&content) {
                Ok(file) => {
                    let (place, file) = self.record.insert((place, file));
                    return opened(place, file);
                }
                Err(fault @ RecordFault::Exists(_)) => return Err(fault),
                Err(fault) => {
                    refusal.get_or_insert(fault);
                }
            }
        }
        Err(refusal.unwrap_or(RecordFault::NoDirectory))
    }

    fn make_instead(
        &mut self,
        content: Option<&File>,
    ) -> Result<(RecordDone, Option<File>), RecordFault> {
        let content = self.content(Step::Replace, content)?;
        let (place, file) = self.record.as_mut().ok_or(RecordFault::NoDirectory)?;
        *file = place.make_instead(&content)?;
        opened(place, file)
    }

    fn write(
        &self,
        offset: u64,
        written: Option<&File>,
    ) -> Result<(RecordDone, Option<File>), RecordFault> {
        let bytes = self.content(Step::Write, written)?;
        let (place, file) = self.record()?;
        let write = || {
            check_range(offset, bytes.len(), file.metadata()?.len())?;
            file.write_all_at(&bytes, offset)
        };
        write().map_err(|error| RecordFault::of_io(Step::Write, place.path(), &error))?;
        Ok((RecordDone::Written, None))
    }

    fn forget(&mut self) -> Result<(RecordDone, Option<File>), RecordFault> {
        let (place, file) = self.record()?;
        let path = place.forget(file)?;
        self.record = None;
        Ok((RecordDone::Forgotten { path }, None))
    }

    fn places(&self, state: &StateDirectory, making: bool) -> Result<Vec<Place>, RecordFault> {
        places(&self.image, self.identity, state, &self.devices, making)
    }

    fn record(&self) -> Result<&(Place, File), RecordFault> {
        self.record.as_ref().ok_or(RecordFault::NoDirectory)
    }

    /// What comes with an order to write.
    fn content(&self, step: Step, file: Option<&File>) -> Result<Vec<u8>, RecordFault> {
        let missing = || io::Error::from_raw_os_error(libc::EINVAL);
        let bytes = file.ok_or_else(missing).and_then(memory::bytes_of);
        bytes.map_err(|error| RecordFault::of_io(step, self.image.clone(), &error))
    }
}

fn opened(place: &Place, file: &File) -> Result<(RecordDone, Option<File>), RecordFault> {
    let look = || Ok((file.metadata()?.len(), file.try_clone()?));
    let looked: io::Result<_> = look();
    let (size_bytes, copy) =
        looked.map_err(|error| RecordFault::of_io(Step::Open, place.path(), &error))?;
    let done = RecordDone::Open {
        path: place.path(),
        size_bytes,
    };
    Ok((done, Some(copy)))
}

/// All bytes of a file, in memory, and how many of them cannot be read and are zeroes there.
fn read_all(file: &File) -> io::Result<(File, u64)> {
    let length = file.metadata()?.len();
    if length > RECORD_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let content = memory::zeroes(length)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let (mut at, mut unreadable) = (0, 0);
    let mut by_block = false;
    while at < length {
        let step = if by_block { BLOCK_BYTES } else { CHUNK_BYTES } as u64;
        let end = ((at / step + 1) * step).min(length);
        let part = &mut buffer[..usize::try_from(end - at).map_err(io::Error::other)?];
        match file.read_at(part, at) {
            // It has become shorter.
            Ok(0) => {
                content.set_len(at)?;
                break;
            }
            Ok(read) => {
                memory::put(&content, &part[..read], at)?;
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if !by_block => by_block = true,
            Err(_) => {
                unreadable += end - at;
                at = end;
            }
        }
    }
    Ok((content, unreadable))
}
