//! What is forbidden fails. Each act is tried by a process of its own: this binary runs itself once
//! more, gives up what the environment says, and tries.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::set_dumpable_behavior;
use rustix::process::{DumpableBehavior, Resource, dumpable_behavior, getrlimit};
use testkit::HANG_LIMIT;
use testkit::process::Process;

use super::*;

/// Set for a process that is to try an act: its name, and a directory.
const VARIABLE: &str = "QUORUM_BLK_TEST_SANDBOX";

/// Set for a process that is to make a call: its place in [`CALLS`].
const VARIABLE_OF_CALLS: &str = "QUORUM_BLK_TEST_CALL";

/// Set for a process that is to make a call while a line waits to be written.
const VARIABLE_OF_LOG: &str = "QUORUM_BLK_TEST_LOG";

/// Set for a process that is to try arguments: a kind of thread.
const VARIABLE_OF_ARGUMENTS: &str = "QUORUM_BLK_TEST_ARGUMENTS";

/// Set for a process that is to be as one that opens an image.
const VARIABLE_OF_OPENER: &str = "QUORUM_BLK_TEST_OPENER";

/// What a process tries when it has given up all but the directory.
type Act = (&'static str, fn(&Path));

const ACTS: [Act; 8] = [
    ("files", files),
    ("places", places),
    ("network", network),
    ("abstract sockets", abstract_sockets),
    ("core dumps", core_dumps),
    ("capabilities", capabilities),
    ("programs", programs),
    ("another user", another_user),
];

/// Files in the directory can be used, as images and records are; others cannot even be read.
fn files(directory: &Path) {
    let inside = directory.join("inside");
    let file = File::create(&inside).unwrap();
    file.set_len(4096).unwrap();
    fs::rename(&inside, directory.join("renamed")).unwrap();
    fs::remove_file(directory.join("renamed")).unwrap();
    fs::read_dir(directory).unwrap();
    for outside in ["/etc/passwd", "/etc", "/root"] {
        let opened = File::open(outside).unwrap_err();
        assert_eq!(opened.kind(), ErrorKind::PermissionDenied, "{outside}");
    }
    let outside = env::temp_dir().join("quorum-blk-sandbox");
    let made = File::create(&outside).unwrap_err();
    assert_eq!(made.kind(), ErrorKind::PermissionDenied);
    let read = fs::read("/proc/self/status");
    read.expect("what may be read");
    let written = fs::write("/proc/self/comm", "x").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::PermissionDenied);
}

/// What only names of sockets are removed from.
fn places(directory: &Path) {
    let sockets = directory.parent().unwrap().join("sockets");
    let opened = File::open(sockets.join("socket")).unwrap_err();
    assert_eq!(opened.kind(), ErrorKind::PermissionDenied);
    let made = UnixListener::bind(sockets.join("new")).unwrap_err();
    assert_eq!(made.kind(), ErrorKind::PermissionDenied);
    fs::remove_file(sockets.join("socket")).unwrap();
}

fn network(_: &Path) {
    let bound = TcpListener::bind("127.0.0.1:0").unwrap_err();
    assert_eq!(bound.kind(), ErrorKind::PermissionDenied);
    let connected = TcpStream::connect("127.0.0.1:1").unwrap_err();
    assert_eq!(connected.kind(), ErrorKind::PermissionDenied);
}

fn abstract_sockets(directory: &Path) {
    let address = SocketAddr::from_abstract_name(directory.as_os_str().as_encoded_bytes()).unwrap();
    let connected = UnixStream::connect_addr(&address).unwrap_err();
    assert_eq!(connected.kind(), ErrorKind::PermissionDenied);
}

fn core_dumps(_: &Path) {
    assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
    assert_eq!(dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
}

fn capabilities(directory: &Path) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    // That to lock memory may stay, until a thread enters its kind.
    let may_be = ["\t0000000000000000", "\t0000000000004000"];
    let sets = status.lines().filter(|line| line.starts_with("Cap"));
    let sets: Vec<&str> = sets
        .filter(|line| !may_be.iter().any(|value| line.ends_with(value)))
        .collect();
    assert!(sets.is_empty(), "{sets:?}");
    let file = File::create(directory.join("owned")).unwrap();
    let given = std::os::unix::fs::fchown(&file, Some(12345), None).unwrap_err();
    assert_eq!(given.kind(), ErrorKind::PermissionDenied);
}

