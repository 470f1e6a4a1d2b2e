//! A process for each image that is being opened (O3).
//!
//! A file system may never answer: a network that is down, a FUSE server that hangs. A thread that
//! waits for it cannot be ended, and keeps its whole process from ending. So the daemon starts a
//! process of its own program for each image, which makes the system calls (`examine.rs`) and sends
//! the open file through a socket. If its answer does not come in time, the daemon goes on without
//! it; the process is killed, and ends when the file system answers, if its system call cannot be
//! interrupted.
//!
//! Not fork(2) alone: the pages of a process that forks must not be the target of direct I/O.
//!
//! Invariants: the process has no other file of the daemon open, so it keeps no other image locked;
//! it holds the image only as long as the daemon's end of the socket is open.

#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::process::{
    PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use rustix::thread::set_name;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::alignment::{ALIGNMENT_BYTES_MIN, Alignment};
use super::contents::Contents;
use super::descriptors::close_inherited;
use super::examine::{Facts, Fault, Image, Locked, alignment, claim, lock, open_again};
use super::format::Format;
use super::look::{Look, Seen, look};
use super::messages::{is_readable, pair, receive, send};
use super::{OpenOptions, spawner};
use crate::common::NOT_POISONED;
use crate::replica::record_file::{Keeper, RecordAnswer, RecordOrder, StateDirectory};
use crate::sandbox::{self, Access, Beneath, ThreadKind};

/// The program of this process.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";

/// The first argument of a process that opens an image.
const ARGUMENT: &str = "--open-image";
const READ_ONLY: &str = "read-only";
const READ_WRITE: &str = "read-write";
const DIRECT: &str = "direct";
const CACHED: &str = "cached";
const FILTERED: &str = "filtered";
const UNFILTERED: &str = "unfiltered";
const CONFINED: &str = "confined";
const UNCONFINED: &str = "unconfined";
const NO_STATE: &str = "no-state";
const GIVEN_STATE: &str = "given-state";
const USUAL_STATE: &str = "usual-state";

/// How long an image may be silent before that is logged.
const SILENCE_LOGGED_AFTER: Duration = Duration::from_secs(2);

/// The images of processes that were killed since they did not answer, each with the pidfd.
static KILLED: Mutex<Vec<(PathBuf, OwnedFd)>> = Mutex::new(Vec::new());

/// How many processes that were to open this image were killed and have not ended: they wait for
/// its file system.
pub fn waiting_for(image: &Path) -> usize {
    let killed = killed();
    killed.iter().filter(|(path, _)| path == image).count()
}

fn killed() -> MutexGuard<'static, Vec<(PathBuf, OwnedFd)>> {
    let mut killed = KILLED.lock().expect(NOT_POISONED);
    let now = Instant::now();
    // A pidfd can be read when its process has ended.
    killed.retain(|(_, process)| matches!(is_readable(process, now), Ok(false)));
    killed
}

/// What the daemon asks of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    FindAlignment,
    FindFormat,
    FindContents(u64),
    GlanceAtContents(u64),
    Claim,
    Lock,
    OpenAgain,
    Look(Look),
    /// What is to be written comes in a file with the order.
    Record(RecordOrder),
}

/// What comes first: the process is there, and its pidfd comes with this; or why it is not, an
/// errno.
pub(super) type Started = Result<(), i32>;

/// An answer of the process. The first one, after [`Started`], carries the open file.
pub(super) type Answer<T> = Result<T, Fault>;

/// Why there is no answer.
#[derive(Debug)]
pub(in crate::replica) enum NoAnswer {
    /// The system calls have not returned in time.
    Silent,
    /// The process ended or sent something invalid.
    Ended(io::Error),
}

impl From<io::Error> for NoAnswer {
    fn from(error: io::Error) -> Self {
        Self::Ended(error)
    }
}

/// A process that opens an image. It is killed when this is dropped before the image is open.
#[derive(Debug)]
pub(in crate::replica) struct Opener {
    path: PathBuf,
    socket: OwnedFd,
    /// It has sent [`Started`].
    has_started: bool,
    /// Its pidfd, when it has started. `None` in a test that has a thread follow the orders.
    process: Option<OwnedFd>,
    /// Its end of the socket is closed: its process id may belong to another process.
    has_ended: bool,
    /// An answer did not come in time.
    is_silent: bool,
}

