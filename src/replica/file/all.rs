//! Opens all images of a disk: each by itself, and all of them if they fit each other.
//!
//! An image that cannot be opened may be left out, so that the others can be served without it.
//! What concerns several images is an error of all: it is not known which of them is meant.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::candidate::Candidate;
use super::contents::Contents;
use super::{
    OpenError, OpenOptions, Opening, ReplicaFile, ReplicaSource, check_against, check_size,
    disk_size,
};
use crate::replica::record_file::RecordAccess;

/// What to do about images that hold nothing but zeroes, where others hold data (O4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyImages {
    /// They are refused.
    Refused,
    /// The operator wants them to vote.
    Accepted,
}

/// Opens and locks all replicas of a disk, in the order given.
pub fn open_all(
    sources: &[ReplicaSource],
    options: OpenOptions,
    opening: Opening,
    empty: EmptyImages,
) -> Result<Vec<ReplicaFile>, OpenError> {
    let unopenable = Unopenable::Refused;
    let candidates = open_candidates(sources, options, opening, empty, unopenable)?.into_iter();
    candidates
        .map(|candidate| candidate.map(Candidate::into_replica))
        .collect()
}

/// What to do about an image that cannot be opened by itself, whatever the others are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unopenable {
    /// None is opened.
    Refused,
    /// The others are opened without it, if there are any.
    LeftOut,
}

/// An open replica with the way to its record, or why it is left out.
pub type Opened = Result<(ReplicaFile, RecordAccess), OpenError>;

/// As [`open_all`], each replica with the way to its record. With [`Unopenable::LeftOut`] there is
/// an error for each image that cannot be opened, in its place.
///
/// # Errors
/// If the images do not fit each other, or none can be opened.
pub fn open_all_with_records(
    sources: &[ReplicaSource],
    options: OpenOptions,
    opening: Opening,
    empty: EmptyImages,
    unopenable: Unopenable,
) -> Result<Vec<Opened>, OpenError> {
    let candidates = open_candidates(sources, options, opening, empty, unopenable)?.into_iter();
    Ok(candidates
        .map(|candidate| candidate.map(Candidate::into_parts))
        .collect())
}

/// Opens and locks each image that can be, with the way to its record; an error for each other one.
/// Neither sizes nor contents are compared: the records may say what they are to be.
///
/// # Errors
/// If two of them are one image, or none can be opened.
pub fn open_each(
    sources: &[ReplicaSource],
    options: OpenOptions,
    opening: Opening,
) -> Result<Vec<Opened>, OpenError> {
    let unopenable = Unopenable::LeftOut;
    let mut images = examined(sources, options, opening, unopenable)?;
    lock_all(&mut images, unopenable)?;
    let opened = any_left(images)?.into_iter();
    Ok(opened
        .map(|candidate| candidate.map(Candidate::into_parts))
        .collect())
}

/// The size of the disk that these images hold, all of it in each.
///
/// # Errors
/// If a disk cannot have it, or an image is shorter than the disk.
pub fn checked_size(images: &[&ReplicaFile], options: OpenOptions) -> Result<u64, OpenError> {
    let disk_bytes = disk_size(images)?;
    for image in images {
        check_size(image, disk_bytes, options)?;
    }
    warn_of_larger(images, disk_bytes);
    Ok(disk_bytes)
}

/// Logs that some images are larger than the disk.
pub fn warn_of_larger(images: &[&ReplicaFile], disk_bytes: u64) {
    for image in images.iter().filter(|image| image.size_bytes > disk_bytes) {
        log::warn!(
            replica:% = image.node_name(), size = image.size_bytes, "disk-size" = disk_bytes;
            "an image is larger than the disk: its last part is not used"
        );
    }
}

impl Unopenable {
    /// Does a step of opening an image that is not left out yet.
    fn step(
        self,
        image: &mut Result<Candidate, OpenError>,
        step: impl FnOnce(&mut Candidate) -> Result<(), OpenError>,
    ) -> Result<(), OpenError> {
        let Ok(candidate) = image else {
            return Ok(());
        };
        match (step(candidate), self) {
            (Err(error), Self::LeftOut) => {
                // Closes it, which ends its locks.
                *image = Err(error);
                Ok(())
            }
            (result, _) => result,
        }
    }
}

/// The images that are not left out.
fn left(images: &[Result<Candidate, OpenError>]) -> Vec<&ReplicaFile> {
    let left = images.iter().flatten();
    left.map(Candidate::replica).collect()
}

