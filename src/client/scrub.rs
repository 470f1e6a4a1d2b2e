//! `scrub` and `resync`: jobs that somebody asks for.

use serde_json::{Value, json};

use super::arguments::JobOptions;
use super::connection::understand;
use super::format::clean;
use super::shapes::Begun;
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

fn run(
    context: &mut Context<'_>,
    command: &str,
    arguments: Value,
    detach: bool,
) -> Result<Outcome, Error> {
    let begun: Begun = understand(command, context.connection.execute(command, arguments)?)?;
    if detach {
        writeln!(context.out, "{} has begun", clean(&begun.id))?;
        return Ok(Outcome::Well);
    }
    wait_for(context, &begun.id)
}

/// Waits for the end of a job and tells it.
pub(super) fn wait_for(context: &mut Context<'_>, id: &str) -> Result<Outcome, Error> {
    let goes_on = |name: &str| {
        format!("{name} goes on; to wait for it again: quorum-blkctl jobs wait {name}")
    };
    let ended = wait(context, Awaited::Job(id), goes_on)?;
    writeln!(context.out, "{}", ended.to_line())?;
    Ok(ended.outcome())
}
