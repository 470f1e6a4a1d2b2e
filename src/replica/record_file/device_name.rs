//! Names of block devices that survive a reboot.
//!
//! `/dev/sdb` is another disk after a reboot, perhaps one that has a record too. So the record of a
//! device has the name of a link in `/dev/disk/by-id`, which udev makes of the serial number or the
//! UUID of the device, or what the kernel knows of it (`kernel_name.rs`). A device without any of
//! these (a ZFS or network volume) is named after its path as the operator gave it, if that is a
//! link: `/dev/zvol/tank/vm1` survives a reboot, what it leads to (`/dev/zd16`) does not, and is
//! refused. Otherwise a replica would be taken for another one after a reboot, and what it has
//! missed would be believed.
//!
//! A device may have several links, and updates of udev add some. The record has the first of the
//! names in order of preference when it is made, and is looked for under all of them.

use std::ffi::OsString;
use std::fs::{metadata, read_dir, symlink_metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{major, minor};

use super::error::{RecordFault, Step};
use super::kernel_name;
use crate::limits::{DEVICE_LINKS_MAX, DEVICE_NAMED_LIMIT};

/// How often to look whether udev has named a device.
const INTERVAL: Duration = Duration::from_millis(20);

/// Links of these kinds come first, in this order: the others may be names that a device shares
/// with one that was there before it (a volume that was created anew, a model without serial
/// number).
const PREFERRED: [&str; 5] = ["wwn-", "nvme-eui.", "nvme-uuid.", "dm-uuid-", "md-uuid-"];

/// A link that udev makes of what the *guest* has written to its disk. All replicas have the same,
/// and any guest can change it.
const OF_CONTENT: &str = "lvm-pv-uuid-";

/// Where the names of devices are.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    by_id: PathBuf,
    udev: PathBuf,
    /// Has a directory for each number of a device.
    sysfs: PathBuf,
    /// How long udev may take.
    limit: Duration,
}

impl Devices {
    /// Those of this host.
    pub(super) fn of_host() -> Self {
        Self {
            sysfs: "/sys/dev/block".into(),
            ..Self::at("/dev/disk/by-id", "/run/udev")
        }
    }

    /// With what udev knows, and not the kernel.
    pub(super) fn at(by_id: impl Into<PathBuf>, udev: impl Into<PathBuf>) -> Self {
        Self {
            by_id: by_id.into(),
            udev: udev.into(),
            sysfs: PathBuf::new(),
            limit: DEVICE_NAMED_LIMIT,
        }
    }

    /// The names of a device, the preferred one first. `path` is what the operator calls it.
    ///
    /// # Errors
    /// If its names are not known, which is not the same as having none: under another name its
    /// record would not be found. Or if it has none that is the same after a reboot.
    pub(super) fn names(&self, device: u64, path: &Path) -> Result<Vec<OsString>, RecordFault> {
        if !self.wait_for_udev(device) {
            return Err(RecordFault::NoName);
        }
        let failed = |error| RecordFault::of_io(Step::Look, self.by_id.clone(), &error);
        let mut links = self.links(device).map_err(failed)?;
        links.sort_by_cached_key(|link| (rank(link), link.clone()));
        let mut names: Vec<OsString> = links.iter().map(|path| escaped(path)).collect();
        names.extend(kernel_name::names(&self.sysfs, device));
        if names.is_empty() {
            let node = symlink_metadata(path);
            if node.is_ok_and(|node| node.file_type().is_block_device()) {
                return Err(RecordFault::NoLastingName);
            }
            names.push(escaped(&std::path::absolute(path).map_err(failed)?));
        }
        Ok(names)
    }

    /// Waits until udev has dealt with the device, if there is udev: early in the boot, the node of
    /// a device is there before its links are. Returns whether it has.
    fn wait_for_udev(&self, device: u64) -> bool {
        if !self.udev.join("control").exists() {
            return true;
        }
        let known = format!("data/b{}:{}", major(device), minor(device));
        let by = Instant::now() + self.limit;
        while !self.udev.join(&known).exists() {
            if Instant::now() > by {
                return false;
            }
            std::thread::sleep(INTERVAL);
        }
        true
    }

