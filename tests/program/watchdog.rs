//! A thread that hangs ends the process; the service manager hears from one that does not.

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::process::{Process, wait_until};
use testkit::programs;

/// `__WALL`, waitpid(2).
const WAIT_ALL: libc::c_int = 0x4000_0000;

/// How long a stopped thread is given to end the process, which takes a minute on a machine that is
/// not busy. It may have been stopped on its way into a system call, where it is idle: then it is
/// stopped again.
const END_LIMIT: Duration = Duration::from_secs(100);

/// A thread that this one stops, and no other thread of its process.
struct Traced {
    process: u32,
    thread: libc::pid_t,
}

impl Traced {
    fn new(process: u32, thread: libc::pid_t) -> Self {
        let traced = Self { process, thread };
        traced.request(libc::PTRACE_SEIZE);
        traced
    }

    fn request(&self, request: libc::c_uint) {
        // SAFETY: the requests read and write no memory of this process.
        let result = unsafe { libc::ptrace(request, self.thread, 0_usize, 0_usize) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Stops it while it does not wait in the kernel.
    fn stop(&self) {
        loop {
            self.request(libc::PTRACE_INTERRUPT);
            let mut status = 0;
            // SAFETY: `status` is valid for the write.
            let waited = unsafe { libc::waitpid(self.thread, &raw mut status, WAIT_ALL) };
            assert!(waited == self.thread && libc::WIFSTOPPED(status));
            // Outside of a system call its number is -1.
            let (process, thread) = (self.process, self.thread);
            let call = fs::read_to_string(format!("/proc/{process}/task/{thread}/syscall"));
            if call.unwrap().starts_with("-1") {
                return;
            }
            self.request(libc::PTRACE_CONT);
        }
    }

    /// Whether it has ended; the end of the process waits for this question.
    fn has_ended(&self) -> bool {
        let (thread, mut status) = (self.thread, 0);
        // SAFETY: `status` is valid for the write.
        let waited = unsafe { libc::waitpid(thread, &raw mut status, WAIT_ALL | libc::WNOHANG) };
        waited == -1 || waited == thread && !libc::WIFSTOPPED(status)
    }
}

/// The thread of a process that has this name.
fn thread_named(process: u32, name: &str) -> libc::pid_t {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let mut ids = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let has_name = |id: &String| {
        let found = fs::read_to_string(format!("/proc/{process}/task/{id}/comm"));
        found.is_ok_and(|found| found.trim_end() == name)
    };
    ids.find(has_name).unwrap().parse().unwrap()
}

/// It takes as long as the limit of the daemon, about a minute.
#[test]
fn a_worker_that_hangs_ends_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = replica_arguments(&create_images(directory.path(), 3, 1 << 20));
    arguments.extend(["--replica-timeout", "100", "--num-queues", "1"].map(OsString::from));
    let mut daemon = Daemon::start(directory.path(), arguments);
    let socket = daemon.socket().to_owned();
    let ((is_served, served), (end, ended)) = (channel(), channel::<()>());
    let is_stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        let (socket, is_stopped) = (&socket, &is_stopped);
        scope.spawn(move || {
            let mut client = Client::connect(socket, 1);
            let read = [Request::Read {
                offset: 0,
                memory: 0,
                len: 512,
            }];
            client.run(0, &read)[0].unwrap();
            is_served.send(()).unwrap();
            // The last one is never answered.
            client.send(0, &read);
            while !is_stopped.load(Ordering::Relaxed) {
                if !client.poll(0, 0).is_empty() {
                    client.send(0, &read);
                }
            }
            // The client waits for the worker at its end.
            let _ = ended.recv();
        });
        served.recv().unwrap();
        let worker = Traced::new(daemon.id(), thread_named(daemon.id(), "worker-0"));
        let is_ended = (0..4).any(|attempt| {
            if attempt > 0 {
                worker.request(libc::PTRACE_CONT);
            }
            worker.stop();
            wait_until(END_LIMIT, || worker.has_ended())
        });
        if !is_ended {
            daemon.signal(libc::SIGKILL);
            wait_until(HANG_LIMIT, || worker.has_ended());
        }
        is_stopped.store(true, Ordering::Relaxed);
        drop(end);
        assert!(is_ended, "{}", daemon.log());
    });
    assert_eq!(daemon.wait().signal(), Some(libc::SIGABRT));
    let line = "a thread hangs: the process aborts thread=worker-0 seconds=";
    assert!(daemon.log().contains(line), "{}", daemon.log());
}

#[test]
fn the_service_manager_hears_from_a_daemon_whose_threads_turn() {
    let directory = tempfile::tempdir().unwrap();
    let notices = UnixDatagram::bind(directory.path().join("notify.sock")).unwrap();
    notices.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    let mut command = programs::command(programs::DAEMON);
    command
        .args(["--state", "none", "--socket-path"])
        .arg(directory.path().join("disk.sock"))
        .args(replica_arguments(&create_images(
            directory.path(),
            3,
            1 << 20,
        )))
        .env("NOTIFY_SOCKET", directory.path().join("notify.sock"))
        .env("WATCHDOG_USEC", "600000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = Process::spawn(&mut command).unwrap();
    let next = || {
        let mut notice = [0; 4096];
        let bytes = notices.recv(&mut notice).expect("a notice");
        String::from_utf8_lossy(&notice[..bytes]).into_owned()
    };
    let mut heard = 0;
    while heard < 3 {
        heard += usize::from(next().lines().any(|line| line == "WATCHDOG=1"));
    }
    process.signal(libc::SIGTERM);
    assert!(process.wait_within(HANG_LIMIT).unwrap().success());
}
