//! Unit tests: which images make one disk.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::*;
use crate::replica::file::{
    OpenOptions, Opening, ReplicaSource, Unopenable, open_all_with_records,
};

const SIZE: u64 = 32 << 20;

/// Creates an image, with a byte of its own in each of these blocks.
fn image(directory: &Path, name: &str, contents: &[(u64, u8)]) -> ReplicaSource {
    image_of(SIZE, directory, name, contents)
}

fn image_of(size: u64, directory: &Path, name: &str, contents: &[(u64, u8)]) -> ReplicaSource {
    let path = directory.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (at, byte) in contents {
        file.write_all_at(&[*byte; 4096], *at).unwrap();
    }
    ReplicaSource {
        path,
        node_name: name.to_owned(),
    }
}

fn compared(sources: &[ReplicaSource], direct: bool) -> Result<(), OpenError> {
    compared_of(SIZE, sources, direct)
}

fn compared_of(size: u64, sources: &[ReplicaSource], direct: bool) -> Result<(), OpenError> {
    let options = OpenOptions {
        read_only: false,
        direct,
        raw_anyway: false,
        block_bytes: 512,
    };
    let (opening, accepted) = (Opening::Here, EmptyImages::Accepted);
    let unopenable = Unopenable::Refused;
    let opened = open_all_with_records(sources, options, opening, accepted, unopenable);
    let images: Result<Vec<_>, _> = opened.unwrap().into_iter().collect();
    let mut images = images.unwrap();
    let mut images: Vec<_> = images
        .iter_mut()
        .map(|(file, access)| (&*file, access))
        .collect();
    compare_first(&mut images, size, EmptyImages::Refused)
}

/// Blocks all over the disk, and near its ends.
fn disk(byte: u8) -> Vec<(u64, u8)> {
    let all_over = (0..200).map(|block| block * SIZE / 200 / 4096 * 4096);
    let ends = [0, 4096, 64 << 10, SIZE - 4096].into_iter();
    all_over.chain(ends).map(|at| (at, byte)).collect()
}

#[test]
fn images_of_different_disks_are_refused_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let [a, b] = ["a", "b"].map(|name| image(path, name, &disk(1)));
    let c = image(path, "c", &disk(2));
    for direct in [false, true] {
        compared(&[a.clone(), b.clone()], direct).unwrap();
        let error = compared(&[a.clone(), c.clone(), b.clone()], direct).unwrap_err();
        let line = error.to_string();
        let quoted = |name: &str| format!("'{}'", path.join(name).display());
        let expected = format!(
            "{} and {} hold other data than {}: they differ nearly everywhere that was compared \
             (first at byte 0)",
            quoted("a"),
            quoted("b"),
            quoted("c")
        );
        assert!(line.starts_with(&expected), "{line}");
        assert!(line.contains("quorum-blkctl add --create"), "{line}");
        let copy = format!("cp --sparse=always {} NEW", quoted("a"));
        assert!(line.contains(&copy), "{line}");
    }
}

#[test]
fn a_few_differences_are_for_the_first_scrub() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let a = image(path, "a", &disk(1));
    let mut contents = disk(1);
    for (_, byte) in &mut contents[..100] {
        *byte = 9;
    }
    let b = image(path, "b", &contents);
    compared(&[a.clone(), b], false).unwrap();
    // A disk that holds hardly anything says nothing.
    let c = image(path, "c", &[(0, 1), (8192, 1)]);
    let d = image(path, "d", &[(0, 2), (4096, 2)]);
    compared(&[c, d], false).unwrap();
}

#[test]
fn a_block_that_is_looked_at_twice_counts_once() {
    const SMALL: u64 = 16 << 10;
    let directory = tempfile::tempdir().unwrap();
    let image = |name, contents: &[_]| image_of(SMALL, directory.path(), name, contents);
    let a = image("a", &[(0, 1), (8192, 1)]);
    let b = image("b", &[(0, 2), (4096, 2)]);
    compared_of(SMALL, &[a.clone(), b], false).unwrap();
    let c = image("c", &[(0, 2), (4096, 2), (12288, 2)]);
    compared_of(SMALL, &[a, c], false).unwrap_err();
}

#[test]
fn empty_images_are_refused_beside_others_that_hold_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let [a, b] = ["a", "b"].map(|name| image(path, name, &[]));
    let c = image(path, "c", &disk(1));
    compared(&[a.clone(), b.clone()], true).unwrap();
    let error = compared(&[a, b, c.clone()], true).unwrap_err();
    assert!(
        matches!(error, OpenError::EmptyBesideData { .. }),
        "{error}"
    );
    compared(&[c], true).unwrap();
}

#[test]
fn one_pair_that_differs_nearly_everywhere_is_enough() {
    let data = |numbers: &[u64]| numbers.iter().map(|n| Sample::Data(*n)).collect::<Vec<_>>();
    let first = data(&[1, 2, 3, 4, 5]);
    let last = data(&[6, 7, 8, 9, 10]);
    let between = data(&[1, 2, 3, 9, 10]);
    let unknown = vec![Sample::Unknown; 5];
    let zeroes = vec![Sample::Zeroes; 5];
    let all = |images: &[&Vec<Sample>]| {
        let images: Vec<_> = images.iter().copied().cloned().collect();
        groups(&images)
    };
    assert_eq!(all(&[&first, &last]), Some([vec![0], vec![1]]));
    let expected = Some([vec![0, 1], vec![2]]);
    assert_eq!(all(&[&first, &between, &last]), expected);
    assert_eq!(all(&[&first, &first, &between]), None);
    assert_eq!(
        all(&[&unknown, &first, &zeroes]),
        Some([vec![0, 1], vec![2]])
    );
    assert_eq!(all(&[&unknown, &first]), None);
}