/// Those that are not named cannot be started, and none gains a right.
fn programs(_: &Path) {
    assert!(rustix::thread::no_new_privs().unwrap());
    let started = Command::new("/bin/true").spawn().unwrap_err();
    assert_eq!(started.kind(), ErrorKind::PermissionDenied);
}

fn another_user(_: &Path) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    for line in [
        "Uid:\t1234\t1234\t1234\t1234",
        "Gid:\t5678\t5678\t5678\t5678",
    ] {
        assert!(status.contains(line), "{status}");
    }
    assert!(status.contains("Groups:\t7 8 \n"), "{status}");
}

/// Does nothing in the ordinary run of the tests.
#[test]
fn an_act_is_tried_if_the_environment_says_so() {
    let Ok(given) = env::var(VARIABLE) else {
        return;
    };
    let (name, directory) = given.split_once('=').unwrap();
    let directory = PathBuf::from(directory);
    let user = (name == "another user").then(|| User {
        name: "1234".to_owned(),
        uid: 1234,
        gid: 5678,
        groups: vec![7, 8],
    });
    let beneath = |path: PathBuf, access| Beneath { path, access };
    let sandbox = Sandbox {
        mode: Mode::On,
        user,
        files: vec![
            beneath(directory.clone(), Access::Write),
            beneath(directory.parent().unwrap().join("sockets"), Access::Remove),
            beneath("/proc".into(), Access::Read),
            beneath("/none".into(), Access::Write),
        ],
    };
    // The test harness has a thread of its own; a process that was forked has one.
    // SAFETY: no other thread of this process holds a lock: the harness waits.
    let child = unsafe { libc::fork() };
    if child > 0 {
        let mut status = 0;
        // SAFETY: the status is valid for the write.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        println!("ended: {status:#x}");
        return;
    }
    sandbox.begin().unwrap().finish().unwrap();
    let (_, act) = ACTS.iter().find(|(act, _)| *act == name).unwrap();
    act(&directory);
    println!("done: {name}");
    std::process::exit(0);
}

#[test]
fn what_is_forbidden_fails() {
    let lacking: Vec<_> = Part::ALL.into_iter().filter_map(Part::lack).collect();
    assert!(lacking.is_empty(), "not on this machine: {lacking:?}");
    for (name, _) in ACTS {
        let place = tempfile::tempdir().unwrap();
        let [directory, sockets] = ["images", "sockets"].map(|name| place.path().join(name));
        fs::create_dir(&directory).unwrap();
        fs::create_dir(&sockets).unwrap();
        let _named = UnixListener::bind(sockets.join("socket")).unwrap();
        let address = directory.as_os_str().as_encoded_bytes();
        let address = SocketAddr::from_abstract_name(address).unwrap();
        let _abstract = UnixListener::bind_addr(&address).unwrap();
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("sandbox::tests::an_act_is_tried_if_the_environment_says_so")
            .env(VARIABLE, format!("{name}={}", directory.display()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(&format!("done: {name}")), "{text}{errors}");
    }
}

/// A call that a kind of thread does not have, and its name.
type Call = (&'static str, ThreadKind, fn());

const CALLS: [Call; 17] = [
    ("ptrace", ThreadKind::Worker, || {
        raw(libc::SYS_ptrace, [0; 3])
    }),
    ("socket", ThreadKind::Worker, || {
        raw(libc::SYS_socket, [1, 1, 0])
    }),
    ("accept4", ThreadKind::Images, || {
        raw(libc::SYS_accept4, [0; 3])
    }),
    ("socket", ThreadKind::Frontend, || {
        raw(libc::SYS_socket, [1, 1, 0])
    }),
    ("connect", ThreadKind::Watchdog, || {
        raw(libc::SYS_connect, [0; 3])
    }),
    ("socketpair", ThreadKind::Images, || {
        raw(libc::SYS_socketpair, [1, 2, 0])
    }),
    ("tgkill", ThreadKind::Worker, || {
        raw(libc::SYS_tgkill, [1, 1, 0])
    }),
    ("kill", ThreadKind::Main, || raw(libc::SYS_kill, [1, 0, 0])),
    ("execve", ThreadKind::Frontend, || {
        raw(libc::SYS_execve, [0; 3])
    }),
    ("io_uring_setup", ThreadKind::Worker, || {
        raw(libc::SYS_io_uring_setup, [0; 3])
    }),
    ("mprotect", ThreadKind::Operator, || {
        raw(libc::SYS_mprotect, [0, 4096, 4])
    }),
    ("execve", ThreadKind::Images, || {
        raw(libc::SYS_execve, [0; 3])
    }),
    ("ptrace", ThreadKind::Spawner, || {
        raw(libc::SYS_ptrace, [0; 3])
    }),
    ("execve", ThreadKind::Opener, || {
        raw(libc::SYS_execve, [0; 3])
    }),
    ("clone", ThreadKind::Main, || {
        raw(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0])
    }),
    ("socket", ThreadKind::Closing, || {
        raw(libc::SYS_socket, [1, 1, 0])
    }),
    ("prlimit64", ThreadKind::Worker, || {
        raw(libc::SYS_prlimit64, [0, 0, 1])
    }),
];

fn raw(number: libc::c_long, arguments: [libc::c_long; 3]) {
    let [first, second, third] = arguments;
    // SAFETY: the call does not return, or fails: its pointers are null.
    unsafe { libc::syscall(number, first, second, third, 0, 0, 0) };
}

/// Does nothing in the ordinary run of the tests.
#[test]
fn a_call_is_made_if_the_environment_says_so() {
    let index = env::var(VARIABLE_OF_CALLS).ok();
    let Some(index) = index.and_then(|index| index.parse::<usize>().ok()) else {
        return;
    };
    let (_, kind, call) = CALLS[index];
    enter_as_a_process(kind);
    if env::var_os(VARIABLE_OF_LOG).is_some() {
        set_log_pending(true);
        std::thread::spawn(|| {
            // Longer than the other thread needs for its line, if it does not wait.
            std::thread::sleep(Duration::from_millis(50));
            eprintln!("what was logged before");
            set_log_pending(false);
        });
    }
    // What every kind may do.
    std::thread::spawn(|| vec![1_u8; 1 << 20]).join().unwrap();
    call();
    println!("it returned");
}

fn enter_as_a_process(kind: ThreadKind) {
    if kind == ThreadKind::Opener {
        enter_process(ThreadKind::Opener, Some(&std::io::stdin())).unwrap();
        return;
    }
    filter::prepare(&[kind]).unwrap();
    enter(kind);
}

/// A process that makes a call.
fn calling(index: usize) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture"])
        .arg("sandbox::tests::a_call_is_made_if_the_environment_says_so")
        .env(VARIABLE_OF_CALLS, index.to_string());
    command
}

