//! `quorum-blkd` as a process, and a reader of its events.

use crate::HANG_LIMIT;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Process, wait_until};
use crate::programs;

/// A running daemon. What it wrote to stderr is shown when the test fails; it is killed when
/// dropped.
pub struct Daemon {
    process: Process,
    arguments: Vec<OsString>,
    socket: PathBuf,
    events_socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts the daemon with `arguments` and its sockets in `directory` (`disk.sock`,
    /// `events.sock`), and waits until both are there. Its stderr goes to `daemon.log` in the
    /// same place.
    ///
    /// Unless the arguments say what is remembered, nothing is: most tests change images behind the
    /// back of the daemon, and start from what the images hold. If QUORUM_BLK_TEST_STATE is
    /// `records`, it is as with [`Self::start_with_records`].
    pub fn start(directory: &Path, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let wanted = std::env::var_os("QUORUM_BLK_TEST_STATE");
        let mut arguments: Vec<OsString> = owned(arguments);
        let is_said = arguments.iter().any(|argument| argument == "--state");
        if wanted.is_some_and(|wanted| wanted == "records") && !is_said {
            return Self::start_with_records(directory, arguments);
        }
        if !is_said {
            arguments.extend(["--state".into(), "none".into()]);
        }
        Self::start_as_told(directory, arguments)
    }

    /// The same with records, as the daemon is usually run. They are in `directory` where they
    /// cannot be beside their images.
    pub fn start_with_records(
        directory: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Self {
        let state = directory.join("state");
        let _ = fs::create_dir(&state);
        let mut arguments: Vec<OsString> = owned(arguments);
        arguments.extend(["--state-dir".into(), state.into()]);
        Self::start_as_told(directory, arguments)
    }

    fn start_as_told(directory: &Path, arguments: Vec<OsString>) -> Self {
        match Self::try_start(directory, arguments) {
            Ok(daemon) => daemon,
            Err(refused) => panic!("the daemon ended at once: {refused}"),
        }
    }

    /// Starts the daemon as [`Self::start`] does, with these arguments only.
    ///
    /// # Errors
    /// If it ends at once, what it wrote to stderr, and its exit status.
    pub fn try_start(
        directory: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Self, String> {
        let socket = directory.join("disk.sock");
        let events_socket = directory.join("events.sock");
        let log = directory.join("daemon.log");
        let mut all: Vec<OsString> = vec!["--socket-path".into(), socket.clone().into()];
        all.extend(["--events".into(), events_socket.clone().into()]);
        all.extend(owned(arguments));
        if !all.iter().any(|argument| argument == "--sandbox") {
            let is_reopened = !all.iter().any(|argument| argument == "none");
            let sandbox = match is_reopened && all.iter().any(|name| is_in_no_directory(name)) {
                true => "off",
                false => sandbox(),
            };
            all.extend(["--sandbox".into(), sandbox.into()]);
        }
        let mut daemon = Self {
            process: Self::spawn(&all, &log),
            arguments: all,
            socket,
            events_socket,
            log,
        };
        let is_ready = wait_until(HANG_LIMIT, || {
            let has_ended = !daemon.process.is_alive();
            has_ended || daemon.socket.exists() && daemon.events_socket.exists()
        });
        assert!(is_ready, "the daemon made no sockets within {HANG_LIMIT:?}");
        match daemon.process.exit_status() {
            Some(status) => Err(format!("{}{status}", daemon.log())),
            None => Ok(daemon),
        }
    }

    fn spawn(arguments: &[OsString], log: &Path) -> Process {
        let log = OpenOptions::new().create(true).append(true).open(log);
        let log = log.expect("opening the daemon's log");
        let mut command = Self::command();
        command.args(arguments);
        let streams = |command: &mut Command| {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log);
        };
        Process::spawn_light(&command, streams).expect("starting the daemon")
    }

    /// Starts it once more, with the same arguments, when it has ended. Does not wait for anything:
    /// one that was killed has left its sockets behind, and they are not those of the next
    /// until it has made them.
    pub fn start_again(&mut self) {
        assert!(!self.process.is_alive(), "the daemon is still there");
        self.process = Self::spawn(&self.arguments, &self.log);
    }

    /// Runs the daemon with `arguments` only, for a start that ends by itself: a refusal, `--help`.
    pub fn run_to_end(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
        let mut command = Self::command();
        command.args(arguments).stdin(Stdio::null());
        let directory = tempfile::tempdir().expect("creating a directory");
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| directory.path().join(name));
        command
            .stdout(File::create(&stdout).expect("creating a file for stdout"))
            .stderr(File::create(&stderr).expect("creating a file for stderr"));
        let mut process = Process::spawn(&mut command).expect("starting the daemon");
        let status = process.wait_within(HANG_LIMIT);
        Output {
            status: status.expect("the daemon went on running"),
            stdout: fs::read(stdout).expect("reading stdout"),
            stderr: fs::read(stderr).expect("reading stderr"),
        }
    }

    fn command() -> Command {
        programs::command(programs::DAEMON)
    }

    /// The socket for the frontend.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The socket for readers of events.
    pub fn events_socket(&self) -> &Path {
        &self.events_socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Is it still running?
    pub fn is_alive(&mut self) -> bool {
        self.process.is_alive()
    }

    /// What it wrote to stderr so far: all lines about what has been seen of it already.
    pub fn log(&self) -> String {
        wait_until(HANG_LIMIT, || !self.is_logging());
        let bytes = fs::read(&self.log).expect("reading the daemon's log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the thread that writes the log works.
    fn is_logging(&self) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.id())) else {
            return false;
        };
        let stats =
            tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
        // "ID (NAME) STATE ...", proc_pid_stat(5): running, or waiting for a disk.
        let mut states = stats.filter_map(|stat| Some(stat.split_once(" (log) ")?.1.to_owned()));
        states.any(|state| state.starts_with(['R', 'D']))
    }

    /// Waits until it has compared the images, as it does first with `--rewrite-corrupted`.
    pub fn wait_until_compared(&self) {
        let is_compared = || self.log().contains("job completed");
        assert!(wait_until(HANG_LIMIT, is_compared), "{}", self.log());
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self) -> ExitStatus {
        self.process.signal(libc::SIGTERM);
        self.wait()
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: libc::c_int) {
        self.process.signal(signal);
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.process.wait_within(HANG_LIMIT);
        status.unwrap_or_else(|| panic!("the daemon is still there after {HANG_LIMIT:?}"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("--- the daemon's stderr\n{}---", self.log());
        }
    }
}

/// Whether an argument names an image that is reached through a descriptor of another process, as
/// those of [`FuseImage`] are: without capabilities it cannot be opened again, as a daemon with
/// records does when it was missing.
///
/// [`FuseImage`]: crate::fuse::FuseImage
fn is_in_no_directory(argument: &OsStr) -> bool {
    let text = argument.to_string_lossy();
    let path = Path::new(text.split(',').next().unwrap_or_default());
    let leads_to = fs::read_link(path);
    path.starts_with("/proc") || leads_to.is_ok_and(|path| path.starts_with("/proc"))
}

/// The sandbox of a daemon whose arguments do not say it. A part that this machine has must not be
/// missing silently.
fn sandbox() -> &'static str {
    static IS_COMPLETE: OnceLock<bool> = OnceLock::new();
    let is_complete = IS_COMPLETE.get_or_init(|| {
        let printed = Daemon::run_to_end(["--print-sandbox"]).stdout;
        let printed = String::from_utf8_lossy(&printed).into_owned();
        assert!(printed.contains("core-dumps"), "{printed}");
        printed
            .lines()
            .all(|line| line.split_whitespace().nth(1) != Some("missing"))
    });
    if *is_complete { "on" } else { "auto" }
}

fn owned(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<OsString> {
    let arguments = arguments.into_iter();
    arguments
        .map(|argument| argument.as_ref().to_owned())
        .collect()
}

/// The arguments that name these images as replicas, in order.
pub fn replica_arguments(images: &[PathBuf]) -> Vec<OsString> {
    images
        .iter()
        .flat_map(|image| ["--blk-file".into(), image.into()])
        .collect()
}

/// Reads events from a daemon's event socket, from now on and in the background.
pub struct EventReader {
    stream: UnixStream,
    collected: Arc<Collected>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Collected {
    stream: Mutex<Received>,
    changed: Condvar,
}

#[derive(Default)]
struct Received {
    events: Vec<Value>,
    /// The daemon has closed the connection.
    is_closed: bool,
}

impl Collected {
    fn lock(&self) -> MutexGuard<'_, Received> {
        self.stream.lock().expect("the reader of events panicked")
    }
}

impl EventReader {
    /// Connects to the socket.
    pub fn connect(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).expect("connecting to the event socket"))
    }

