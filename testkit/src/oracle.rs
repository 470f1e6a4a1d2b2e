//! The expected result of a request to a voted disk, computed in the slow and obvious way; and the
//! reasons for which the peer may return another.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Value, json};

use crate::plan::{Plan, node_name};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A request, and the faults of the replicas while it is served.
#[derive(Clone, Debug)]
pub struct Step {
    /// The request.
    pub action: Action,
    /// The replicas that fail it, each with its errno: every read while the step takes, but one
    /// write or flush only.
    pub failing: BTreeMap<usize, i32>,
}

/// A request; sectors are given by number.
#[derive(Clone, Debug)]
pub enum Action {
    /// Read.
    Read(Range<usize>),
    /// Write this byte, which is never the same twice in a row.
    Write(Range<usize>, u8),
    /// Flush.
    Flush,
}

/// Everything that can be seen of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What the client gets: data, or an error.
    pub result: Result<Vec<u8>, i32>,
    /// The events, in no order: what both systems say in them.
    pub events: Vec<String>,
    /// What the replicas hold then.
    pub contents: Vec<Vec<u8>>,
}

/// Why the peer gives something else. There is no other reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Improvement {
    /// No t replicas agree on the whole request, and there the peer stops: an error for the client,
    /// no replica reported, none repaired. Here every sector has its own vote.
    SectorsDecideOneByOne,
    /// t ≤ N/2, so that more than one version of a sector can have t votes. The peer takes one
    /// version for the whole request, of several with the most votes the one it saw last. Here
    /// each sector takes the one with the most votes, then the one of the replica listed first.
    MostVotesThenFirstListed,
    /// The peer repairs only what lost a vote. Here the winner is also written where a replica
    /// could not read.
    UnreadableIsRepaired,
    /// The peer has no event for a flush, or a read with `read-pattern=fifo`, that failed on too
    /// many replicas. Here every request that fails for the client is a QUORUM_FAILURE.
    EveryFailureIsReported,
}

/// What must be seen of `step` on replicas that hold `contents`.
pub fn expected(plan: &Plan, step: &Step, contents: &[Vec<u8>]) -> Seen {
    let mut seen = Seen {
        result: Ok(Vec::new()),
        events: Vec::new(),
        contents: contents.to_vec(),
    };
    seen.events.extend(bad_events(step));
    let working = plan.replicas - step.failing.len();
    match &step.action {
        Action::Read(sectors) if plan.fifo => {
            let first = (0..plan.replicas).find(|replica| !step.failing.contains_key(replica));
            // The replicas after the first that works are not asked.
            seen.events.truncate(first.unwrap_or(plan.replicas));
            seen.result = first
                .map(|replica| contents[replica][bytes(sectors)].to_vec())
                .ok_or(libc::EIO);
        }
        Action::Read(_) if working < plan.threshold => seen.result = Err(libc::EIO),
        Action::Read(sectors) => seen.vote(plan, step, sectors.clone()),
        Action::Write(sectors, byte) => {
            for (replica, content) in seen.contents.iter_mut().enumerate() {
                if !step.failing.contains_key(&replica) {
                    content[bytes(sectors)].fill(*byte);
                }
            }
            if working < plan.threshold {
                seen.result = Err(libc::EIO);
            }
        }
        Action::Flush if working < plan.threshold => seen.result = Err(libc::EIO),
        Action::Flush => {}
    }
    if seen.result.is_err() {
        seen.events.push(failure(step));
    }
    seen.events.sort();
    seen
}

/// The events for the replicas that fail `step`, as [`text_of`] writes them.
pub fn bad_events(step: &Step) -> impl Iterator<Item = String> {
    let failing = step.failing.iter();
    failing.map(|(replica, errno)| bad(step, *replica, Some(*errno)))
}

impl Seen {
    fn vote(&mut self, plan: &Plan, step: &Step, sectors: Range<usize>) {
        let voters = voters(plan, step);
        let (mut data, mut accused, mut undecided) = (Vec::new(), Vec::new(), false);
        for sector in sectors {
            let place = bytes(&(sector..sector + 1));
            let version = |replica: usize| self.contents[replica][place.clone()].to_vec();
            let Some(winner) = winner(plan, &voters, version) else {
                undecided = true;
                continue;
            };
            for (replica, content) in self.contents.iter_mut().enumerate() {
                if content[place.clone()] == winner {
                    continue;
                }
                // One that fails the read of any part of the range fails to read this sector (R4).
                if voters.contains(&replica) {
                    accused.push(replica);
                }
                if plan.rewrite_corrupted {
                    content[place.clone()].copy_from_slice(&winner);
                }
            }
            data.extend(winner);
        }
        accused.sort_unstable();
        accused.dedup();
        self.events
            .extend(accused.iter().map(|replica| bad(step, *replica, None)));
        self.result = if undecided { Err(libc::EIO) } else { Ok(data) };
    }
}

fn voters(plan: &Plan, step: &Step) -> Vec<usize> {
    (0..plan.replicas)
        .filter(|replica| !step.failing.contains_key(replica))
        .collect()
}