const STATUS: i32 = 128 + libc::SIGSYS;

#[test]
fn calls_that_are_not_listed_end_the_process_with_a_line() {
    let calls = CALLS.iter().enumerate();
    for (index, (name, kind, _)) in calls.filter(|(_, (_, kind, _))| *kind != ThreadKind::Opener) {
        let output = calling(index).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        let line = format!("quorum-blkd: the sandbox does not allow the system call {name} (");
        assert!(errors.starts_with(&line), "{kind:?} {name}: {errors}");
        assert!(
            errors.contains(" in the thread sandbox::tests:"),
            "{errors}"
        );
        assert_eq!(output.status.code(), Some(STATUS), "{errors}");
    }
}

#[test]
fn the_line_follows_what_was_logged_before() {
    let output = calling(0).env(VARIABLE_OF_LOG, "").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = errors.lines().collect();
    assert_eq!(lines.len(), 2, "{errors}");
    assert_eq!(lines[0], "what was logged before");
    assert_eq!(output.status.code(), Some(STATUS));
}

#[test]
fn a_process_whose_stderr_is_not_read_ends() {
    let (_reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let shared = writer.try_clone().unwrap();
    let mut process = Process::spawn(calling(0).stderr(writer)).unwrap();
    let status = process.wait_within(HANG_LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(STATUS));
    let flags = rustix::fs::fcntl_getfl(&shared).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "{flags:?}");
}

#[test]
fn a_process_that_opens_an_image_names_a_call_to_the_daemon() {
    let is_of_opener = |call: &&Call| call.1 == ThreadKind::Opener;
    let index = CALLS.iter().position(|call| is_of_opener(&call)).unwrap();
    let (socket, its_end) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let output = calling(index)
        .stdin(std::os::fd::OwnedFd::from(its_end))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(STATUS));
    assert!(output.stderr.is_empty(), "it goes to the daemon");
    let mut message = [0; 512];
    let len = socket.recv(&mut message).unwrap();
    let said = violation(&message[..len]).expect("it is of a violation");
    let beginning = "the sandbox does not allow the system call execve (";
    assert!(said.starts_with(beginning), "{said}");
}

