//! A disk that is used while everything is logged.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::fuse::logged::{Content, Failing, FileContent, LoggedDirectory, Moment};
use testkit::images::Random;
use testkit::sectors::SECTOR;
use testkit::size;

use crate::case::{Case, Expected, Start};
use crate::files::{FileHistory, Promises};
use crate::filesystem;
use crate::history::History;
use crate::judge::{arguments, scratch};
use crate::laboratory::{Class, Work, name};
use crate::operator::{self, Administration, Spare};
use crate::report::Figures;
use crate::workload::Guest;

const DISK_BYTES: u64 = 4 << 20;
/// Bytes of a disk that an operator has grown.
const GROWN_BYTES: u64 = DISK_BYTES + 2 * operator::GROWTH_BYTES;
/// With a `--replica-timeout` of 250 ms marks are looked at every 2 s. Those are cleared that
/// nothing has touched since the last time: a pause that is longer than two of these periods leaves
/// none.
const PAUSE: Duration = Duration::from_millis(4500);

/// What the users of a disk know of it.
pub(crate) enum Known {
    Blocks(History),
    /// The kind of the file system, and what was promised before.
    Files(&'static str, FileHistory, Promises),
}

impl Known {
    /// What a disk must hold if the power fails at `moment`.
    fn expected(&self, moment: Moment) -> Expected {
        match self {
            Self::Blocks(history) => Expected::Versions(history.permitted(moment)),
            Self::Files(kind, history, before) => {
                let mut promises = before.clone();
                promises.extend(history.promises(moment));
                Expected::Files((*kind).into(), promises)
            }
        }
    }

    /// What is known at the start after that.
    fn after(&self, moment: Moment) -> Self {
        match (self, self.expected(moment)) {
            (Self::Blocks(history), Expected::Versions(permitted)) => {
                Self::Blocks(History::after(permitted, history.next_version()))
            }
            (Self::Files(kind, ..), Expected::Files(_, promises)) => {
                Self::Files(kind, FileHistory::default(), promises)
            }
            _ => unreachable!("what is expected is of the same kind"),
        }
    }
}

/// A disk that was used while everything was logged.
pub(crate) struct Trace {
    pub(crate) directory: LoggedDirectory,
    known: Known,
    /// From when on a guest has used it: then the disk has its records.
    used_from: Moment,
    /// From when on the daemon was ending. An image whose record does not say that the end was
    /// clean, while those of others do, counts as restored from a copy.
    ends_from: Moment,
    end: Moment,
    /// The replica with a fault, and since when.
    failed: Option<(usize, Moment)>,
    /// A replica was evicted, since the host was too slow: then it is not known what each holds.
    pub(crate) is_disturbed: bool,
    /// Replicas that had to be copied as a whole at its start.
    pub(crate) copied: Vec<usize>,
    /// What an operator has done.
    administration: Administration,
    /// What no disk may do.
    problems: Vec<String>,
}

impl Trace {
    /// The replica that had a fault before this moment: it may lack anything.
    pub(crate) fn failed_at(&self, moment: Moment) -> Option<usize> {
        let failed = self.failed.filter(|(_, from)| *from <= moment);
        failed.map(|(replica, _)| replica)
    }

    /// Whether the disk has its records at this moment, and it is known what each replica holds.
    pub(crate) fn is_used(&self, moment: Moment) -> bool {
        moment >= self.used_from && !self.is_disturbed
    }

    /// Whether no replica may have to be copied as a whole after a power cut at this moment.
    pub(crate) fn is_sound(&self, moment: Moment) -> bool {
        let is_faultless = self.failed_at(moment).is_none() && !self.is_disturbed;
        is_faultless && moment < self.ends_from
    }

    /// What is known of the spare replica at this moment.
    pub(crate) fn spare(&self, moment: Moment) -> Spare {
        self.administration.spare(moment)
    }

    /// What its users know at the start after a power cut at this moment.
    pub(crate) fn known_after(&self, moment: Moment) -> Known {
        self.known.after(moment)
    }

    /// A moment at which the power fails: just before or after something has begun or ended, or
    /// any.
    pub(crate) fn moment(&self, random: &mut Random) -> Moment {
        let edges = self.directory.edges();
        let moment = match random.within(0..2) {
            0 => edges[size(random.within(0..edges.len() as u64))],
            _ => random.within(0..self.end),
        };
        moment.min(self.end - 1)
    }

