//! Starts the daemon on a crash state, and judges what it serves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::sectors::SECTOR;
use testkit::size;

use crate::case::{Case, Expected, Start};
use crate::filesystem;
use crate::history::{Version, wrong};
use crate::laboratory::name;
use crate::trace::copied_as_a_whole;

/// What became of a crash state.
#[derive(Default)]
pub(crate) struct Outcome {
    /// What must not be.
    pub(crate) problems: Vec<String>,
    /// Sectors that could not be read although the disk has no records, which is no promise.
    pub(crate) unreadable: usize,
}

/// Problems that are named; the others are counted.
const NAMED_MAX: usize = 5;
/// Bytes of a read, and of those that are sent together: memory that is used again costs least.
const PART: usize = 256 << 10;
const BATCH: usize = 1 << 20;
/// What it says if only a replica that is not there may have a good copy, or one that is there has
/// missed changes everywhere.
const LACKS: [&str; 2] = ["may hold", "has to be copied as a whole"];
/// What a line says that refuses a start because too few replicas are there, or one that was
/// removed.
const REFUSALS: [&str; 3] = [
    "could have gone on without",
    "needed replicas can be used",
    "was removed from disk",
];

/// A directory for files that need not survive: in memory if the host has one.
pub(crate) fn scratch() -> tempfile::TempDir {
    let in_memory = Path::new("/dev/shm");
    let made = match in_memory.is_dir() {
        true => tempfile::tempdir_in(in_memory),
        false => tempfile::tempdir(),
    };
    made.expect("creating a directory")
}

/// The arguments of a daemon for the images of these replicas.
pub(crate) fn arguments(images: &Path, replicas: &[usize], has_records: bool) -> Vec<String> {
    let of = |replica: &usize| images.join(name(*replica));
    let images: Vec<PathBuf> = replicas.iter().map(of).collect();
    let replicas = replica_arguments(&images).into_iter();
    let mut arguments: Vec<String> = replicas
        .map(|argument| argument.into_string().expect("a path in UTF-8"))
        .collect();
    let state = if has_records { "records" } else { "none" };
    arguments.extend(["--state".into(), state.into()]);
    arguments
}

/// Judges a start with `case` on plain files, which are left in `images`.
pub(crate) fn judge(case: &Case, images: &Path) -> Outcome {
    let mut outcome = Outcome::default();
    let is_of_started = |file: &str| {
        let mut started = case.started.iter();
        started.any(|replica| file.starts_with(&name(*replica)))
    };
    case.content
        .write_to(images, is_of_started)
        .expect("writing images");
    let wanted = match &case.expected {
        Expected::Versions(permitted) => Wanted::Versions(permitted),
        Expected::Files(..) => Wanted::Anything,
    };
    let Some(first) = serve(case, &case.started, images, &wanted, &mut outcome) else {
        return outcome;
    };
    if let Expected::Files(kind, promises) = &case.expected
        && outcome.problems.is_empty()
    {
        let image = images.join(name(case.started[0]));
        outcome.problems = filesystem::check(&image, kind, promises);
    }
    if case.others_return && outcome.problems.is_empty() {
        // What the others hold now is older than what was decided without them.
        let all: Vec<usize> = (0..case.replicas).collect();
        let is_of_others = |file: &str| !is_of_started(file);
        case.content
            .write_to(images, is_of_others)
            .expect("writing images");
        serve(case, &all, images, &Wanted::Exactly(&first), &mut outcome);
        for problem in &mut outcome.problems {
            problem.insert_str(0, "when the others return: ");
        }
    }
    outcome
}

