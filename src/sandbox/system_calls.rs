//! The system calls of each kind of thread. What is not listed ends the process.
//!
//! Where the kernel has several calls for one purpose, all of them are listed: another C library,
//! or another version of it, uses another one.

use super::ThreadKind;

/// Memory, threads and what they wait for, signals, time, and what is open: of all kinds.
const ALL: &str = "\
    brk mmap mprotect mremap munmap madvise clone clone3 futex futex_waitv futex_wait \
    futex_wake gettid getpid rseq sched_getaffinity sched_setaffinity sched_yield \
    set_robust_list set_tid_address getcpu membarrier prctl restart_syscall exit exit_group \
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack tgkill clock_gettime \
    clock_getres clock_nanosleep gettimeofday nanosleep time close close_range read readv \
    write writev fcntl ioctl fstat newfstatat statx lseek dup dup2 dup3 poll ppoll eventfd2 \
    pipe2 getrandom uname sysinfo getrlimit prlimit64";

/// Clients of sockets.
const CONNECTIONS: &str = "\
    accept accept4 recvfrom recvmsg recvmmsg sendto sendmsg shutdown getsockopt setsockopt \
    getsockname getpeername socketpair epoll_create1 epoll_ctl epoll_wait epoll_pwait \
    epoll_pwait2";

/// Signals to guests: eventfds that are signalled without waiting.
const NOTIFICATIONS: &str = "\
    memfd_create io_setup io_submit io_getevents io_destroy";

/// What io_uring would do, and waits for it.
const OPERATIONS: &str = "\
    io_uring_enter io_uring_register epoll_create1 epoll_ctl epoll_wait \
    epoll_pwait epoll_pwait2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 fdatasync fsync \
    fallocate wait4 waitid getppid fadvise64 setsockopt shutdown kill fstatfs";

/// Memory that a frontend shares, and where its descriptors come from.
const SHARED_MEMORY: &str = "\
    memfd_create ftruncate fallocate fstatfs statfs open openat openat2 readlink readlinkat \
    getdents64 pidfd_open msync access faccessat faccessat2 lstat stat";

/// What fails in threads that open nothing (`NO_FILES`).
const OPENING: &str = "open openat openat2";

/// Sockets lose their names.
const NAMES_OF_SOCKETS: &str = "unlink unlinkat lstat";

/// Images and records that are open, and what their paths name.
const OPEN_FILES: &str = "\
    access faccessat faccessat2 stat lstat fstatfs statfs readlink readlinkat getcwd ftruncate \
    fallocate pread64 preadv preadv2 pwrite64 pwritev pwritev2 fdatasync fsync syncfs fadvise64 \
    flock sync_file_range memfd_create recvfrom recvmsg sendto sendmsg socketpair shutdown \
    getsockopt setsockopt pidfd_send_signal";

/// To open them, and to make records.
const FILES: &str = "\
    open openat openat2 getdents64 unlink unlinkat rename renameat renameat2 link linkat mkdir \
    mkdirat fchown fchmod fchownat fchmodat geteuid getuid getegid getgid umask copy_file_range \
    getppid readahead landlock_create_ruleset landlock_add_rule landlock_restrict_self";

/// To start the process that opens an image, and what the loader of a program needs.
const PROCESSES: &str = "\
    execve execveat vfork fork wait4 waitid kill pidfd_open seccomp arch_prctl setrlimit setsid \
    setpgid pause chdir";

/// To notify the service manager, through a socket that is connected.
const NOTICES: &str = "\
    sendto sendmsg getsockopt setsockopt readlink readlinkat";

/// The end of the daemon: sockets lose their names, the service manager gets its last notice.
const ENDING: &str = "\
    sendto sendmsg recvfrom recvmsg shutdown getsockopt setsockopt stat lstat unlink unlinkat \
    pread64 pwrite64 fdatasync fsync wait4 kill readlink readlinkat getsockname";

/// What a frontend has passed may be asked for its file system before it is closed.
const CLOSING: &str = "\
    fstatfs shutdown epoll_ctl";

/// Calls that fail without ending the process, with this error.
type Refused = (libc::c_int, &'static [&'static str]);

/// The C library goes on: its memory allocator only looks at files below /proc and /sys.
const NO_FILES: Refused = (libc::EACCES, &["open", "openat", "openat2"]);

/// Its arguments cannot be looked at. Who gets this error uses clone, which starts threads only.
const NO_PROCESSES: Refused = (libc::ENOSYS, &["clone3"]);

/// The values that an argument of a call may have. With others it fails with an error, without
/// ending the process: libraries try what a kernel may not have.
pub(super) struct Limited {
    /// The name of the call.
    pub(super) name: &'static str,
    /// The limit holds only if this argument has this value.
    pub(super) when: Option<(u8, u32)>,
    /// Which argument, from 0.
    pub(super) argument: u8,
    /// What it may be.
    pub(super) values: Vec<u32>,
    /// The error.
    pub(super) errno: libc::c_int,
}

