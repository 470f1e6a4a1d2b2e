//! The version of this program, in the form of the protocol.

use serde::Serialize;

/// QAPI's VersionInfo.
#[derive(Serialize)]
pub(super) struct Version {
    qemu: VersionTriple,
    package: &'static str,
}

#[derive(Serialize)]
struct VersionTriple {
    micro: u32,
    minor: u32,
    major: u32,
}

impl Version {
    pub(super) fn of_this_program() -> Self {
        let mut parts = [
            env!("CARGO_PKG_VERSION_MAJOR"),
            env!("CARGO_PKG_VERSION_MINOR"),
            env!("CARGO_PKG_VERSION_PATCH"),
        ]
        .map(|part| part.parse().expect("cargo has checked it"))
        .into_iter();
        let mut next = || parts.next().expect("three of them");
        let (major, minor, micro) = (next(), next(), next());
        Self {
            qemu: VersionTriple {
                micro,
                minor,
                major,
            },
            package: concat!("quorum-blk ", env!("CARGO_PKG_VERSION")),
        }
    }
}
