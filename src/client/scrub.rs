//! `scrub`, `resync` and `prefer`: start a job and wait for its end.

use serde_json::{Value, json};

use super::arguments::JobOptions;
use super::connection::parse_reply;
use super::format::printable;
use super::replies::StartedJob;
use super::wait::{Awaited, wait};
use super::{Context, Error, Outcome};

pub(super) fn scrub(
    context: &mut Context<'_>,
    repair: bool,
    job: &JobOptions,
) -> Result<Outcome, Error> {
    let arguments = json!({ "repair": repair, "speed": job.speed.0 });
    run(context, "quorum-scrub", arguments, job.detach)
}

pub(super) fn resync(
    context: &mut Context<'_>,
    node: &str,
    job: &JobOptions,
) -> Result<Outcome, Error> {
    let arguments = json!({ "node-name": node, "speed": job.speed.0 });
    run(context, "quorum-resync", arguments, job.detach)
}

pub(super) fn prefer(
    context: &mut Context<'_>,
    node: &str,
    force: bool,
    job: &JobOptions,
) -> Result<Outcome, Error> {
    let arguments = json!({ "node-name": node, "force": force, "speed": job.speed.0 });
    run(context, "quorum-prefer", arguments, job.detach)
}

fn run(
    context: &mut Context<'_>,
    command: &str,
    arguments: Value,
    detach: bool,
) -> Result<Outcome, Error> {
    let reply = context.connection.execute(command, arguments)?;
    let started: StartedJob = parse_reply(command, reply)?;
    if detach {
        writeln!(context.out, "{} started", printable(&started.id))?;
        return Ok(Outcome::Good);
    }
    wait_for(context, &started.id)
}

/// Waits for the end of a job and prints it.
pub(super) fn wait_for(context: &mut Context<'_>, id: &str) -> Result<Outcome, Error> {
    let interrupted = |name: &str| {
        format!("{name} continues; to wait for it again: quorum-blkctl jobs wait {name}")
    };
    let ended = wait(context, Awaited::Job(id), interrupted)?;
    ended.write(context.out, context.terminal)?;
    Ok(ended.outcome())
}
