//! Names of block devices that the kernel knows, where udev has made no links: of loop devices, and
//! of any device in a container.
//!
//! Each is of something that is the same after a reboot: the file below a loop device, the UUID of
//! a mapped device or an array, the identifier of a disk. No path is escaped to one of these names:
//! they contain `=`.

use std::ffi::{OsStr, OsString};
use std::fs::read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{major, minor};

use super::device_name::escaped;

/// What identifies a device, in files of its directory, the best one first.
const IDENTIFIERS: [(&str, &[&str]); 4] = [
    ("dm", &["dm/uuid", "dm/name"]),
    ("md", &["md/uuid"]),
    ("wwid", &["wwid", "device/wwid"]),
    ("serial", &["serial", "device/serial"]),
];

/// The names of a device, of which `sysfs` has a directory for each number.
pub(super) fn names(sysfs: &Path, device: u64) -> Vec<OsString> {
    let directory = sysfs.join(format!("{}:{}", major(device), minor(device)));
    // A partition is a directory in that of its device.
    let partition = value(&directory.join("partition"));
    let whole = match partition {
        Some(_) => directory.join(".."),
        None => directory,
    };
    let of_loop = value(&whole.join("loop/backing_file")).map(|file| {
        let offset = value(&whole.join("loop/offset")).filter(|offset| offset != b"0");
        ("loop", [Some(file), offset])
    });
    let others = IDENTIFIERS.iter().filter_map(|(kind, files)| {
        let mut files = files.iter();
        let found = files.find_map(|file| value(&whole.join(file)))?;
        Some((*kind, [Some(found), None]))
    });
    let names = of_loop.into_iter().chain(others).map(|(kind, values)| {
        let mut name = OsString::from(kind);
        for value in values.iter().flatten().chain(&partition) {
            name.push("=");
            name.push(escaped(Path::new(OsStr::from_bytes(value))));
        }
        name
    });
    names.collect()
}

/// The text of a file of sysfs, without what ends it. `None` if it is empty or cannot be read.
fn value(path: &Path) -> Option<Vec<u8>> {
    let mut text = read(path).ok()?;
    while text.last().is_some_and(u8::is_ascii_whitespace) {
        text.pop();
    }
    (!text.is_empty()).then_some(text)
}
