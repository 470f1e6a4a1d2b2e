//! The places in which the record of an image can be: a directory and a name there.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::StateDirectory;
use super::device_name::{Devices, escaped};
use super::error::{RecordFault, Step};
use crate::limits::{RECORD_BYTES_MAX, SYMBOLIC_LINKS_MAX};
use crate::replica::file::{ImageIdentity, Kind};

/// What a record has after the name of its image.
const SUFFIX: &str = ".quorum";
/// The longest name of a file, on most file systems.
const NAME_BYTES_MAX: usize = 255;
/// The longest suffix of a name: that of a record that is being made (`make.rs`).
pub(super) const SUFFIX_BYTES_MAX: usize = 24;

/// A directory and the name of a record in it.
#[derive(Debug)]
pub(super) struct Place {
    /// The directory, opened as a place only (O_PATH).
    pub(super) directory: File,
    directory_path: PathBuf,
    /// The name of the record.
    pub(super) name: OsString,
    /// Who is to own a record there, if it is not the user of this process.
    pub(super) owner: Option<(u32, u32)>,
}

impl Place {
    /// The path of the record.
    pub(super) fn path(&self) -> PathBuf {
        self.path_of(&self.name)
    }

    /// The path of a file in the directory.
    pub(super) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.directory_path.join(name)
    }

    /// Opens the record for reading and, unless `read_only`, for durable writing, if there is one.
    pub(super) fn open(&self, read_only: bool) -> Result<Option<File>, RecordFault> {
        let failed = |errno: Errno| RecordFault::of(Step::Open, self.path(), errno);
        // As a place only, because opening alone can block (a FIFO) or have effects (a tape).
        let found = match look(&self.directory, &self.name) {
            Ok(found) => found,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        };
        let metadata = metadata(&found).map_err(failed)?;
        if !metadata.is_file() {
            let kind = Kind::of(metadata.file_type());
            return Err(RecordFault::NotAFile(self.path(), kind));
        }
        if metadata.len() > RECORD_BYTES_MAX {
            return Err(RecordFault::TooLong(self.path(), metadata.len()));
        }
        let access = match read_only {
            true => OFlags::RDONLY,
            false => OFlags::RDWR | OFlags::DSYNC,
        };
        // That very file, whatever has its name by now.
        let same = format!("/proc/self/fd/{}", found.as_raw_fd());
        let open = || rustix::fs::open(&same, access | OFlags::CLOEXEC, Mode::empty());
        let opened = rustix::io::retry_on_intr(open);
        opened.map(|file| Some(File::from(file))).map_err(failed)
    }
}

/// The places of the record of an image, in the order in which they are to be tried when it is
/// made.
///
/// `making`: it is to be made, and so is the usual state directory if that is missing.
pub(super) fn places(
    image: &Path,
    identity: ImageIdentity,
    state: &StateDirectory,
    devices: &Devices,
    making: bool,
) -> Result<Vec<Place>, RecordFault> {
    match identity {
        ImageIdentity::BlockDevice { device } => {
            let Some(directory) = state_directory(state, making)? else {
                return Ok(Vec::new());
            };
            let names = devices.names(device, image)?;
            let places = names
                .iter()
                .map(|name| in_state(&directory, state.path(), name));
            places.collect()
        }
        ImageIdentity::File { .. } => {
            let beside = beside(image, identity)?;
            let mut places = Vec::new();
            if let StateDirectory::Given(path) = state
                && let Some(directory) = state_directory(state, making)?
            {
                let real = beside.as_ref().and_then(real_path);
                let real = real.or_else(|| std::path::absolute(image).ok());
                let name = escaped(real.as_deref().unwrap_or(image));
                places.push(in_state(&directory, path, &name)?);
            }
            places.splice(0..0, beside.map(|(place, _)| place));
            Ok(places)
        }
    }
}