    /// What is left if the power fails at `moment`, to be started with all replicas.
    pub(crate) fn crash(&self, class: Class, moment: Moment, random: &mut Random) -> Case {
        Case {
            content: class.crash(&self.directory, moment, random),
            expected: self.known.expected(moment),
            sizes: self.administration.sizes(moment),
            started: (0..class.replicas).collect(),
            start: Start::Serve,
            replicas: class.replicas,
            has_records: class.has_records,
            others_return: false,
            may_lack: false,
            is_sound: class.has_records && self.is_sound(moment),
        }
    }

    /// Says what was wrong while it was made.
    pub(crate) fn report(&self, class: Class, label: &str, figures: &mut Figures) {
        if self.problems.is_empty() {
            return;
        }
        figures.failures += 1;
        if !class.lies {
            println!("{label} fails while the disk is used");
            let problems = self.problems.iter();
            problems.for_each(|problem| println!("  {problem}"));
        }
    }
}

/// A disk that has some data, or none, in its first sector.
pub(crate) fn new_disk(class: Class, is_empty: bool) -> (Content, Known) {
    let (bytes, known) = match class.work {
        Work::Blocks => new_blocks(is_empty),
        Work::Files(kind) => {
            let known = Known::Files(kind, FileHistory::default(), Promises::new());
            (filesystem::make(kind), known)
        }
    };
    let image = FileContent {
        bytes: bytes.into(),
        modified_ns: 1_000_000_000_000_000_000,
    };
    let files = (0..class.replicas).map(|replica| (name(replica).into(), image.clone()));
    let mut files: BTreeMap<OsString, FileContent> = files.collect();
    if class.has_operator {
        let spare = FileContent {
            bytes: vec![0; size(GROWN_BYTES)].into(),
            ..image
        };
        files.insert(name(class.replicas).into(), spare);
    }
    (Content { files }, known)
}

fn new_blocks(is_empty: bool) -> (Vec<u8>, Known) {
    let mut history = History::after(vec![vec![0]; size(GROWN_BYTES) / SECTOR], 1);
    let mut bytes = vec![0; size(DISK_BYTES)];
    if !is_empty {
        history.begin_write(0..1, &mut bytes[..SECTOR], 1);
        let versions = history.permitted(1);
        history = History::after(versions, history.next_version());
        history.saw(0, 1, 0);
    }
    (bytes, Known::Blocks(history))
}

/// Serves the disk from a logged directory while a guest works. It may have these `sizes` in bytes;
/// if none is given it is a new one, and otherwise it recovers from a power cut.
pub(crate) fn run(
    class: Class,
    content: &Content,
    known: Known,
    sizes: Option<Vec<u64>>,
    random: &mut Random,
) -> Trace {
    let is_second = sizes.is_some();
    let directory = LoggedDirectory::mount(content);
    let clock = directory.clock();
    let sockets = scratch();
    let all: Vec<usize> = (0..class.replicas).collect();
    let mut arguments = arguments(directory.path(), &all, class.has_records);
    let steps = random.within(match (class.work, is_second) {
        (Work::Blocks, true) => 0..6,
        (Work::Blocks, false) => 8..40,
        (Work::Files(_), _) => 10..40,
    });
    let has_fault = class.has_fault && !is_second;
    let mut fault = has_fault.then(|| Fault::any(&directory, class.replicas, steps, random));
    // Marks are cleared after eight times this, and what is slow is evicted after it.
    let is_short = !is_second && random.within(0..3) == 0;
    let is_slow = fault
        .as_ref()
        .is_some_and(|fault| fault.how == Failing::Slow);
    let timeout = if is_short || is_slow { 250 } else { 60000 };
    arguments.extend(["--replica-timeout".into(), timeout.to_string()]);
    // What is not flushed is in the page cache then, of which a power cut leaves the same.
    let cache = if random.within(0..4) == 0 {
        "writeback"
    } else {
        "none"
    };
    arguments.extend(["--cache".into(), cache.into()]);
    if class.work != Work::Blocks || class.has_operator {
        arguments.push("--shared".into());
    }
    let monitor = sockets.path().join("qmp.sock");
    arguments.extend(["--qmp".into(), monitor.to_str().expect("UTF-8").into()]);
    let started = Daemon::try_start(sockets.path(), arguments);
    let mut daemon = started.unwrap_or_else(|line| panic!("a trace does not start: {line}"));
    let used_from = clock.tick();
    let is_ended = random.within(0..3) == 0;
    let bytes = content.files[OsStr::new(&name(0))].bytes.len() as u64;
    let sizes = sizes.unwrap_or(vec![bytes]);
    let administration = Mutex::new(Administration::of(&sizes));
    let mut problems = Vec::new();
    let known = thread::scope(|scope| {
        // All ends with this, also by a panic.
        let mut plan = Vec::new();
        let (acts, tasks) = mpsc::channel();
        if class.has_operator && !is_second {
            plan = operator::plan(bytes, steps, random);
            let spare = (directory.path(), class.replicas);
            let (monitor, clock, administration) = (&monitor, &clock, &administration);
            scope.spawn(move || {
                operator::work(monitor, spare, clock, &tasks, administration, has_fault);
            });
        }
        let (fault, administration) = (&mut fault, &administration);
        let mut between = move |step| {
            if let Some(fault) = fault {
                fault.step(step);
            }
            for (_, act) in plan.extract_if(.., |(at, _)| *at == step) {
                acts.send(act).expect("an operator");
            }
            administration.lock().expect("an operator failed").size()
        };
        match known {
            Known::Blocks(history) => {
                let mut guest = Guest::connect(daemon.socket(), clock.clone(), history, random);
                if is_second {
                    guest.look();
                }
                guest.work(steps, is_short.then_some(PAUSE), &mut between);
                let (history, found) = guest.finish();
                problems = found;
                Known::Blocks(history)
            }
            Known::Files(kind, history, before) if is_second => {
                filesystem::replay(daemon.socket(), kind);
                Known::Files(kind, history, before)
            }
            Known::Files(kind, _, before) => {
                let history =
                    filesystem::work(daemon.socket(), &clock, kind, steps, random, &mut between);
                Known::Files(kind, history, before)
            }
        }
    });
    let failed = fault.and_then(|fault| Some((fault.replica, fault.began?)));
    let ends_from = clock.tick();
    if is_ended {
        let status = daemon.terminate();
        // Where the last flush fails on an image it ends with an error.
        if failed.is_none() && !status.success() {
            problems.push(format!("the daemon ends with {status}"));
        }
    }
    let log = daemon.log();
    let is_expected = |line: &str| failed.is_some_and(|(failed, _)| line.contains(&name(failed)));
    let mut evicted = log.lines().filter(|line| line.contains("replica evicted"));
    let is_disturbed = evicted.any(|line| !is_expected(line));
    // What it does later belongs to no state.
    let end = directory.end();
    drop(daemon);
    Trace {
        directory,
        known,
        used_from,
        ends_from,
        end,
        failed,
        is_disturbed,
        copied: copied_as_a_whole(&log).collect(),
        administration: administration.into_inner().expect("an operator failed"),
        problems,
    }
}

/// Replicas that have to be copied as a whole at a start, as the log of the daemon says.
pub(crate) fn copied_as_a_whole(log: &str) -> impl Iterator<Item = usize> {
    const REASONS: [&str; 2] = ["has to be copied as a whole", "restored from an older copy"];
    let lines = log.lines().filter(|line| {
        let is_about_it = line.contains("replica is not up to date at the start");
        is_about_it && REASONS.iter().any(|reason| line.contains(reason))
    });
    lines.filter_map(|line| {
        let (_, rest) = line.split_once("replica=")?;
        rest.split_once(".raw")?.0.parse().ok()
    })
}

/// What is wrong with one of the replicas, from one step of the work to another.
struct Fault<'a> {
    directory: &'a LoggedDirectory,
    replica: usize,
    /// Its image, or its record.
    file: String,
    how: Failing,
    steps: Range<u64>,
    began: Option<Moment>,
}

impl<'a> Fault<'a> {
    fn any(
        directory: &'a LoggedDirectory,
        replicas: usize,
        steps: u64,
        random: &mut Random,
    ) -> Self {
        let replica = size(random.within(0..replicas as u64));
        let from = random.within(0..steps);
        let suffix = match random.within(0..3) {
            0 => ".quorum",
            _ => "",
        };
        Self {
            directory,
            replica,
            file: name(replica) + suffix,
            how: match random.within(0..4) {
                0 => Failing::Syncs,
                1 => Failing::Changes,
                2 => Failing::Slow,
                _ => Failing::ChangesAndSyncs,
            },
            steps: from..from + random.within(1..12),
            began: None,
        }
    }

    fn step(&mut self, step: u64) {
        if step == self.steps.start {
            self.began = Some(self.directory.clock().tick());
            self.directory.fail(&self.file, Some(self.how));
        }
        if step == self.steps.end {
            self.directory.fail(&self.file, None);
        }
    }
}
