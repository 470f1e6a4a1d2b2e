//! Makes traces, takes crash states from them, and has them judged.

use std::path::PathBuf;
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::fuse::logged::{Content, Failing, FileContent, LoggedDirectory, Moment};
use testkit::images::Random;
use testkit::programs::target_directory;

use crate::case::{Case, Expected, Start};
use crate::files::{FileHistory, Promises};
use crate::filesystem;
use crate::history::{History, SECTOR};
use crate::judge::{arguments, judge, scratch};
use crate::report::Figures;
use crate::workload::Guest;

const DISK_BYTES: usize = 4 << 20;
/// States that are taken from a trace after a crash.
const AGAIN: usize = 3;
/// Sectors of a block that a disk with physical blocks of 4 KiB writes as a whole.
const BLOCK_SECTORS: usize = 8;
/// With a `--replica-timeout` of 250 ms marks are looked at every 2 s. Those are cleared that
/// nothing has touched since the last time: a pause that is longer than two of these periods leaves
/// none.
const PAUSE: Duration = Duration::from_millis(4500);

/// What is done on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A guest writes blocks, and an oracle knows each sector.
    Blocks,
    /// Programs use a file system of this kind.
    Files(&'static str),
}

/// What kind of disk is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) work: Work,
    pub(crate) replicas: usize,
    pub(crate) has_records: bool,
    /// For a while, writes or syncs of one of the images fail, or both, or it is so slow that its
    /// replica is evicted.
    pub(crate) has_fault: bool,
    /// The images lose what was synced. States that fail are only counted.
    pub(crate) lies: bool,
}

impl Class {
    pub(crate) fn name(self) -> String {
        let records = if self.has_records { "records" } else { "none" };
        let work = match self.work {
            Work::Blocks => "blocks",
            Work::Files(kind) => kind,
        };
        let fault = if self.has_fault { "-fault" } else { "" };
        format!("{work}-{}-{records}{fault}", self.replicas)
    }

    /// What a power cut leaves. File systems need blocks that are not torn: ext4 has a checksum for
    /// the two sectors of its superblock.
    fn crash(self, directory: &LoggedDirectory, moment: Moment, random: &mut Random) -> Content {
        let atom = |name: &str| match self.work {
            Work::Files(_) if name.ends_with(".raw") => BLOCK_SECTORS,
            _ => 1,
        };
        if self.lies {
            directory.forget_syncs();
        }
        directory.crash(moment, atom, random)
    }

    fn threshold(self) -> usize {
        self.replicas / 2 + 1
    }
}

/// What the users of a disk know of it.
enum Known {
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
struct Trace {
    directory: LoggedDirectory,
    known: Known,
    /// From when on a guest has used it: then the disk has its records.
    used_from: Moment,
    end: Moment,
    /// The replica whose image has failed writes.
    failed: Option<usize>,
    /// A replica was evicted, since the host was too slow: then it is not known what each holds.
    is_disturbed: bool,
    /// What no disk may do.
    problems: Vec<String>,
}

impl Trace {
    /// A moment at which the power fails: just before or after something has begun or ended, or
    /// any.
    fn moment(&self, random: &mut Random) -> Moment {
        let edges = self.directory.edges();
        let moment = match random.within(0..2) {
            0 => edges[size(random.within(0..edges.len() as u64))],
            _ => random.within(0..self.end),
        };
        moment.min(self.end - 1)
    }

    /// What is left if the power fails at `moment`, to be started with all replicas.
    fn crash(&self, class: Class, moment: Moment, random: &mut Random) -> Case {
        Case {
            content: class.crash(&self.directory, moment, random),
            expected: self.known.expected(moment),
            started: (0..class.replicas).collect(),
            start: Start::Serve,
            replicas: class.replicas,
            has_records: class.has_records,
            others_return: false,
            may_lack: false,
        }
    }

