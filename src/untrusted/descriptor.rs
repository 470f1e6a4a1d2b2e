//! What kind of file a descriptor is, without asking a file system that may not answer.
//!
//! A file of FUSE or of a network may make everybody wait who touches it: in its memory, in its
//! status, and when it is closed. So only files are taken whose file system is in this kernel.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::sync_channel;

use rustix::fs::{AtFlags, FileType, FsWord, StatxFlags, fcntl_get_seals, fstatfs, statx};
use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use rustix::termios::isatty;

use super::close::call;
use super::reserve::is_reserved;

/// The file systems that never wait for another process or machine.
const LOCAL: [&str; 19] = [
    "bcachefs",
    "btrfs",
    "devtmpfs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "jfs",
    "ntfs3",
    "overlay",
    "ramfs",
    "squashfs",
    "tmpfs",
    "vfat",
    "xfs",
    "zfs",
];

/// Of these, the ones that have no block device: `f_type` of `statfs(2)`, as in `linux/magic.h` and
/// OpenZFS.
const LOCAL_KINDS: [FsWord; 6] = [
    0x9123_683e, // btrfs
    0xca45_1a4e, // bcachefs
    0x794c_7630, // overlay
    0x2fc1_2fc1, // zfs
    0x8584_58f6, // ramfs
    0x0102_1994, // tmpfs
];

/// Checks that no thread waits for another process when it uses or closes a descriptor.
///
/// # Errors
/// If one may, or that cannot be found out, or the descriptor is one of those in reserve. The
/// error says which kind it is.
pub fn check_is_local(descriptor: &impl AsFd) -> io::Result<()> {
    if is_reserved(descriptor) {
        return Err(io::Error::other("it passes more descriptors than are left"));
    }
    // Memory files, and files of tmpfs and hugetlbfs. Others have no seals.
    if fcntl_get_seals(descriptor).is_ok() {
        return Ok(());
    }
    // Without this flag a file system of another process would be asked.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let status = statx(descriptor, "", flags, StatxFlags::TYPE)?;
    let kind = u32::from(status.stx_mode) & libc::S_IFMT;
    let refused = |what: &str| Err(io::Error::other(format!("{what} is passed")));
    // What has no kind is an eventfd, or another file that only this kernel knows.
    if kind == 0 {
        return Ok(());
    }
    match FileType::from_raw_mode(kind) {
        FileType::Fifo => Ok(()),
        FileType::Socket if socket_domain(descriptor)? == AddressFamily::UNIX => Ok(()),
        FileType::Socket => refused("a network socket"),
        FileType::CharacterDevice if !isatty(descriptor) => Ok(()),
        FileType::RegularFile | FileType::Directory => {
            let is_local = match file_system(descriptor) {
                Some(name) => LOCAL.contains(&name.as_str()),
                // Mounted elsewhere: those on a block device that users can mount are local.
                None => status.stx_dev_major != 0 || says_it_is_local(descriptor),
            };
            if is_local {
                return Ok(());
            }
            refused("a file of a file system that may not answer, such as FUSE or NFS,")
        }
        _ => refused("a device that may not answer"),
    }
}

/// Whether a file system without a block device says that it is one of [`LOCAL`]. It is asked by a
/// thread, since it may not answer.
fn says_it_is_local(descriptor: &impl AsFd) -> bool {
    let Ok(duplicate) = descriptor.as_fd().try_clone_to_owned() else {
        return false;
    };
    let (sender, answer) = sync_channel(1);
    call(move || {
        let kind = fstatfs(&duplicate).map(|stated| stated.f_type);
        // The caller waits no more, or this.
        let _ = sender.send(kind.is_ok_and(|kind| LOCAL_KINDS.contains(&kind)));
    });
    answer.try_recv().unwrap_or(false)
}

/// Whether it is a socket.
pub fn is_socket(descriptor: &impl AsFd) -> bool {
    socket_domain(descriptor).is_ok()
}

/// The name of the file system that a file is on, if it is mounted in the namespace of the daemon.
fn file_system(descriptor: &impl AsFd) -> Option<String> {
    let descriptor = descriptor.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').next() == Some(id.trim()))?;
    // Behind a variable number of fields: "- TYPE SOURCE OPTIONS".
    let kind = mount.split_once(" - ")?.1.split(' ').next()?;
    Some(kind.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use testkit::fuse::FuseImage;

    use super::*;

    #[test]
    fn what_only_this_kernel_serves_is_taken() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        check_is_local(&event).unwrap();
        check_is_local(&memory).unwrap();
        check_is_local(&reader).unwrap();
        check_is_local(&socket).unwrap();
        check_is_local(&tempfile::tempfile().unwrap()).unwrap();
        check_is_local(&File::open("/dev/zero").unwrap()).unwrap();
    }

    #[test]
    fn what_another_process_or_machine_serves_is_refused() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        check_is_local(&socket).unwrap_err();
        let directory = tempfile::tempdir().unwrap();
        let backing = directory.path().join("backing");
        File::create(&backing).unwrap().set_len(1 << 20).unwrap();
        let image = FuseImage::serve(&backing);
        let file = File::open(image.path()).unwrap();
        // Its attributes are not asked for.
        let _guard = image.fault_guard();
        image.inject(
            testkit::fuse::Operation::Attributes,
            testkit::fuse::Fault::Hang,
        );
        check_is_local(&file).unwrap_err();
        assert!(!says_it_is_local(&file));
    }

    #[test]
    fn a_file_system_of_another_namespace_is_asked() {
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        assert!(says_it_is_local(&memory), "it is on tmpfs");
        assert!(!says_it_is_local(&File::open("/proc/self/stat").unwrap()));
    }
}