/// What is asked of any open file: whether it is a terminal, how much can be read, whether it waits
/// and whether programs inherit it.
const REQUESTS: [libc::Ioctl; 7] = [
    libc::TCGETS,
    libc::TCGETS2,
    libc::TIOCGWINSZ,
    libc::FIONREAD,
    libc::FIONBIO,
    libc::FIOCLEX,
    libc::FIONCLEX,
];

/// What is asked of block devices: read-only, sizes of blocks, the file behind a loop device.
const REQUESTS_TO_DEVICES: [libc::Ioctl; 4] = [BLKROGET, BLKSSZGET, BLKPBSZGET, LOOP_GET_STATUS64];

// linux/fs.h and linux/loop.h.
const BLKROGET: libc::Ioctl = rustix::ioctl::opcode::none(0x12, 94) as libc::Ioctl;
const BLKSSZGET: libc::Ioctl = rustix::ioctl::opcode::none(0x12, 104) as libc::Ioctl;
const BLKPBSZGET: libc::Ioctl = rustix::ioctl::opcode::none(0x12, 123) as libc::Ioctl;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;

/// Names of threads and of memory, and what only takes rights away.
const OPTIONS: [libc::c_int; 4] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_VMA,
];

/// The limits of the arguments of a kind of thread.
pub(super) fn limited(kind: ThreadKind) -> Vec<Limited> {
    // Of processes that are started, too: they end with the daemon, and dump no core.
    let (devices, options): (&[_], &[_]) = match kind {
        ThreadKind::Frontend
        | ThreadKind::Operator
        | ThreadKind::Images
        | ThreadKind::Log
        | ThreadKind::Watchdog
        | ThreadKind::Closing
        | ThreadKind::Main => (&[], &[]),
        ThreadKind::Worker => (&[], &[libc::PR_SET_PDEATHSIG]),
        ThreadKind::Spawner | ThreadKind::Opener => (
            &REQUESTS_TO_DEVICES,
            &[libc::PR_SET_PDEATHSIG, libc::PR_SET_DUMPABLE],
        ),
    };
    // The kernel looks at 32 bits of a request.
    #[allow(clippy::cast_possible_truncation)]
    let requests = REQUESTS
        .iter()
        .chain(devices)
        .map(|request| *request as u32);
    let options = OPTIONS.iter().chain(options);
    let dumpable = libc::PR_SET_DUMPABLE.cast_unsigned();
    vec![
        Limited {
            name: "ioctl",
            when: None,
            argument: 1,
            values: requests.collect(),
            errno: libc::ENOTTY,
        },
        Limited {
            name: "prctl",
            when: None,
            argument: 0,
            values: options.map(|option| option.cast_unsigned()).collect(),
            errno: libc::EINVAL,
        },
        Limited {
            name: "prctl",
            when: Some((0, dumpable)),
            argument: 1,
            values: vec![0],
            errno: libc::EINVAL,
        },
    ]
}

/// The calls that fail in a kind of thread.
pub(super) fn refused(kind: ThreadKind) -> &'static [Refused] {
    match kind {
        ThreadKind::Worker
        | ThreadKind::Operator
        | ThreadKind::Images
        | ThreadKind::Log
        | ThreadKind::Closing
        | ThreadKind::Main => &[NO_FILES, NO_PROCESSES],
        ThreadKind::Watchdog | ThreadKind::Frontend | ThreadKind::Opener => &[NO_PROCESSES],
        ThreadKind::Spawner => &[],
    }
}

/// The names of the calls of a kind of thread. Some may be unknown on this architecture.
pub(super) fn allowed(kind: ThreadKind) -> Vec<&'static str> {
    let groups: &[&str] = match kind {
        ThreadKind::Worker => &[ALL, OPERATIONS, NOTIFICATIONS, OPENING],
        ThreadKind::Frontend => &[
            ALL,
            CONNECTIONS,
            NOTIFICATIONS,
            SHARED_MEMORY,
            NAMES_OF_SOCKETS,
        ],
        ThreadKind::Operator => &[ALL, CONNECTIONS, NOTIFICATIONS, NAMES_OF_SOCKETS, OPENING],
        ThreadKind::Images => &[ALL, OPEN_FILES, NOTIFICATIONS, OPENING],
        ThreadKind::Spawner => &[ALL, OPEN_FILES, FILES, PROCESSES],
        ThreadKind::Opener => &[ALL, OPEN_FILES, FILES],
        ThreadKind::Log => &[ALL, OPENING],
        ThreadKind::Watchdog => &[ALL, OPENING, NOTICES],
        ThreadKind::Closing => &[ALL, CLOSING, NOTIFICATIONS, OPENING],
        ThreadKind::Main => &[ALL, ENDING, NOTIFICATIONS, OPENING],
    };
    let names = groups.iter().flat_map(|group| group.split_whitespace());
    names.collect()
}