/// What a start must find on the disk.
enum Wanted<'a> {
    Versions(&'a [Vec<Version>]),
    Anything,
    Exactly(&'a [u8]),
}

impl Wanted<'_> {
    /// Whether the disk may have this size.
    fn permits(&self, bytes: u64, case: &Case) -> bool {
        match self {
            Self::Exactly(expected) => expected.len() as u64 == bytes,
            _ => case.sizes.contains(&bytes),
        }
    }

    /// Whether more than one version of the sector may be on the disk.
    fn is_open(&self, sector: usize) -> bool {
        match self {
            Self::Versions(permitted) => permitted[sector].len() > 1,
            Self::Anything => true,
            Self::Exactly(_) => false,
        }
    }

    /// Checks what was read from this sector on.
    fn check(&self, bytes: &[u8], first: usize, problems: &mut Vec<String>) {
        match self {
            Self::Versions(permitted) => {
                for (sector, version) in wrong(bytes, first, permitted) {
                    let may = &permitted[sector];
                    let problem = format!("sector {sector} holds {version:?}, may hold {may:?}");
                    problems.push(problem);
                }
            }
            Self::Anything => {}
            Self::Exactly(expected) => {
                let expected = &expected[first * SECTOR..];
                let pairs = bytes.chunks(SECTOR).zip(expected.chunks(SECTOR));
                for (place, (found, expected)) in pairs.enumerate() {
                    if found != expected {
                        let sector = first + place;
                        problems.push(format!("sector {sector} holds something else than before"));
                    }
                }
            }
        }
    }
}

/// Serves the disk once, with these replicas. Returns what each sector holds.
fn serve(
    case: &Case,
    replicas: &[usize],
    images: &Path,
    wanted: &Wanted,
    outcome: &mut Outcome,
) -> Option<Vec<u8>> {
    let sockets = scratch();
    let monitor = sockets.path().join("qmp.sock");
    let mut arguments = arguments(images, replicas, case.has_records);
    arguments.extend(["--qmp".into(), monitor.to_str().expect("UTF-8").into()]);
    arguments.extend(["--replica-timeout".into(), "60000".into()]);
    arguments.push("--shared".into());
    let mut daemon = match (Daemon::try_start(sockets.path(), arguments), case.start) {
        (Err(line), Start::Refuse) if REFUSALS.iter().any(|text| line.contains(text)) => {
            return None;
        }
        (Err(line), _) if case.may_lack && LACKS.iter().any(|text| line.contains(text)) => {
            return None;
        }
        (Err(line), _) => {
            outcome
                .problems
                .push(format!("the start is refused: {line}"));
            return None;
        }
        (Ok(_), Start::Refuse) => {
            outcome.problems.push("the start is not refused".into());
            return None;
        }
        (Ok(daemon), Start::Serve) => daemon,
    };
    let is_whole = case.has_records && !case.may_lack;
    let mut client = Client::connect(daemon.socket(), 1);
    let bytes = client.capacity_bytes();
    if !wanted.permits(bytes, case) {
        let problem = format!("the disk has {bytes} bytes, may have {:?}", case.sizes);
        outcome.problems.push(problem);
        return None;
    }
    let first = read_all(&mut client, wanted, "", case, outcome);
    let mut monitor = Monitor::connect(&monitor);
    if is_whole {
        wait_until_recovered(&mut monitor, outcome);
    }
    let second = read_all(&mut client, wanted, "later ", case, outcome);
    if is_whole && first != second {
        outcome
            .problems
            .push("a second read returns something else".into());
    }
    if is_whole {
        check_state(&monitor.execute("query-quorum", json!({})), outcome);
    }
    drop(client);
    drop(monitor);
    let status = daemon.terminate();
    if !status.success() {
        outcome
            .problems
            .push(format!("the daemon ended with {status}"));
    }
    let paths: Vec<PathBuf> = replicas
        .iter()
        .map(|replica| images.join(name(*replica)))
        .collect();
    if is_whole {
        let mut bytes = vec![0; second.len()];
        for path in paths {
            // An image may be larger than the disk.
            let file = File::open(&path).expect("opening an image");
            file.read_exact_at(&mut bytes, 0).expect("reading an image");
            if bytes != second {
                let problem = format!("{} holds something else than was read", path.display());
                outcome.problems.push(problem);
            }
        }
    }
    let log = daemon.log();
    if case.is_sound && replicas == case.started {
        let copied = copied_as_a_whole(&log);
        let texts = copied.map(|replica| format!("replica {replica} has to be copied as a whole"));
        outcome.problems.extend(texts);
    }
    if !outcome.problems.is_empty() {
        outcome.problems.push(format!("the daemon says:\n{log}"));
    }
    Some(second)
}