impl Opener {
    /// Starts the process for an image. It opens the image without leaving `directory`, if that is
    /// given.
    pub(super) fn start(
        path: &Path,
        options: OpenOptions,
        directory: Option<&Path>,
    ) -> io::Result<Self> {
        let (socket, its_end) = pair()?;
        let start = Start {
            path: path.to_owned(),
            read_only: options.read_only,
            direct: options.direct,
            is_filtered: sandbox::is_filtered(),
            is_confined: false,
            directory: directory.map(Path::to_owned),
            records: None,
        };
        spawner::start_opener(&start, its_end)?;
        Ok(Self {
            path: path.to_owned(),
            socket,
            has_started: false,
            process: None,
            has_ended: false,
            is_silent: false,
        })
    }

    /// The image, as the first look finds it.
    pub(super) fn image(&mut self, by: Instant) -> Result<Answer<Image>, NoAnswer> {
        if !self.has_started {
            let (started, process) = self.answer::<Started>(by)?;
            started.map_err(io::Error::from_raw_os_error)?;
            self.has_started = true;
            self.process = process.map(OwnedFd::from);
        }
        let (answer, file) = self.answer::<Answer<Facts>>(by)?;
        match (answer, file) {
            (Ok(facts), Some(file)) => Ok(Ok(Image { file, facts })),
            (Ok(_), None) => Err(self.invalid().into()),
            (Err(fault), _) => Ok(Err(fault)),
        }
    }

    /// The alignment for direct I/O.
    pub(super) fn alignment(&mut self, by: Instant) -> Result<Answer<Alignment>, NoAnswer> {
        self.order(Order::FindAlignment)?;
        self.answer(by).map(|(answer, _)| answer)
    }

    /// The format, if it is known and not raw.
    pub(super) fn format(&mut self, by: Instant) -> Result<Answer<Option<Format>>, NoAnswer> {
        self.order(Order::FindFormat)?;
        self.answer(by).map(|(answer, _)| answer)
    }

    /// What the first `size_bytes` bytes hold.
    pub(super) fn contents(
        &mut self,
        size_bytes: u64,
        by: Instant,
    ) -> Result<Answer<Contents>, NoAnswer> {
        self.order(Order::FindContents(size_bytes))?;
        self.answer(by).map(|(answer, _)| answer)
    }

    /// Has the process take a short look at the first `size_bytes` bytes. [`Self::glanced`] is the
    /// answer.
    pub(super) fn glance(&self, size_bytes: u64) -> io::Result<()> {
        self.order(Order::GlanceAtContents(size_bytes))
    }

    /// What the short look has found.
    pub(super) fn glanced(&mut self, by: Instant) -> Result<Answer<Contents>, NoAnswer> {
        self.answer(by).map(|(answer, _)| answer)
    }

    /// Claims a block device ([`claim`]).
    pub(super) fn claim(&mut self, by: Instant) -> Result<Answer<Option<File>>, NoAnswer> {
        self.order(Order::Claim)?;
        let (answer, file) = self.answer::<Answer<()>>(by)?;
        Ok(answer.map(|()| file))
    }

    /// Locks the image, without waiting for another process.
    pub(super) fn lock(&mut self, by: Instant) -> Result<Answer<Locked>, NoAnswer> {
        self.order(Order::Lock)?;
        self.answer(by).map(|(answer, _)| answer)
    }

    /// The image opened once more, to grow it, or why it is not: an errno.
    pub(super) fn open_again(&mut self, by: Instant) -> Result<Result<File, i32>, NoAnswer> {
        self.order(Order::OpenAgain)?;
        let (answer, file) = self.answer::<Result<(), i32>>(by)?;
        Ok(answer.and_then(|()| file.ok_or(libc::EIO)))
    }

    /// Has the process look at the image.
    pub(in crate::replica) fn look(&mut self, at: Look, by: Instant) -> Result<Seen, NoAnswer> {
        self.order(Order::Look(at))?;
        self.answer(by).map(|(answer, _)| answer)
    }

    /// Carries out what is to be done about the record of the image. `written` is what an order
    /// to write writes.
    pub(in crate::replica) fn record(
        &mut self,
        order: RecordOrder,
        written: Option<&File>,
        by: Instant,
    ) -> Result<(RecordAnswer, Option<File>), NoAnswer> {
        send(&self.socket, &Order::Record(order), written)?;
        self.answer(by)
    }

    fn order(&self, order: Order) -> io::Result<()> {
        send(&self.socket, &order, None)
    }

    fn answer<T: DeserializeOwned>(&mut self, by: Instant) -> Result<(T, Option<File>), NoAnswer> {
        let soon = Instant::now() + SILENCE_LOGGED_AFTER;
        if !is_readable(&self.socket, soon.min(by))? {
            log::warn!(
                file:% = self.path.display();
                "waiting for the file system of an image, which does not answer"
            );
            if !is_readable(&self.socket, by)? {
                self.is_silent = true;
                return Err(NoAnswer::Silent);
            }
        }
        match receive(&self.socket)? {
            Some(answer) => Ok(answer),
            None => {
                self.has_ended = true;
                Err(self.invalid().into())
            }
        }
    }

