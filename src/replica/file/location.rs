//! Where the bytes of an image are: what lies below it, as far as the kernel says.
//!
//! Two paths may lead to the same bytes: a file and a loop device over it, a disk and its
//! partition, two device nodes. As replicas they would vote twice with one copy, and each would
//! write behind the other's back.

#![forbid(unsafe_code)]

use std::fs::{File, Metadata, metadata, read_dir, read_to_string};
use std::path::{Path, PathBuf};

use rustix::fs::{major, makedev, minor};
use serde::{Deserialize, Serialize};

use super::ImageIdentity;
use super::block_device::backing_file;

/// Layers below an image that are looked at: more than a host has.
const DEPTH_MAX: usize = 16;
/// Files and devices below an image that are looked at.
const BELOW_MAX: usize = 64;

/// Where the bytes of an image are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Location {
    /// The image itself, or the file or device that it is a loop device over.
    holder: ImageIdentity,
    /// What `holder` is a part of: the whole disk of a partition, the devices of a mapped device
    /// or an array, the device of a file system.
    below: Vec<ImageIdentity>,
}

/// How two images share their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overlap {
    /// They are the same bytes.
    Same,
    /// The first one is part of the second one.
    FirstInSecond,
    /// The second one is part of the first one.
    SecondInFirst,
}

impl Location {
    /// The location of an open image.
    pub(super) fn of(file: &File, metadata: &Metadata) -> Self {
        let mut holder = ImageIdentity::of(metadata);
        // A partition of a loop device answers as the whole device.
        if let ImageIdentity::BlockDevice { device } = holder
            && !is_partition(&directory(device))
        {
            holder = backing_file(file).unwrap_or(holder);
        }
        // A loop device over a loop device.
        for _ in 0..DEPTH_MAX {
            match loop_below(holder) {
                Some(next) => holder = next,
                None => break,
            }
        }
        let mut below = Vec::new();
        collect_below(holder, DEPTH_MAX, &mut below);
        Self { holder, below }
    }

    /// Whether two images share bytes.
    pub(super) fn overlap(&self, other: &Self) -> Option<Overlap> {
        if self.holder == other.holder {
            Some(Overlap::Same)
        } else if self.below.contains(&other.holder) {
            Some(Overlap::FirstInSecond)
        } else if other.below.contains(&self.holder) {
            Some(Overlap::SecondInFirst)
        } else {
            None
        }
    }
}

/// The directory of a block device in sysfs.
fn directory(device: u64) -> PathBuf {
    Path::new("/sys/dev/block").join(format!("{}:{}", major(device), minor(device)))
}

/// What a loop device is over.
fn loop_below(identity: ImageIdentity) -> Option<ImageIdentity> {
    let ImageIdentity::BlockDevice { device } = identity else {
        return None;
    };
    let path = read_to_string(directory(device).join("loop/backing_file")).ok()?;
    let below = metadata(path.trim_end_matches('\n')).ok()?;
    Some(ImageIdentity::of(&below))
}

/// Adds what `identity` is a part of.
fn collect_below(identity: ImageIdentity, depth: usize, below: &mut Vec<ImageIdentity>) {
    if depth == 0 {
        return;
    }
    let next = match identity {
        ImageIdentity::File { device, .. } => vec![device],
        ImageIdentity::BlockDevice { device } => parents(&directory(device)),
    };
    let next = next
        .into_iter()
        .filter(|&device| directory(device).exists())
        .map(|device| ImageIdentity::BlockDevice { device })
        .chain(loop_below(identity));
    for identity in next {
        if below.len() < BELOW_MAX && !below.contains(&identity) {
            below.push(identity);
            collect_below(identity, depth - 1, below);
        }
    }
}

fn is_partition(directory: &Path) -> bool {
    directory.join("partition").exists()
}

/// The whole disk of a partition, and the devices that a mapped device or an array consists of.
fn parents(directory: &Path) -> Vec<u64> {
    let mut parents = Vec::new();
    // The link leads to the directory of the partition in that of its disk.
    if is_partition(directory)
        && let Ok(own) = directory.canonicalize()
    {
        parents.extend(own.parent().and_then(number));
    }
    let slaves = read_dir(directory.join("slaves")).into_iter().flatten();
    parents.extend(slaves.filter_map(|entry| number(&entry.ok()?.path())));
    parents
}

/// The device number in a directory of sysfs.
fn number(directory: &Path) -> Option<u64> {
    let text = read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn device(device: u64) -> ImageIdentity {
        ImageIdentity::BlockDevice { device }
    }

    fn location(holder: ImageIdentity, below: &[ImageIdentity]) -> Location {
        Location {
            holder,
            below: below.to_vec(),
        }
    }

    #[test]
    fn images_overlap_if_one_is_the_other_or_part_of_it() {
        let file = |inode| ImageIdentity::File { device: 9, inode };
        let disk = location(device(1), &[]);
        let partition = location(device(2), &[device(1)]);
        let on_partition = location(file(7), &[device(2), device(1)]);
        assert_eq!(disk.overlap(&disk), Some(Overlap::Same));
        assert_eq!(partition.overlap(&disk), Some(Overlap::FirstInSecond));
        assert_eq!(disk.overlap(&on_partition), Some(Overlap::SecondInFirst));
        // Two files of one file system, two partitions of one disk.
        let other = location(file(8), &[device(2), device(1)]);
        assert_eq!(on_partition.overlap(&other), None);
        let second = location(device(3), &[device(1)]);
        assert_eq!(partition.overlap(&second), None);
    }

    #[test]
    fn a_file_is_on_the_device_of_its_file_system() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let location = Location::of(&file, &metadata);
        assert_eq!(location.holder, ImageIdentity::of(&metadata));
        let on_device = directory(std::os::unix::fs::MetadataExt::dev(&metadata)).exists();
        assert_eq!(!location.below.is_empty(), on_device);
    }
}