fn open_candidates(
    sources: &[ReplicaSource],
    options: OpenOptions,
    opening: Opening,
    empty: EmptyImages,
    unopenable: Unopenable,
) -> Result<Vec<Result<Candidate, OpenError>>, OpenError> {
    let mut images = examined(sources, options, opening, unopenable)?;
    let disk_bytes = checked_size(&left(&images), options)?;
    lock_all(&mut images, unopenable)?;
    // What an image holds may change until then.
    if empty == EmptyImages::Refused {
        check_contents(&mut images, disk_bytes, unopenable)?;
    }
    any_left(images)
}

/// The images, open and examined.
fn examined(
    sources: &[ReplicaSource],
    options: OpenOptions,
    opening: Opening,
    unopenable: Unopenable,
) -> Result<Vec<Result<Candidate, OpenError>>, OpenError> {
    let started = sources
        .iter()
        .map(|source| Candidate::start(source, options, opening, None));
    let started: Vec<_> = started.collect();
    let mut images: Vec<Result<Candidate, OpenError>> = Vec::with_capacity(sources.len());
    for started in started {
        match (started.open(), unopenable) {
            (Ok(candidate), _) => {
                check_against(left(&images), candidate.replica())?;
                images.push(Ok(candidate));
            }
            (Err(error), Unopenable::LeftOut) => images.push(Err(error)),
            (Err(error), Unopenable::Refused) => return Err(error),
        }
    }
    check_left_out(sources, &images)?;
    for image in &mut images {
        unopenable.step(image, Candidate::examine)?;
    }
    any_left(images)
}

/// Locks the images. To be called after all are checked: an image that is given twice would
/// otherwise be reported as in use by another process, which is this one.
fn lock_all(
    images: &mut [Result<Candidate, OpenError>],
    unopenable: Unopenable,
) -> Result<(), OpenError> {
    for image in images {
        unopenable.step(image, Candidate::lock)?;
    }
    Ok(())
}

/// Checks that an image that cannot be opened is none of the others.
fn check_left_out(
    sources: &[ReplicaSource],
    images: &[Result<Candidate, OpenError>],
) -> Result<(), OpenError> {
    for (place, image) in images.iter().enumerate() {
        for (other_place, other) in images.iter().enumerate() {
            let (source, other_source) = (&sources[place], &sources[other_place]);
            // Once for each two, and not if both are open: then more is known of them.
            if place == other_place || image.is_ok() || (other.is_err() && other_place < place) {
                continue;
            }
            let first = sources[place.min(other_place)].path.clone();
            let second = sources[place.max(other_place)].path.clone();
            if source.path == other_source.path {
                return Err(OpenError::SameImage { first, second });
            }
            if source.node_name == other_source.node_name {
                return Err(OpenError::NodeNameTwice {
                    first,
                    second,
                    node_name: source.node_name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// The images, if one is open; else the error of the first.
fn any_left(
    mut images: Vec<Result<Candidate, OpenError>>,
) -> Result<Vec<Result<Candidate, OpenError>>, OpenError> {
    if images.iter().any(Result::is_ok) || images.is_empty() {
        return Ok(images);
    }
    images.swap_remove(0).map(|candidate| vec![Ok(candidate)])
}

/// Checks that no image is empty where another one holds data (O4).
fn check_contents(
    images: &mut [Result<Candidate, OpenError>],
    disk_bytes: u64,
    unopenable: Unopenable,
) -> Result<(), OpenError> {
    if left(images).len() < 2 {
        return Ok(());
    }
    // All at the same time, unless the daemon opens them itself.
    for image in &mut *images {
        unopenable.step(image, |candidate| candidate.glance(disk_bytes))?;
    }
    let mut seen = Vec::new();
    for image in images {
        unopenable.step(image, |candidate| {
            let contents = candidate.glanced(disk_bytes)?;
            seen.push((candidate.replica().path.clone(), contents));
            Ok(())
        })?;
    }
    check_emptiness(seen)
}

/// The same from what they hold.
pub(super) fn check_emptiness(
    images: impl IntoIterator<Item = (PathBuf, Contents)>,
) -> Result<(), OpenError> {
    let (mut empty, mut holding) = (Vec::new(), Vec::new());
    let (mut is_certain, mut first) = (true, None);
    for (path, contents) in images {
        match contents {
            Contents::Data(at) => {
                first.get_or_insert(at);
                holding.push(path);
            }
            Contents::Nothing => empty.push(path),
            Contents::Zeroes => {
                is_certain = false;
                empty.push(path);
            }
            // It does not vote where it cannot be read.
            Contents::Unknown(_) => {}
        }
    }
    match first {
        Some(at) if !empty.is_empty() => Err(OpenError::EmptyBesideData {
            empty,
            is_certain,
            holding,
            at,
        }),
        _ => Ok(()),
    }
}