/// The place beside a regular file, and the name of the file there. `None` if no directory is
/// known that it is in: it is reached through a descriptor only.
fn beside(image: &Path, identity: ImageIdentity) -> Result<Option<(Place, OsString)>, RecordFault> {
    let mut path = image.to_owned();
    for _ in 0..SYMBOLIC_LINKS_MAX {
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return Ok(None);
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let failed = |errno| RecordFault::of(Step::Look, parent.clone(), errno);
        let directory = match open_directory(&parent) {
            Ok(directory) => directory,
            // The text of a link in /proc/PID/fd leads nowhere.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        };
        match readlinkat(&directory, &name, Vec::new()) {
            Ok(target) => {
                path = parent.join(OsStr::from_bytes(target.to_bytes()));
            }
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::INVAL) => {
                let found = look(&directory, &name).and_then(|found| metadata(&found));
                let metadata = found.map_err(failed)?;
                if ImageIdentity::of(&metadata) != identity {
                    return Ok(None);
                }
                let place = Place {
                    directory,
                    directory_path: parent,
                    name: named(&name),
                    owner: Some((metadata.uid(), metadata.gid())),
                };
                return Ok(Some((place, name)));
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(None)
}

/// The path of an image without links, from the root.
fn real_path((place, name): &(Place, OsString)) -> Option<PathBuf> {
    let link = format!("/proc/self/fd/{}", place.directory.as_raw_fd());
    let directory = std::fs::read_link(link).ok()?;
    Some(directory.join(name))
}

/// The state directory; `None` if it does not exist and need not.
fn state_directory(state: &StateDirectory, making: bool) -> Result<Option<File>, RecordFault> {
    let path = state.path();
    let failed = |errno: Errno| {
        let is_given = matches!(state, StateDirectory::Given(_));
        RecordFault::StateDirectory(path.to_owned(), is_given, errno.raw_os_error())
    };
    match (open_directory(path), state) {
        (Err(Errno::NOENT), StateDirectory::Usual(_)) if making => {
            match rustix::fs::mkdir(path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => open_directory(path).map(Some).map_err(failed),
                Err(errno) => Err(failed(errno)),
            }
        }
        (Err(Errno::NOENT), StateDirectory::Usual(_)) => Ok(None),
        (opened, _) => opened.map(Some).map_err(failed),
    }
}

fn in_state(directory: &File, path: &Path, name: &OsStr) -> Result<Place, RecordFault> {
    let directory = directory.try_clone().map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        RecordFault::Failed(Step::Look, path.to_owned(), errno)
    })?;
    Ok(Place {
        directory,
        directory_path: path.to_owned(),
        name: named(name),
        owner: None,
    })
}

/// The name of the record of an image with this name. Where that would be too long, its end is
/// replaced by its hash.
fn named(image: &OsStr) -> OsString {
    const HASH_DIGITS: usize = 16;
    let bytes = image.as_bytes();
    let mut name = bytes.to_vec();
    if bytes.len() > NAME_BYTES_MAX - SUFFIX.len() - SUFFIX_BYTES_MAX {
        let mut end = NAME_BYTES_MAX - SUFFIX.len() - SUFFIX_BYTES_MAX - HASH_DIGITS - 1;
        // Not within a character of UTF-8.
        while end > 0 && bytes[end] & 0xc0 == 0x80 {
            end -= 1;
        }
        name.truncate(end);
        let hash = Sha256::digest(bytes);
        let digits: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        name.push(b'-');
        name.extend(&digits.as_bytes()[..HASH_DIGITS]);
    }
    name.extend(SUFFIX.as_bytes());
    OsString::from_vec(name)
}

fn open_directory(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = || openat(CWD, path, flags, Mode::empty());
    rustix::io::retry_on_intr(open).map(File::from)
}

/// What is there under a name, without following a link.
fn look(directory: &File, name: &OsStr) -> Result<File, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(directory, name, flags, Mode::empty());
    rustix::io::retry_on_intr(open).map(File::from)
}

fn metadata(file: &File) -> Result<Metadata, Errno> {
    let metadata = file.metadata();
    metadata.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_too_long_ends_with_its_hash() {
        assert_eq!(named(OsStr::new("a.raw")), "a.raw.quorum");
        let long = ["x", "y"].map(|end| named(OsStr::new(&("ä".repeat(125) + end))));
        assert_ne!(long[0], long[1]);
        for name in long {
            assert!(name.len() <= NAME_BYTES_MAX - SUFFIX_BYTES_MAX);
            assert!(name.to_str().unwrap().ends_with(SUFFIX));
        }
    }
}
