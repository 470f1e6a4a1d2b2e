//! Firmware of a virtual machine, and disks from which it boots the guest.

use std::path::PathBuf;

use crate::programs;

/// What finds and starts the boot loader of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS, QEMU's default.
    SeaBios,
    /// OVMF, for UEFI.
    Ovmf,
}

impl Firmware {
    /// An image of a disk from which it boots: a partition table in sectors of 512 bytes, a boot
    /// loader, and the guest that [`GuestBuilder`](crate::guest::GuestBuilder) starts.
    pub fn disk(self) -> PathBuf {
        prepared(match self {
            Self::SeaBios => "bios.raw",
            Self::Ovmf => "uefi.raw",
        })
    }

    /// What QEMU needs to use it.
    pub(crate) fn arguments(self) -> Vec<String> {
        match self {
            Self::SeaBios => Vec::new(),
            Self::Ovmf => {
                let path = prepared("OVMF.fd").into_os_string();
                vec!["-bios".into(), path.into_string().expect("a path in UTF-8")]
            }
        }
    }
}

fn prepared(name: &str) -> PathBuf {
    let path = programs::guest_part(name);
    let how_to_prepare = "run `make firmware` (tests/guest/firmware.sh) first";
    assert!(path.exists(), "no {}: {how_to_prepare}", path.display());
    path
}