/// Reads the whole disk, and checks what it holds. What cannot be read is zeroes in the result.
fn read_all(
    client: &mut Client,
    wanted: &Wanted,
    when: &str,
    case: &Case,
    outcome: &mut Outcome,
) -> Vec<u8> {
    let bytes = size(client.capacity_bytes());
    let mut all = vec![0; bytes];
    let mut problems = Vec::new();
    for first in (0..bytes).step_by(BATCH) {
        let end = bytes.min(first + BATCH);
        let starts = || (first..end).step_by(PART);
        let part = |from: usize| PART.min(end - from);
        let read = |from: usize| Request::Read {
            offset: from as u64,
            memory: from - first,
            len: part(from),
        };
        let reads: Vec<Request> = starts().map(read).collect();
        let results = client.run(0, &reads);
        all[first..end].copy_from_slice(&client.memory(0)[..end - first]);
        for (from, result) in starts().zip(results) {
            let place = from..from + part(from);
            if result.is_ok() {
                wanted.check(&all[place], from / SECTOR, &mut problems);
                continue;
            }
            for from in place.step_by(SECTOR) {
                let (sector, place) = (from / SECTOR, from..from + SECTOR);
                match client.read(0, from as u64, SECTOR) {
                    Ok(read) => {
                        wanted.check(&read, sector, &mut problems);
                        all[place].copy_from_slice(&read);
                    }
                    Err(failed) => {
                        all[place].fill(0);
                        if case.may_lack || !case.has_records && wanted.is_open(sector) {
                            outcome.unreadable += 1;
                        } else {
                            problems.push(format!("sector {sector}: {failed:?}"));
                        }
                    }
                }
            }
        }
    }
    let more = problems.len().saturating_sub(NAMED_MAX);
    problems.truncate(NAMED_MAX);
    let named = problems
        .iter()
        .map(|problem| format!("{when}read: {problem}"));
    outcome.problems.extend(named);
    if more > 0 {
        outcome.problems.push(format!("and {more} more sectors"));
    }
    all
}

/// Waits until nothing is unrecovered and no job runs.
fn wait_until_recovered(monitor: &mut Monitor, outcome: &mut Outcome) {
    let mut state = Value::Null;
    let mut jobs = Value::Null;
    let recovered = wait_until(HANG_LIMIT, || {
        jobs = monitor.execute("query-jobs", json!({}));
        state = monitor.execute("query-quorum", json!({}));
        let replicas = state["replicas"].as_array().into_iter().flatten();
        let mut wanting = replicas
            .filter(|replica| !matches!(replica["state"].as_str(), Some("in-service" | "missing")));
        jobs.as_array().is_some_and(Vec::is_empty)
            && state["unrecovered-bytes"] == 0
            && wanting.next().is_none()
    });
    if !recovered {
        outcome
            .problems
            .push(format!("not recovered: {state:#} {jobs:#}"));
    }
}

/// No replica was accused of anything, and no request has failed.
fn check_state(state: &Value, outcome: &mut Outcome) {
    let nothing = json!({"read": 0, "write": 0, "flush": 0});
    if state["failures"] != nothing {
        outcome
            .problems
            .push(format!("failures: {}", state["failures"]));
    }
    for replica in state["replicas"].as_array().into_iter().flatten() {
        let is_missing = replica["state"] == "missing";
        if replica["corrupt-sectors-found"] != 0 || replica["errors"] != nothing && !is_missing {
            outcome
                .problems
                .push(format!("a replica is accused: {replica}"));
        }
    }
}