    fn links(&self, device: u64) -> io::Result<Vec<PathBuf>> {
        let entries = match read_dir(&self.by_id) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut links = Vec::new();
        for (count, entry) in entries.enumerate() {
            if count == DEVICE_LINKS_MAX {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            let entry = entry?;
            let leads_to_it = || {
                let found = metadata(entry.path());
                found.is_ok_and(|found| {
                    found.file_type().is_block_device() && found.rdev() == device
                })
            };
            let name = entry.file_name();
            if !name.as_bytes().starts_with(OF_CONTENT.as_bytes()) && leads_to_it() {
                links.push(entry.path());
            }
        }
        Ok(links)
    }
}

fn rank(link: &Path) -> usize {
    let name = link.file_name().unwrap_or_default().as_bytes();
    let is_of_kind = |kind: &&str| name.starts_with(kind.as_bytes());
    let kind = PREFERRED.iter().position(is_of_kind);
    kind.unwrap_or(PREFERRED.len())
}

/// A path as the name of a file, as `systemd-escape --path` writes it: `/dev/sdb` is `dev-sdb`.
pub(super) fn escaped(path: &Path) -> OsString {
    let mut name = Vec::new();
    for part in path.components() {
        let part = match part {
            Component::Normal(part) => part.as_bytes(),
            Component::ParentDir => b"..",
            Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
        };
        if !name.is_empty() {
            name.push(b'-');
        }
        for &byte in part {
            let is_first = name.is_empty();
            match byte {
                b'.' if is_first => name.extend(b"\\x2e"),
                b':' | b'_' | b'.' => name.push(byte),
                byte if byte.is_ascii_alphanumeric() => name.push(byte),
                byte => name.extend(format!("\\x{byte:02x}").into_bytes()),
            }
        }
    }
    OsString::from_vec(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::symlink;

    use testkit::loop_device::LoopDevice;

    fn device_of(path: &Path) -> u64 {
        metadata(path).unwrap().rdev()
    }

    #[test]
    fn paths_are_escaped_as_systemd_does() {
        for (path, name) in [
            ("/dev/sdb", "dev-sdb"),
            ("//dev/./mapper/a-b", "dev-mapper-a\\x2db"),
            ("/.hidden/.b c", "\\x2ehidden-.b\\x20c"),
            (
                "/dev/disk/by-id/dm-uuid-LVM-x",
                "dev-disk-by\\x2did-dm\\x2duuid\\x2dLVM\\x2dx",
            ),
        ] {
            assert_eq!(escaped(Path::new(path)), *name, "{path}");
        }
    }

    #[test]
    fn a_device_has_the_names_of_its_links_the_best_one_first() {
        let directory = tempfile::tempdir().unwrap();
        let by_id = directory.path().join("by-id");
        std::fs::create_dir(&by_id).unwrap();
        let [device, other] = ["a", "b"].map(|name| {
            let file = directory.path().join(name);
            std::fs::File::create(&file)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            LoopDevice::attach(&file)
        });
        let devices = Devices::at(&by_id, directory.path().join("no-udev"));
        let names = |path: &Path| devices.names(device_of(device.path()), path).unwrap();

        // No link leads to it: as the operator calls it, not as the kernel does.
        let volume = directory.path().join("volume");
        symlink(device.path(), &volume).unwrap();
        assert_eq!(names(&volume), [escaped(&volume)]);
        // What the kernel calls it may lead to another device after a reboot.
        let node = devices.names(device_of(device.path()), device.path());
        assert!(matches!(node, Err(RecordFault::NoLastingName)), "{node:?}");

        for (link, device) in [
            ("ata-DISK_1", &device),
            ("dm-uuid-LVM-1", &device),
            ("lvm-pv-uuid-1", &device),
            ("wwn-0x5", &device),
            ("wwn-0x4", &other),
        ] {
            symlink(device.path(), by_id.join(link)).unwrap();
        }
        symlink("/nowhere", by_id.join("wwn-0x3")).unwrap();
        let expected = ["wwn-0x5", "dm-uuid-LVM-1", "ata-DISK_1"];
        assert_eq!(
            names(&volume),
            expected.map(|name| escaped(&by_id.join(name)))
        );
    }

    #[test]
    fn a_loop_device_has_the_name_of_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let device = LoopDevice::attach(&file);
        let devices = Devices {
            by_id: directory.path().join("no-links"),
            udev: directory.path().join("no-udev"),
            ..Devices::of_host()
        };
        let names = devices.names(device_of(device.path()), device.path());
        let mut expected = OsString::from("loop=");
        expected.push(escaped(&file.canonicalize().unwrap()));
        assert_eq!(names.unwrap(), [expected]);
    }

    #[test]
    fn a_device_is_not_named_before_udev_has_made_its_links() {
        let directory = tempfile::tempdir().unwrap();
        let udev = directory.path().join("udev");
        std::fs::create_dir_all(udev.join("data")).unwrap();
        std::fs::write(udev.join("control"), "").unwrap();
        let devices = Devices::at(directory.path().join("by-id"), &udev);
        let path = Path::new("/dev/x");
        std::thread::scope(|scope| {
            let named = scope.spawn(|| devices.names(rustix::fs::makedev(8, 16), path));
            std::fs::write(udev.join("data/b8:16"), "").unwrap();
            assert_eq!(named.join().unwrap().unwrap(), ["dev-x"]);
        });
        let devices = Devices {
            limit: Duration::from_millis(1),
            ..devices
        };
        let names = devices.names(rustix::fs::makedev(8, 32), path);
        assert!(matches!(names, Err(RecordFault::NoName)), "{names:?}");
    }
}
