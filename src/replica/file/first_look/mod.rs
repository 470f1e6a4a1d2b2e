//! A rough comparison of the images of a new disk (S8), within seconds whatever their size: images
//! of different disks, or new ones beside one that has data, are not to vote with each other.
//!
//! It knows nothing of single sectors that differ: the first scrub compares all of them.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use uuid::Uuid;

use super::all::{EmptyImages, check_emptiness};
use super::look::{Look, SAMPLE_BYTES, Sample, Seen, ends};
use super::{OpenError, ReplicaFile};
use crate::limits::{FIRST_LOOK_DIFFERENT_MIN, FIRST_LOOK_PLACES};
use crate::replica::record_file::RecordAccess;

/// Compares the images of a new disk of `size_bytes`.
///
/// # Errors
/// If some of them are empty beside others that hold data, unless that is accepted; if two differ
/// in nearly everything that was compared; or if one does not answer.
pub fn compare_first(
    images: &mut [(&ReplicaFile, &mut RecordAccess)],
    size_bytes: u64,
    empty: EmptyImages,
) -> Result<(), OpenError> {
    if images.len() < 2 {
        return Ok(());
    }
    let paths: Vec<PathBuf> = images.iter().map(|(file, _)| file.path.clone()).collect();
    if empty == EmptyImages::Refused {
        let seen = all(images, |_| Look::Contents { size_bytes })?;
        let contents = seen.into_iter().filter_map(|seen| match seen {
            Seen::Contents(contents) => Some(contents),
            _ => None,
        });
        check_emptiness(paths.iter().cloned().zip(contents))?;
    }
    let places = places(images, size_bytes)?;
    let samples = all(images, |_| Look::Samples {
        size_bytes,
        places: places.clone(),
    })?;
    let samples = samples.into_iter().map(|seen| match seen {
        Seen::Samples(samples) => samples,
        _ => Vec::new(),
    });
    let samples: Vec<Vec<Sample>> = samples.collect();
    let Some(groups) = groups(&samples) else {
        return Ok(());
    };
    let of = |group: &Vec<usize>| group.iter().map(|image| paths[*image].clone()).collect();
    let differs = |index: &usize| {
        let of = |group: &[usize]| samples[group[0]].get(*index).copied();
        is_informative(of(&groups[0]), of(&groups[1])) && of(&groups[0]) != of(&groups[1])
    };
    let places = ends(size_bytes).chain(places).enumerate();
    let first = places.filter(|(index, _)| differs(index)).map(|(_, at)| at);
    Err(OpenError::OtherDisk {
        groups: groups.each_ref().map(of),
        at: first.min().unwrap_or_default(),
    })
}

/// Where to take samples, besides at both ends: where some image has data, and anywhere.
fn places(
    images: &mut [(&ReplicaFile, &mut RecordAccess)],
    size_bytes: u64,
) -> Result<Vec<u64>, OpenError> {
    let mut places = random_places(size_bytes);
    let share = FIRST_LOOK_PLACES.div_ceil(images.len());
    let from: Vec<u64> = random_places(size_bytes).into_iter().take(share).collect();
    let seen = all(images, |_| Look::Data {
        size_bytes,
        from: from.clone(),
    })?;
    for seen in seen {
        if let Seen::Data(data) = seen {
            places.extend(data.into_iter().take(share));
        }
    }
    places.sort_unstable();
    places.dedup();
    // What is seen twice must not count twice.
    let ends: Vec<u64> = ends(size_bytes).collect();
    places.retain(|place| !ends.contains(place));
    Ok(places)
}

fn random_places(size_bytes: u64) -> Vec<u64> {
    let blocks = size_bytes.div_ceil(SAMPLE_BYTES).max(1);
    let place = |_| {
        let (number, _) = Uuid::new_v4().as_u64_pair();
        // The version is in the low bits.
        (number >> 16) % blocks * SAMPLE_BYTES
    };
    (0..FIRST_LOOK_PLACES).map(place).collect()
}

/// Two images that differ nearly everywhere, each with those that are like it more than the other.
fn groups(samples: &[Vec<Sample>]) -> Option<[Vec<usize>; 2]> {
    let differ = |one: usize, other: usize| are_different(&samples[one], &samples[other]);
    let images = 0..samples.len();
    let mut pairs = images
        .clone()
        .flat_map(|one| (0..one).map(move |other| (other, one)));
    let (first, second) = pairs.find(|(one, other)| differ(*one, *other))?;
    let is_of_second =
        |image: &usize| *image != first && (*image == second || differ(first, *image));
    let (others, alike) = images.partition(is_of_second);
    Some([alike, others])
}

/// Whether two images differ in nine of ten samples that say something.
fn are_different(one: &[Sample], other: &[Sample]) -> bool {
    let samples = one.iter().copied().map(Some);
    let pairs = samples.zip(other.iter().copied().map(Some));
    let (mut different, mut equal) = (0, 0);
    for (one, other) in pairs.filter(|(one, other)| is_informative(*one, *other)) {
        match one == other {
            true => equal += 1,
            false => different += 1,
        }
    }
    different >= FIRST_LOOK_DIFFERENT_MIN && different >= 9 * equal
}

/// Both are known, and there is data.
fn is_informative(one: Option<Sample>, other: Option<Sample>) -> bool {
    let is_known = |sample| !matches!(sample, None | Some(Sample::Unknown));
    let is_data = |sample| matches!(sample, Some(Sample::Data(_)));
    is_known(one) && is_known(other) && (is_data(one) || is_data(other))
}

/// Looks at all images at the same time.
fn all(
    images: &mut [(&ReplicaFile, &mut RecordAccess)],
    at: impl Fn(usize) -> Look + Sync,
) -> Result<Vec<Seen>, OpenError> {
    std::thread::scope(|scope| {
        let looks = images
            .iter_mut()
            .enumerate()
            .map(|(index, (file, access))| {
                let at = at(index);
                let builder = std::thread::Builder::new().name("first-look".into());
                let path = file.path.clone();
                let started = builder.spawn_scoped(scope, || access.look(file, at));
                started.map_err(|source| OpenError::Opener { path, source })
            });
        let looks: Vec<_> = looks.collect();
        let seen = looks
            .into_iter()
            .map(|look| look?.join().expect("it does not panic"));
        // All of them have ended when this returns.
        let seen: Vec<_> = seen.collect();
        seen.into_iter().collect()
    })
}

#[cfg(test)]
mod tests;
