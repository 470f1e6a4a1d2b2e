//! The directories from which images may be added while the disk is served (I11).
//!
//! Invariant: of a path outside of them, nothing is known afterwards, not even whether there is a
//! file. So it is refused as it is written, without a look; and a path inside is opened in a way in
//! which the kernel does not leave the directory, whatever links and `..` are on the way.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::OpenError;

/// Where images may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDirectories {
    /// Images that may be anywhere, as absolute paths: the operator named them at the start.
    pub images: Vec<PathBuf>,
    /// The directories, as absolute paths, sorted. With `/`, images may be anywhere.
    pub directories: Vec<PathBuf>,
}

impl ImageDirectories {
    /// Images may be anywhere.
    pub fn anywhere() -> Self {
        Self {
            images: Vec::new(),
            directories: vec!["/".into()],
        }
    }

    /// Whether images may be anywhere: everything is in `/`.
    pub fn is_anywhere(&self) -> bool {
        let mut directories = self.directories.iter();
        directories.any(|directory| directory.parent().is_none())
    }

    /// The directory that the image at `path` must be in; `None` if it may be anywhere.
    ///
    /// # Errors
    /// If it is in no directory where images may be.
    pub fn of(&self, path: &Path) -> Result<Option<&Path>, OpenError> {
        let outside = || OpenError::Outside {
            path: path.to_owned(),
        };
        let absolute = std::path::absolute(path).map_err(|_| outside())?;
        if self.images.contains(&absolute) || self.is_anywhere() {
            return Ok(None);
        }
        let mut directories = self.directories.iter();
        // They are sorted: the first is the outermost.
        let directory = directories.find(|directory| absolute.starts_with(directory));
        directory.map(|found| Some(&**found)).ok_or_else(outside)
    }
}

/// Opens `path`, which is below `directory` as it is written, without leaving the directory.
/// [`is_outside`] tells an error about that from others.
pub(super) fn open_beneath(directory: &Path, path: &Path, flags: OFlags) -> io::Result<File> {
    let absolute = std::path::absolute(path)?;
    let rest = match absolute.strip_prefix(directory) {
        Ok(rest) if rest.as_os_str().is_empty() => Path::new("."),
        Ok(rest) => rest,
        Err(_) => return Err(Errno::XDEV.into()),
    };
    let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, directory, place, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let open = || openat2(&directory, rest, flags, Mode::empty(), resolve);
    loop {
        match open() {
            // Something was renamed meanwhile, so the kernel is not sure.
            Err(Errno::INTR | Errno::AGAIN) => {}
            opened => return Ok(File::from(opened?)),
        }
    }
}

/// Whether an error of [`open_beneath`] says that the path leads out of the directory.
pub(super) fn is_outside(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EXDEV)
}