    /// Reads from a connection.
    pub fn over(stream: UnixStream) -> Self {
        let lines = BufReader::new(stream.try_clone().expect("duplicating a socket")).lines();
        let collected = Arc::<Collected>::default();
        let thread = thread::spawn({
            let collected = Arc::clone(&collected);
            move || {
                for line in lines.map_while(Result::ok) {
                    let event = serde_json::from_str(&line)
                        .unwrap_or_else(|error| panic!("not an event ({error}): {line}"));
                    collected.lock().events.push(event);
                    collected.changed.notify_all();
                }
                collected.lock().is_closed = true;
                collected.changed.notify_all();
            }
        });
        Self {
            stream,
            collected,
            thread: Some(thread),
        }
    }

    /// All events so far, in the order they came.
    pub fn all(&self) -> Vec<Value> {
        self.collected.lock().events.clone()
    }

    /// As [`Self::all_until_closed`], without the events of jobs: a new disk is scrubbed first.
    pub fn all_but_jobs(&self) -> Vec<Value> {
        let mut events = self.all_until_closed();
        events.retain(|event| {
            let name = event["event"].as_str().expect("an event has a name");
            !name.contains("JOB")
        });
        events
    }

    /// All events, when the daemon has closed the connection. It does so after the last event.
    pub fn all_until_closed(&self) -> Vec<Value> {
        let is_open = |received: &mut Received| !received.is_closed;
        let changed = &self.collected.changed;
        let waited = changed.wait_timeout_while(self.collected.lock(), HANG_LIMIT, is_open);
        let (received, waited) = waited.expect("the reader of events panicked");
        assert!(
            !waited.timed_out(),
            "the event socket is still open after {HANG_LIMIT:?}"
        );
        received.events.clone()
    }

    /// The first event, of those that came and those that come within `limit`, that `is_wanted`.
    pub fn wait_for(
        &self,
        mut is_wanted: impl FnMut(&Value) -> bool,
        limit: Duration,
    ) -> Option<Value> {
        let deadline = Instant::now() + limit;
        let mut received = self.collected.lock();
        let mut seen = 0;
        loop {
            let new = &received.events[seen..];
            if let Some(event) = new.iter().find(|event| is_wanted(event)) {
                return Some(event.clone());
            }
            seen = received.events.len();
            let remaining = deadline.checked_duration_since(Instant::now())?;
            received = self
                .collected
                .changed
                .wait_timeout(received, remaining)
                .expect("the reader of events panicked")
                .0;
        }
    }
}

impl Drop for EventReader {
    fn drop(&mut self) {
        // Ends the thread; fails only if the daemon has closed the connection already.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !thread::panicking() {
                result.expect("the reader of events panicked");
            }
        }
    }
}
