//! The size of a disk, given the sizes of its images.
//!
//! A larger image is used up to the end of the disk. A shorter one has lost data, and a disk that
//! took its size would lose that of all others. So the size is the one that most images have; if
//! there is none, that of the smallest block device, since only files are cut by accident.

#![forbid(unsafe_code)]

use super::{OpenError, ReplicaFile};

/// The size of the disk that these images hold.
///
/// # Errors
/// If an image is shorter than the disk, or may be.
pub fn disk_size(images: &[&ReplicaFile]) -> Result<u64, OpenError> {
    let sizes: Vec<Size> = images
        .iter()
        .map(|image| Size {
            bytes: image.size_bytes,
            is_block_device: image.is_block_device,
        })
        .collect();
    decide(&sizes).map_err(|Cut { shorter, larger }| OpenError::Shorter {
        path: images[shorter].path.clone(),
        bytes: images[shorter].size_bytes,
        larger: images[larger].path.clone(),
        larger_bytes: images[larger].size_bytes,
    })
}

#[derive(Clone, Copy, Debug)]
struct Size {
    bytes: u64,
    is_block_device: bool,
}

/// An image that is or may be shorter than the disk, and a larger one, by their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    shorter: usize,
    larger: usize,
}

fn decide(sizes: &[Size]) -> Result<u64, Cut> {
    let of = |bytes: u64| sizes.iter().filter(move |size| size.bytes == bytes);
    let least = sizes.iter().map(|size| size.bytes).min().unwrap_or(0);
    let of_most = sizes
        .iter()
        .map(|size| size.bytes)
        .find(|&bytes| 2 * of(bytes).count() > sizes.len());
    let is_certain = match of_most {
        Some(bytes) => bytes == least,
        None => of(least).all(|size| size.is_block_device),
    };
    if is_certain {
        return Ok(least);
    }
    let place = |holds: &dyn Fn(u64) -> bool| sizes.iter().position(|size| holds(size.bytes));
    Err(Cut {
        shorter: place(&|bytes| bytes == least).unwrap_or(0),
        larger: place(&|bytes| of_most.map_or(bytes > least, |most| bytes == most)).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(sizes: &[(u64, bool)]) -> Result<u64, (usize, usize)> {
        let sizes: Vec<_> = sizes
            .iter()
            .map(|&(bytes, is_block_device)| Size {
                bytes,
                is_block_device,
            })
            .collect();
        decide(&sizes).map_err(|cut| (cut.shorter, cut.larger))
    }

    fn files(sizes: &[u64]) -> Result<u64, (usize, usize)> {
        let sizes: Vec<_> = sizes.iter().map(|&bytes| (bytes, false)).collect();
        decided(&sizes)
    }

    #[test]
    fn larger_images_are_used_in_part() {
        assert_eq!(files(&[8]), Ok(8));
        assert_eq!(files(&[8, 8, 9]), Ok(8));
        assert_eq!(files(&[20, 8, 8, 8, 30]), Ok(8));
        assert_eq!(decided(&[(8, true), (9, true), (10, true)]), Ok(8));
        assert_eq!(decided(&[(9, false), (8, true)]), Ok(8));
    }

    #[test]
    fn no_image_that_may_have_been_cut_decides() {
        assert_eq!(files(&[8, 7, 8]), Err((1, 0)));
        assert_eq!(files(&[9, 8, 8, 7]), Err((3, 0)));
        assert_eq!(files(&[8, 9]), Err((0, 1)));
        assert_eq!(decided(&[(8, false), (9, true)]), Err((0, 1)));
        // A block device that is shorter than most.
        assert_eq!(decided(&[(9, true), (9, true), (8, true)]), Err((2, 0)));
    }
}