    fn invalid(&self) -> io::Error {
        io::Error::other("the process that opens it ended too early")
    }
}

#[cfg(test)]
impl Opener {
    /// One whose orders a thread follows, which waits for the file system as the process would.
    pub(in crate::replica) fn on_a_thread(path: &Path, options: OpenOptions) -> Self {
        let (socket, its_end) = pair().unwrap();
        let image = path.to_owned();
        std::thread::spawn(move || follow_orders(&its_end, &image, options, None, |_| ()));
        Self {
            path: path.to_owned(),
            socket,
            has_started: true,
            process: None,
            has_ended: false,
            is_silent: false,
        }
    }

    /// Waits until the image is open.
    pub(in crate::replica) fn answer_to_start(&mut self) {
        let by = Instant::now() + crate::limits::OPEN_LIMIT;
        self.image(by).unwrap().unwrap();
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        // Ends what waits in the kernel and can be ended. Nothing waits for the process: the daemon
        // and the spawner ignore SIGCHLD. What has not started yet, or cannot be killed, finds
        // the socket closed.
        if let Some(process) = self.process.take() {
            let _ = pidfd_send_signal(&process, Signal::KILL);
            if self.is_silent {
                killed().push((self.path.clone(), process));
            }
        }
    }
}

/// What a process that opens an image is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// The image.
    pub(super) path: PathBuf,
    /// It is only read.
    pub(super) read_only: bool,
    /// With O_DIRECT.
    pub(super) direct: bool,
    /// The process makes the system calls of its kind only.
    pub(super) is_filtered: bool,
    /// It reaches the image and its record only, as soon as the image is open.
    pub(super) is_confined: bool,
    /// It does not leave this directory on the way to the image.
    pub(super) directory: Option<PathBuf>,
    /// Where the record may be that is not beside the image.
    pub(super) records: Option<StateDirectory>,
}

impl Start {
    /// The arguments of the process.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let either = |is_first, first: &str, second: &str| match is_first {
            true => OsString::from(first),
            false => OsString::from(second),
        };
        let directory = self.directory.clone().unwrap_or_default();
        let (kind, records) = match &self.records {
            None => (NO_STATE, PathBuf::new()),
            Some(StateDirectory::Given(path)) => (GIVEN_STATE, path.clone()),
            Some(StateDirectory::Usual(path)) => (USUAL_STATE, path.clone()),
        };
        vec![
            ARGUMENT.into(),
            either(self.read_only, READ_ONLY, READ_WRITE),
            either(self.direct, DIRECT, CACHED),
            either(self.is_filtered, FILTERED, UNFILTERED),
            either(self.is_confined, CONFINED, UNCONFINED),
            self.path.clone().into(),
            directory.into(),
            kind.into(),
            records.into(),
        ]
    }

    /// The reverse, for the arguments after the first one.
    fn from_arguments(arguments: &[OsString]) -> Self {
        let mut arguments = arguments.iter().cloned();
        let mut next = || arguments.next().unwrap_or_default();
        let [access, cache, calls, files] = [(); 4].map(|()| next());
        let [path, directory] = [(); 2].map(|()| PathBuf::from(next()));
        let (kind, records) = (next(), PathBuf::from(next()));
        Self {
            path,
            read_only: access == READ_ONLY,
            direct: cache == DIRECT,
            is_filtered: calls == FILTERED,
            is_confined: files == CONFINED,
            directory: Some(directory).filter(|path| !path.as_os_str().is_empty()),
            records: match kind {
                kind if kind == GIVEN_STATE => Some(StateDirectory::Given(records)),
                kind if kind == USUAL_STATE => Some(StateDirectory::Usual(records)),
                _ => None,
            },
        }
    }

    /// The files that the process reaches when it has opened the image.
    fn in_reach(&self, image: &Image) -> Vec<Beneath> {
        let beneath = |path: PathBuf, access| Beneath { path, access };
        let itself = PathBuf::from(format!("/proc/self/fd/{}", image.file.as_raw_fd()));
        let access = match self.read_only {
            true => Access::Read,
            false => Access::Write,
        };
        let system = ["/proc", "/sys", "/run/udev", "/dev/disk"];
        let system = system.map(|path| beneath(path.into(), Access::Read));
        let is_device = image.facts.is_block_device;
        let records = match &self.records {
            Some(StateDirectory::Usual(path)) if is_device => {
                // It cannot be made later.
                if !self.read_only {
                    let _ = rustix::fs::mkdir(path, Mode::RWXU);
                }
                Some(path)
            }
            Some(StateDirectory::Usual(_)) | None => None,
            Some(StateDirectory::Given(path)) => Some(path),
        };
        let records = records.map(|path| beneath(path.clone(), access));
        // Through whatever links its path leads, its record is beside the image itself. In `/`
        // everything is beside it.
        let real = std::fs::read_link(&itself).unwrap_or_default();
        let beside = real.parent().filter(|path| path.parent().is_some());
        let beside = beside.filter(|_| !is_device);
        let beside = beside.map(|path| beneath(path.to_owned(), access));
        let image = beneath(itself, access);
        let files = system.into_iter().chain(records).chain(beside);
        files.chain([image]).collect()
    }
}

