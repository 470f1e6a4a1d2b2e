//! An operator who administers the disk while it is used: it is scrubbed, grows, gets one replica
//! more, and loses that again.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::fuse::logged::{Clock, Moment};
use testkit::images::Random;
use testkit::monitor::Monitor;
use testkit::process::wait_until;

use crate::laboratory::name;

/// How long a command is waited for before it is asked whether the new replica is complete.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How long a copy is waited for that may never end, since a replica fails.
const COPY_LIMIT: Duration = Duration::from_secs(2);
/// By how much the disk grows at a time.
pub(crate) const GROWTH_BYTES: u64 = 1 << 20;

/// What an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Scrub,
    /// To so many bytes.
    Grow(u64),
    /// Adds the spare replica.
    Add,
    /// Removes it.
    Remove,
}

/// What is known of the spare replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spare {
    /// It is none of the disk, and never was.
    Unused,
    /// It is being added or removed, or is not complete.
    Unsure,
    /// It is a member, and complete.
    Member,
    /// It was removed.
    Removed,
}

/// What an operator has done, and when.
#[derive(Debug, Default)]
pub(crate) struct Administration {
    /// Sizes of the disk in bytes: when each was asked for, and when it was there.
    sizes: Vec<(u64, Moment, Option<Moment>)>,
    /// What becomes of the spare replica.
    spare: Vec<(Moment, Option<Spare>)>,
}

impl Administration {
    /// Of a disk that may have these sizes in bytes, the first of which is sure.
    pub(crate) fn of(sizes: &[u64]) -> Self {
        let sizes = sizes.iter().enumerate();
        let sizes = sizes.map(|(place, bytes)| (*bytes, 0, (place == 0).then_some(0)));
        Self {
            sizes: sizes.collect(),
            spare: Vec::new(),
        }
    }

    /// The sizes in bytes that the disk may have if the power fails at `moment`.
    pub(crate) fn sizes(&self, moment: Moment) -> Vec<u64> {
        let is_there = |end: Option<Moment>| end.is_some_and(|end| end <= moment);
        let there = self.sizes.iter().rposition(|(_, _, end)| is_there(*end));
        let sizes = self.sizes[there.unwrap_or(0)..].iter();
        let begun = sizes.filter(|(_, begin, _)| *begin <= moment);
        begun.map(|(bytes, ..)| *bytes).collect()
    }

    /// The size that was there last.
    pub(crate) fn size(&self) -> u64 {
        let mut there = self.sizes.iter().filter(|(_, _, end)| end.is_some());
        there.next_back().map_or(0, |(bytes, ..)| *bytes)
    }

    /// What is known of the spare replica if the power fails at `moment`.
    pub(crate) fn spare(&self, moment: Moment) -> Spare {
        let mut before = self.spare.iter().filter(|(at, _)| *at <= moment);
        let last = before.next_back().map(|(_, spare)| *spare);
        last.unwrap_or(Some(Spare::Unused)).unwrap_or(Spare::Unsure)
    }
}

/// What an operator does, and before which step of the work: the disk grows twice from `bytes`.
pub(crate) fn plan(bytes: u64, steps: u64, random: &mut Random) -> Vec<(u64, Act)> {
    let add = random.within(0..steps / 2);
    let first = random.within(0..steps);
    let mut plan = vec![
        (random.within(0..steps), Act::Scrub),
        (random.within(0..steps), Act::Scrub),
        (first, Act::Grow(bytes + GROWTH_BYTES)),
        (
            random.within(first..steps),
            Act::Grow(bytes + 2 * GROWTH_BYTES),
        ),
        (add, Act::Add),
    ];
    if random.within(0..2) == 0 {
        plan.push((random.within(add..steps), Act::Remove));
    }
    plan
}

/// Carries out acts, until there are no more, and waits until the spare replica is copied.
/// Commands may fail, and the copy too, if a replica `may_fail`.
pub(crate) fn work(
    monitor: &Path,
    (images, spare): (&Path, usize),
    clock: &Clock,
    acts: &Receiver<Act>,
    administration: &Mutex<Administration>,
    may_fail: bool,
) {
    let mut monitor = Monitor::connect(monitor);
    let spare = name(spare);
    let mut is_copied = false;
    let administration = || -> MutexGuard<'_, Administration> {
        administration.lock().expect("another thread failed")
    };
    let run = |monitor: &mut Monitor, command: &str, arguments: Value| {
        let result = monitor.try_execute(command, arguments);
        assert!(may_fail || result.is_ok(), "{command}: {result:?}");
        result.is_ok()
    };
    let note = |what| administration().spare.push((clock.tick(), what));
    loop {
        let act = acts.recv_timeout(POLL_INTERVAL);
        if is_copied && is_complete(&mut monitor, &spare) {
            is_copied = false;
            note(Some(Spare::Member));
        }
        match act {
            Ok(Act::Scrub) => {
                run(&mut monitor, "quorum-scrub", json!({ "repair": true }));
            }
            Ok(Act::Grow(bytes)) => {
                let begin = clock.tick();
                administration().sizes.push((bytes, begin, None));
                let arguments = json!({ "device": "quorum0", "size": bytes });
                let has_grown = run(&mut monitor, "block_resize", arguments);
                let end = has_grown.then(|| clock.tick());
                let mut administration = administration();
                administration.sizes.last_mut().expect("pushed").2 = end;
            }
            Ok(Act::Add) => {
                let file = json!({ "driver": "file", "filename": images.join(&spare) });
                let node = json!({ "driver": "raw", "node-name": spare, "file": file });
                monitor.execute("blockdev-add", node);
                note(None);
                let arguments = json!({ "parent": "quorum0", "node": spare });
                is_copied = run(&mut monitor, "x-blockdev-change", arguments);
            }
            Ok(Act::Remove) => {
                is_copied = false;
                note(None);
                let arguments = json!({ "parent": "quorum0", "child": spare });
                if run(&mut monitor, "x-blockdev-change", arguments) {
                    note(Some(Spare::Removed));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let limit = if may_fail { COPY_LIMIT } else { HANG_LIMIT };
    if is_copied {
        let is_complete = wait_until(limit, || is_complete(&mut monitor, &spare));
        assert!(may_fail || is_complete, "the replica is not copied");
        note(is_complete.then_some(Spare::Member));
    }
}

/// Whether a replica has been copied.
fn is_complete(monitor: &mut Monitor, name: &str) -> bool {
    let state = monitor.execute("query-quorum", json!({}));
    let mut replicas = state["replicas"].as_array().into_iter().flatten();
    replicas.any(|replica| replica["node-name"] == name && replica["state"] == "in-service")
}