    /// Says what was wrong while it was made.
    fn report(&self, class: Class, label: &str, figures: &mut Figures) {
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

/// Makes a trace with this seed, and judges so many states of it, until `is_over`.
pub(crate) fn judge_trace(
    class: Class,
    seed: u64,
    states: usize,
    is_over: &dyn Fn() -> bool,
) -> Figures {
    let mut random = Random::from_seed(seed);
    let mut figures = Figures::default();
    // A disk without records is refused if some of its images are empty and others are not.
    let is_empty = class.has_records && random.within(0..2) == 0;
    let (content, known) = new_disk(class, is_empty);
    let trace = run(class, &content, known, false, &mut random);
    if !class.has_records && trace.is_disturbed {
        // What an evicted replica has missed is forgotten, which is no surprise.
        return figures;
    }
    trace.report(class, &format!("{}-{seed}", class.name()), &mut figures);
    for state in 0..states {
        if state > 0 && is_over() {
            break;
        }
        // A state must not depend on how many others are judged.
        let mut random = Random::from_seed(seed ^ (state as u64 + 1) << 40);
        let moment = trace.moment(&mut random);
        let label = format!("{}-{seed}-{state}", class.name());
        judge_state(class, &trace, moment, &label, &mut random, &mut figures);
    }
    figures
}

/// A disk that has some data, or none, in its first sector.
fn new_disk(class: Class, is_empty: bool) -> (Content, Known) {
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
    let files = files.collect();
    (Content { files }, known)
}

fn new_blocks(is_empty: bool) -> (Vec<u8>, Known) {
    let mut history = History::after(vec![vec![0]; DISK_BYTES / SECTOR], 1);
    let mut bytes = vec![0; DISK_BYTES];
    if !is_empty {
        history.begin_write(0..1, &mut bytes[..SECTOR], 1);
        let versions = history.permitted(1);
        history = History::after(versions, history.next_version());
        history.saw(0, 1, 0);
    }
    (bytes, Known::Blocks(history))
}

/// Takes a crash state at `moment`, and has it judged with all replicas and with some.
fn judge_state(
    class: Class,
    trace: &Trace,
    moment: Moment,
    label: &str,
    random: &mut Random,
    figures: &mut Figures,
) {
    let mut case = trace.crash(class, moment, random);
    figures.states += 1;
    let is_used = moment >= trace.used_from && !trace.is_disturbed;
    check(class, &case, moment, label, figures);
    for bits in 1_usize..(1 << class.replicas) - 1 {
        let started = (0..class.replicas).filter(|at| bits >> at & 1 == 1);
        let started: Vec<usize> = started.collect();
        let is_enough = started.len() >= class.threshold();
        // Before it was used, or without records, fewer images are another disk.
        if !class.has_records || !is_used || !is_enough && random.within(0..8) > 0 {
            continue;
        }
        // Of the many subsets of many replicas, some.
        if class.replicas > 3 && random.within(0..4) > 0 {
            continue;
        }
        let holds_less = |replica: &usize| trace.failed == Some(*replica);
        let whole = started.iter().filter(|replica| !holds_less(replica));
        case.may_lack = is_enough && whole.count() < class.threshold();
        case.started = started;
        case.start = match is_enough {
            true => Start::Serve,
            false => Start::Refuse,
        };
        case.others_return = is_enough && !case.may_lack && random.within(0..4) == 0;
        check(class, &case, moment, &format!("{label}-{bits:b}"), figures);
    }
    if class.has_records && random.within(0..4) == 0 {
        crash_again(class, trace, moment, label, random, figures);
    }
}

/// Crashes a second time, while the daemon recovers and the guest works again.
fn crash_again(
    class: Class,
    trace: &Trace,
    moment: Moment,
    label: &str,
    random: &mut Random,
    figures: &mut Figures,
) {
    // What it is served from must start, as any other state.
    let case = trace.crash(class, moment, random);
    if !check(class, &case, moment, &format!("{label}-first"), figures) {
        return;
    }
    let second = run(
        class,
        &case.content,
        trace.known.after(moment),
        true,
        random,
    );
    if !trace.is_disturbed {
        second.report(class, &format!("{label}-again"), figures);
    }
    for state in 0..AGAIN {
        let moment = second.moment(random);
        let mut case = second.crash(class, moment, random);
        figures.second_crashes += 1;
        check(
            class,
            &case,
            moment,
            &format!("{label}-again-{state}"),
            figures,
        );
        let is_disturbed = trace.is_disturbed || second.is_disturbed;
        let is_used = moment >= second.used_from && !is_disturbed;
        if trace.failed.is_none() && is_used && class.threshold() < class.replicas {
            let left_out = size(random.within(0..class.replicas as u64));
            case.started.remove(left_out);
            check(
                class,
                &case,
                moment,
                &format!("{label}-again-{state}-but-{left_out}"),
                figures,
            );
        }
    }
}

/// Has a case judged. Returns whether all is as it must be.
fn check(class: Class, case: &Case, moment: Moment, label: &str, figures: &mut Figures) -> bool {
    let images = scratch();
    let outcome = judge(case, images.path());
    figures.starts += 1;
    figures.refusals += usize::from(case.start == Start::Refuse);
    figures.unreadable += usize::from(outcome.unreadable > 0);
    if outcome.problems.is_empty() {
        return true;
    }
    figures.failures += 1;
    if class.lies {
        return false;
    }
    let kept: PathBuf = target_directory().join("crash").join(label);
    case.save(&kept, &outcome.problems)
        .expect("keeping a state");
    let kept = kept.display();
    println!("{label} at moment {moment} fails; again: make crash STATE={kept}");
    for problem in &outcome.problems {
        println!("  {problem}");
    }
    false
}

/// Serves the disk from a logged directory while a guest works.
fn run(
    class: Class,
    content: &Content,
    known: Known,
    is_second: bool,
    random: &mut Random,
) -> Trace {
    let directory = LoggedDirectory::mount(content);
    let clock = directory.clock();
    let sockets = scratch();
    let all: Vec<usize> = (0..class.replicas).collect();
    let mut arguments = arguments(directory.path(), &all, class.has_records);
    let any = size(random.within(0..class.replicas as u64));
    let failed = (class.has_fault && !is_second).then_some(any);
    let how = match random.within(0..4) {
        0 => Failing::Syncs,
        1 => Failing::Changes,
        2 => Failing::Slow,
        _ => Failing::ChangesAndSyncs,
    };
    // Marks are cleared after eight times this, and what is slow is evicted after it.
    let is_short = !is_second && random.within(0..3) == 0;
    let is_slow = failed.is_some() && how == Failing::Slow;
    let timeout = if is_short || is_slow { 250 } else { 60000 };
    arguments.extend(["--replica-timeout".into(), timeout.to_string()]);
    if class.work != Work::Blocks {
        arguments.push("--shared".into());
    }
    let started = Daemon::try_start(sockets.path(), arguments);
    let mut daemon = started.unwrap_or_else(|line| panic!("a trace does not start: {line}"));
    let used_from = clock.tick();
    let is_ended = random.within(0..3) == 0;
    let fault = |begins: bool| {
        if let Some(failed) = failed {
            directory.fail(&name(failed), begins.then_some(how));
        }
    };
    let mut problems = Vec::new();
    let known = match known {
        Known::Blocks(history) => {
            let mut guest = Guest::connect(daemon.socket(), clock, history, random);
            if is_second {
                guest.look();
            }
            let batches = if is_second { 0..6 } else { 8..40 };
            guest.work(batches, is_short.then_some(PAUSE), &fault);
            let (history, found) = guest.finish();
            problems = found;
            Known::Blocks(history)
        }
        Known::Files(kind, history, before) if is_second => {
            filesystem::replay(daemon.socket(), kind);
            Known::Files(kind, history, before)
        }
        Known::Files(kind, _, before) => {
            let history = filesystem::work(daemon.socket(), &clock, kind, random);
            Known::Files(kind, history, before)
        }
    };
    if is_ended {
        let status = daemon.terminate();
        // Where the last flush fails on an image it ends with an error.
        if failed.is_none() && !status.success() {
            problems.push(format!("the daemon ends with {status}"));
        }
    }
    let is_expected = |line: &str| failed.is_some_and(|failed| line.contains(&name(failed)));
    let is_disturbed = daemon
        .log()
        .lines()
        .any(|line| line.contains("replica evicted") && !is_expected(line));
    // What it does later belongs to no state.
    let end = directory.end();
    drop(daemon);
    Trace {
        directory,
        known,
        used_from,
        end,
        failed,
        is_disturbed,
        problems,
    }
}

/// The name of an image.
pub(crate) fn name(replica: usize) -> String {
    format!("{replica}.raw")
}

fn size(number: u64) -> usize {
    usize::try_from(number).expect("fits memory")
}