/// Serves as the process of an `Opener`, if that is what this process was started for, or as the
/// one that starts those. Otherwise returns `None`. To be called before anything else.
pub fn serve(arguments: impl IntoIterator<Item = OsString>) -> Option<io::Result<()>> {
    let arguments: Vec<OsString> = arguments.into_iter().skip(1).collect();
    let (first, others) = arguments.split_first()?;
    if first == ARGUMENT {
        return Some(answer_all(&Start::from_arguments(others)));
    }
    if first == spawner::ARGUMENT {
        return Some(spawner::serve(others));
    }
    None
}

/// Opens the image, and follows the daemon's orders until it closes the socket.
fn answer_all(start: &Start) -> io::Result<()> {
    // Without one it cannot be killed, which matters only while it waits for the file system.
    let itself = pidfd_open(getpid(), PidfdFlags::empty()).map(File::from);
    send(&io::stdin(), &Started::Ok(()), itself.as_ref().ok())?;
    let _ = set_name(c"blkd-opener");
    if start.is_filtered {
        sandbox::enter_process(ThreadKind::Opener, Some(&io::stdin())).map_err(io::Error::other)?;
    }
    // The daemon may end while this process waits for the file system.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A listening socket of --fd, for example.
    // SAFETY: `serve` is called before this process opens anything.
    unsafe { close_inherited() };
    let options = OpenOptions {
        read_only: start.read_only,
        direct: start.direct,
        // The daemon decides what to do about a format.
        raw_anyway: true,
        block_bytes: ALIGNMENT_BYTES_MIN,
    };
    let directory = start.directory.as_deref();
    follow_orders(&io::stdin(), &start.path, options, directory, |image| {
        if start.is_confined {
            sandbox::keep_in_reach(&start.in_reach(image));
        }
    })
}

/// Opens an image, calls `confine`, and follows the orders about it until the socket is closed.
fn follow_orders(
    socket: &impl AsFd,
    path: &Path,
    options: OpenOptions,
    directory: Option<&Path>,
    confine: impl FnOnce(&Image),
) -> io::Result<()> {
    let image = match Image::open(path, options, directory) {
        Ok(image) => image,
        Err(fault) => return send(socket, &Answer::<Facts>::Err(fault), None),
    };
    confine(&image);
    send(socket, &Answer::Ok(&image.facts), Some(&image.file))?;
    let mut keeper = Keeper::new(path, image.facts.identity, options.read_only);
    while let Some((order, given)) = receive(socket)? {
        match order {
            Order::FindAlignment => {
                let alignment = alignment(&image.file, &image.facts);
                send(socket, &Answer::Ok(alignment), None)?;
            }
            Order::FindFormat => {
                let format = Format::of(&image.file, image.facts.size_bytes);
                send(socket, &Answer::Ok(format), None)?;
            }
            Order::FindContents(size_bytes) => {
                let contents = Contents::of(&image.file, size_bytes);
                send(socket, &Answer::Ok(contents), None)?;
            }
            Order::GlanceAtContents(size_bytes) => {
                let contents = Contents::at_a_glance(&image.file, size_bytes);
                send(socket, &Answer::Ok(contents), None)?;
            }
            Order::Claim => match claim(&image.file, options) {
                Ok(file) => send(socket, &Answer::Ok(()), file.as_ref())?,
                Err(fault) => send(socket, &Answer::<()>::Err(fault), None)?,
            },
            Order::Lock => send(socket, &lock(&image.file, options), None)?,
            Order::OpenAgain => match open_again(&image.file, options) {
                Ok(again) => send(socket, &Ok::<_, i32>(()), Some(&again))?,
                Err(errno) => send(socket, &Err::<(), _>(errno), None)?,
            },
            Order::Look(at) => send(socket, &look(&image.file, at), None)?,
            Order::Record(order) => {
                let (answer, file) = keeper.carry_out(order, given.as_ref());
                send(socket, &answer, file.as_ref())?;
            }
        }
    }
    Ok(())
}
