//! Formats of disk images other than raw, recognized by their magic numbers.
//!
//! Served as a raw disk, such an image would show its guest the headers and tables of the format
//! instead of the disk that it describes, and the first write could destroy it.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use serde::{Deserialize, Serialize};

use super::alignment::page_aligned;

/// Bytes to read at the start of an image, and at its end.
const BLOCK_BYTES: usize = 4096;

/// A footer is in the last sector.
const FOOTER_BYTES: usize = 512;

/// A format that is not raw. The names are those of `qemu-img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// Of the Bochs emulator.
    Bochs,
    /// Of Apple's disk utility.
    Dmg,
    /// An encrypted disk, of QEMU or of a Linux guest.
    Luks,
    /// Of Parallels.
    Parallels,
    /// QEMU's first format.
    Qcow,
    /// QEMU's format.
    Qcow2,
    /// QEMU's former format.
    Qed,
    /// Of VirtualBox.
    Vdi,
    /// Of Hyper-V.
    Vhdx,
    /// Of VMware.
    Vmdk,
    /// VHD, of Virtual PC and Azure.
    Vpc,
}

/// Offset from the start of the image, bytes there, format.
const MAGICS: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb\0\0\0\x01", Format::Qcow),
    (0, b"QFI\xfb", Format::Qcow2),
    (0, b"QED\0", Format::Qed),
    (0, b"KDMV", Format::Vmdk),
    (0, b"COWD", Format::Vmdk),
    (0, b"# Disk DescriptorFile", Format::Vmdk),
    (0, b"vhdxfile", Format::Vhdx),
    (0, b"conectix", Format::Vpc),
    (0x40, b"\x7f\x10\xda\xbe", Format::Vdi),
    (0, b"WithoutFreeSpace", Format::Parallels),
    (0, b"WithouFreSpacExt", Format::Parallels),
    (0, b"LUKS\xba\xbe", Format::Luks),
    (0, b"Bochs Virtual HD Image", Format::Bochs),
];

/// Bytes at the start of the last sector, format.
const FOOTER_MAGICS: &[(&[u8], Format)] = &[(b"conectix", Format::Vpc), (b"koly", Format::Dmg)];

impl Format {
    /// The name that `qemu-img convert -f` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bochs => "bochs",
            Self::Dmg => "dmg",
            Self::Luks => "luks",
            Self::Parallels => "parallels",
            Self::Qcow => "qcow",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
        }
    }

    /// The format of an image of `size_bytes`, if it is known and not raw. A block that cannot be
    /// read is no reason to reject a replica.
    pub(super) fn of(file: &File, size_bytes: u64) -> Option<Self> {
        let head = read_block(file, 0);
        // An image of whole sectors ends with a whole sector; direct I/O needs the whole block.
        let block = size_bytes.saturating_sub(1) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let tail = read_block(file, block);
        let footer = tail.len().checked_sub(FOOTER_BYTES);
        by_head(&head).or_else(|| by_footer(&tail[footer?..]))
    }
}

fn by_head(head: &[u8]) -> Option<Format> {
    let has = |&&(offset, magic, _): &&(usize, &[u8], Format)| {
        head.get(offset..)
            .is_some_and(|bytes| bytes.starts_with(magic))
    };
    MAGICS.iter().find(has).map(|&(_, _, format)| format)
}

fn by_footer(footer: &[u8]) -> Option<Format> {
    let found = FOOTER_MAGICS
        .iter()
        .find(|(magic, _)| footer.starts_with(magic));
    found.map(|&(_, format)| format)
}

/// What can be read of the block at `offset`: less at the end of the image, nothing after an error.
fn read_block(file: &File, offset: u64) -> Vec<u8> {
    let mut memory = Vec::new();
    let block = page_aligned(&mut memory, BLOCK_BYTES);
    let bytes = file.read_at(block, offset).unwrap_or(0);
    block[..bytes].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_numbers_are_found_where_they_are() {
        let with = |offset: usize, magic: &[u8]| {
            let mut head = vec![0; BLOCK_BYTES];
            head[offset..offset + magic.len()].copy_from_slice(magic);
            head
        };
        for &(offset, magic, format) in MAGICS {
            assert_eq!(by_head(&with(offset, magic)), Some(format));
            assert_eq!(by_head(&with(offset + 1, magic)), None);
        }
        assert_eq!(by_head(&[]), None);
        assert_eq!(by_head(b"QFI"), None);
    }

    #[test]
    fn a_footer_is_the_last_sector() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10_240).unwrap();
        assert_eq!(Format::of(&file, 10_240), None);
        file.write_all_at(b"conectix", 10_240 - 512).unwrap();
        assert_eq!(Format::of(&file, 10_240), Some(Format::Vpc));
        file.set_len(20_480).unwrap();
        assert_eq!(Format::of(&file, 20_480), None);
    }
}