/// Does nothing in the ordinary run of the tests.
#[test]
fn arguments_are_tried_if_the_environment_says_so() {
    let Ok(name) = env::var(VARIABLE_OF_ARGUMENTS) else {
        return;
    };
    let kinds = KINDS.into_iter().chain([ThreadKind::Opener]);
    let kind = kinds.into_iter().find(|kind| format!("{kind:?}") == name);
    let (socket, _peer) = UnixStream::pair().unwrap();
    enter_as_a_process(kind.unwrap());
    let errno = |result: libc::c_int| match result {
        0 => 0,
        _ => std::io::Error::last_os_error().raw_os_error().unwrap(),
    };
    let file = std::os::fd::AsRawFd::as_raw_fd(&socket);
    let mut number: libc::c_int = 0;
    // SAFETY: the number is valid for the writes of all of these.
    let mut asked = |request| errno(unsafe { libc::ioctl(file, request, &raw mut number) });
    for request in [libc::FIONREAD, libc::FIONBIO, libc::FIOCLEX] {
        assert_eq!(asked(request), 0, "{request:#x}");
    }
    // The kernel has these, but the last one, for sockets.
    for request in [libc::TIOCOUTQ, libc::FIOASYNC, libc::TIOCSTI] {
        assert_eq!(asked(request), libc::ENOTTY, "{request:#x}");
    }
    let set = |option, value: libc::c_ulong| {
        // SAFETY: these options take a number.
        errno(unsafe { libc::prctl(option, value, 0, 0, 0) })
    };
    assert_eq!(set(libc::PR_SET_NO_NEW_PRIVS, 1), 0);
    for option in [libc::PR_SET_KEEPCAPS, libc::PR_SET_CHILD_SUBREAPER] {
        assert_eq!(set(option, 1), libc::EINVAL, "{option}");
    }
    assert_eq!(set(libc::PR_SET_DUMPABLE, 1), libc::EINVAL);
    // Processes that are started do this.
    let starts = matches!(kind, Some(ThreadKind::Spawner | ThreadKind::Opener));
    let expected = if starts { 0 } else { libc::EINVAL };
    assert_eq!(set(libc::PR_SET_DUMPABLE, 0), expected);
    println!("done: {name}");
}

#[test]
fn arguments_that_are_not_listed_are_errors() {
    for kind in KINDS.into_iter().chain([ThreadKind::Opener]) {
        let name = format!("{kind:?}");
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("sandbox::tests::arguments_are_tried_if_the_environment_says_so")
            .env(VARIABLE_OF_ARGUMENTS, &name)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(&format!("done: {name}")), "{text}{errors}");
    }
}

/// Does nothing in the ordinary run of the tests.
#[test]
fn a_process_opens_an_image_if_the_environment_says_so() {
    if env::var_os(VARIABLE_OF_OPENER).is_none() {
        return;
    }
    set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    // Another thread can still ask.
    let (entered, has_entered) = std::sync::mpsc::channel();
    let asking = std::thread::spawn(move || {
        has_entered.recv().unwrap();
        core_dumps(Path::new(""));
    });
    enter_process(ThreadKind::Opener, Some(&std::io::stdin())).unwrap();
    entered.send(()).unwrap();
    asking.join().unwrap();
    println!("done");
}

#[test]
fn a_process_that_opens_an_image_dumps_no_core() {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("sandbox::tests::a_process_opens_an_image_if_the_environment_says_so")
        .env(VARIABLE_OF_OPENER, "")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("done"), "{text}{errors}");
}

/// On this architecture; others lack some of them.
#[cfg(target_arch = "x86_64")]
#[test]
fn names_of_calls_are_known() {
    use std::str::FromStr as _;
    let kinds = KINDS
        .into_iter()
        .chain([ThreadKind::Spawner, ThreadKind::Opener]);
    for name in kinds.flat_map(system_calls::allowed) {
        assert!(syscalls::Sysno::from_str(name).is_ok(), "{name}");
    }
}

#[test]
fn a_process_of_several_threads_is_left_alone() {
    let (wait, waits) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || waits.recv());
    let sandbox = Sandbox {
        mode: Mode::Auto,
        user: None,
        files: Vec::new(),
    };
    assert!(matches!(sandbox.begin(), Err(SandboxError::NotAlone(count)) if count > 1));
    assert_eq!(rustix::thread::no_new_privs(), Ok(false));
    drop(wait);
    assert!(other.join().unwrap().is_err());
}
