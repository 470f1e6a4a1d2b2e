//! `threshold`: how many replicas must agree.

use serde_json::json;

use super::format::printable;
use super::replies::Disk;
use super::{Context, Error, Outcome};

/// A vote threshold as written.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewThreshold {
    Given(u64),
    /// It follows the number of replicas.
    Majority,
}

/// Parses a number of replicas, or `majority`.
pub(super) fn parse(text: &str) -> Result<NewThreshold, String> {
    match text.parse() {
        _ if text == "majority" => Ok(NewThreshold::Majority),
        Ok(threshold) if threshold > 0 => Ok(NewThreshold::Given(threshold)),
        _ => Err("expected a number of replicas, at least 1, or majority".into()),
    }
}

pub(super) fn run(context: &mut Context<'_>, new: NewThreshold) -> Result<Outcome, Error> {
    let arguments = match new {
        NewThreshold::Given(threshold) => json!({ "vote-threshold": threshold }),
        NewThreshold::Majority => json!({ "majority": true }),
    };
    context
        .connection
        .execute("quorum-set-threshold", arguments)?;
    let disk: Disk = context.connection.query("query-quorum")?;
    let (now, wanted) = (disk.vote_threshold, disk.wanted_vote_threshold);
    let (name, replicas) = (printable(&disk.node_name), disk.replicas.len() as u64);
    writeln!(context.out, "{name}: {now} of {replicas} must agree")?;
    if wanted > now {
        writeln!(
            context.out,
            "It becomes {wanted} when enough replicas are up to date; see quorum-blkctl status."
        )?;
    }
    if wanted.saturating_mul(2) <= replicas {
        writeln!(
            context.out,
            "With {wanted} of {replicas}, two versions of a sector may have enough votes: more \
             votes win, then the replica listed first."
        )?;
    }
    if wanted == replicas && replicas > 1 {
        writeln!(
            context.out,
            "With {wanted} of {replicas}, the guest gets an I/O error when one replica fails."
        )?;
    }
    let (option, other) = match new {
        NewThreshold::Given(threshold) => (format!("--vote-threshold {threshold}"), "another "),
        NewThreshold::Majority => ("no --vote-threshold".into(), ""),
    };
    let is_given = matches!(new, NewThreshold::Given(_));
    if !disk.records || is_given && wanted > now {
        // The records have the threshold that is in force.
        let before = if disk.records { " before that" } else { "" };
        writeln!(
            context.out,
            "A restart{before} forgets this: give the command line of quorum-blkd {option}."
        )?;
    } else {
        writeln!(
            context.out,
            "The next start has it too, unless its command line has {other}--vote-threshold."
        )?;
    }
    Ok(Outcome::Good)
}