/// The version with the most votes, at least t; of several the one that is held by the replica
/// listed first.
fn winner(plan: &Plan, voters: &[usize], version: impl Fn(usize) -> Vec<u8>) -> Option<Vec<u8>> {
    let mut best: Option<(usize, Vec<u8>)> = None;
    for &replica in voters {
        let candidate = version(replica);
        let votes = voters
            .iter()
            .filter(|other| version(**other) == candidate)
            .count();
        if votes >= plan.threshold && best.as_ref().is_none_or(|(most, _)| votes > *most) {
            best = Some((votes, candidate));
        }
    }
    best.map(|(_, version)| version)
}

/// Why the peer may differ in `step` on replicas that hold `contents`, if it may.
pub fn improvement(plan: &Plan, step: &Step, contents: &[Vec<u8>]) -> Option<Improvement> {
    let voters = voters(plan, step);
    match &step.action {
        Action::Read(sectors) if !plan.fifo && voters.len() >= plan.threshold => {
            let version = |replica: usize| contents[replica][bytes(sectors)].to_vec();
            let Some(winner) = winner(plan, &voters, version) else {
                return Some(Improvement::SectorsDecideOneByOne);
            };
            let mut failing = step.failing.keys();
            if !agree(&voters, sectors, contents) && 2 * plan.threshold <= plan.replicas {
                Some(Improvement::MostVotesThenFirstListed)
            } else if plan.rewrite_corrupted && failing.any(|replica| version(*replica) != winner) {
                Some(Improvement::UnreadableIsRepaired)
            } else {
                None
            }
        }
        Action::Read(_) if plan.fifo && voters.is_empty() => {
            Some(Improvement::EveryFailureIsReported)
        }
        Action::Flush if voters.len() < plan.threshold => Some(Improvement::EveryFailureIsReported),
        _ => None,
    }
}

/// Whether ours does `step`, which some replicas fail, a second time under the lock of its range,
/// where they are then read in smaller parts (R4).
pub fn is_confirmed(plan: &Plan, step: &Step, contents: &[Vec<u8>]) -> bool {
    let Action::Read(sectors) = &step.action else {
        return false;
    };
    let voters = voters(plan, step);
    let is_doubted = plan.rewrite_corrupted
        || voters.len() < plan.threshold
        || !agree(&voters, sectors, contents);
    !plan.fifo && !step.failing.is_empty() && is_doubted
}

fn agree(voters: &[usize], sectors: &Range<usize>, contents: &[Vec<u8>]) -> bool {
    let version = |replica: usize| &contents[replica][bytes(sectors)];
    let mut pairs = voters.windows(2);
    pairs.all(|pair| version(pair[0]) == version(pair[1]))
}

/// The bytes of some sectors.
pub fn bytes(sectors: &Range<usize>) -> Range<usize> {
    sectors.start * SECTOR..sectors.end * SECTOR
}

/// A QUORUM_REPORT_BAD, as [`text_of`] has it.
fn bad(step: &Step, replica: usize, errno: Option<i32>) -> String {
    let operation = match step.action {
        Action::Read(_) => "read",
        Action::Write(..) => "write",
        Action::Flush => "flush",
    };
    let mut data = json!({"node-name": node_name(replica), "type": operation});
    data["error"] = errno.map(text_of_errno).into();
    with_range(&mut data, step);
    text_of(&json!({"event": "QUORUM_REPORT_BAD", "data": data}))
}

/// A QUORUM_FAILURE, as [`text_of`] has it.
fn failure(step: &Step) -> String {
    let mut data = json!({"reference": "quorum0"});
    with_range(&mut data, step);
    text_of(&json!({"event": "QUORUM_FAILURE", "data": data}))
}

fn with_range(data: &mut Value, step: &Step) {
    let (Action::Read(sectors) | Action::Write(sectors, _)) = &step.action else {
        data["sector-num"] = 0.into();
        return;
    };
    data["sector-num"] = sectors.start.into();
    data["sectors-count"] = sectors.len().into();
}

/// What both systems say in an event. A flush has no range: the peer gives the whole disk there.
pub fn text_of(event: &Value) -> String {
    let data = &event["data"];
    let name = event["event"].as_str().unwrap_or_default();
    let is_flush = data["type"] == "flush" || data["sectors-count"].as_u64().unwrap_or(0) == 0;
    let mut text = name.to_owned();
    // The peer has no type in QUORUM_FAILURE, and only the text of an errno; none: corrupt data.
    let members: &[&str] = match name {
        "QUORUM_FAILURE" => &["reference"],
        _ => &["node-name", "error", "type"],
    };
    let range = ["sector-num", "sectors-count"];
    let members = members.iter().chain(range.iter().filter(|_| !is_flush));
    for member in members {
        text.push_str(&format!(" {member}={}", data[member]));
    }
    text
}

/// What the operating system says of an errno.
pub fn text_of_errno(errno: i32) -> String {
    let error = std::io::Error::from_raw_os_error(errno).to_string();
    let end = error.find(" (os error").unwrap_or(error.len());
    error[..end].to_owned()
}
