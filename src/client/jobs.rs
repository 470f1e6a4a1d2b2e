//! `jobs`: lists the jobs and controls them.

use std::io::Write;

use serde_json::json;

use super::arguments::JobCommand;
use super::connection::parse_reply;
use super::format::{percent, printable, printable_json, size, timestamp};
use super::replies::{EndedJob, Job};
use super::scrub::wait_for;
use super::table::Table;
use super::terminal::{Style, Terminal};
use super::wait::{has_ended, job_exists};
use super::{Context, Error, Outcome};

pub(super) fn run(
    context: &mut Context<'_>,
    json: bool,
    all: bool,
    command: Option<JobCommand>,
) -> Result<Outcome, Error> {
    let connection = &mut context.connection;
    match command {
        None if all => return list_all(context, json),
        None => return list(context, json),
        Some(JobCommand::Pause { id }) => connection.execute("job-pause", json!({ "id": id }))?,
        Some(JobCommand::Resume { id }) => connection.execute("job-resume", json!({ "id": id }))?,
        Some(JobCommand::Cancel { id }) => connection.execute("job-cancel", json!({ "id": id }))?,
        Some(JobCommand::Speed { id, rate }) => {
            let arguments = json!({ "device": id, "speed": rate.0 });
            connection.execute("block-job-set-speed", arguments)?
        }
        Some(JobCommand::Wait { id }) => {
            if !job_exists(connection, &id)? {
                // Scripts wait for a job that may have ended already.
                let ended = has_ended(connection, &id)?;
                ended.write(context.out, context.terminal)?;
                return Ok(ended.outcome());
            }
            return wait_for(context, &id);
        }
    };
    Ok(Outcome::Good)
}

fn list(context: &mut Context<'_>, json: bool) -> Result<Outcome, Error> {
    let reply = context.connection.execute("query-jobs", json!({}))?;
    if json {
        writeln!(context.out, "{}", printable_json(&reply))?;
        return Ok(Outcome::Good);
    }
    let jobs: Vec<Job> = parse_reply("query-jobs", reply)?;
    if jobs.is_empty() {
        writeln!(context.out, "no jobs")?;
    } else {
        write_table(context.out, &jobs, context.terminal)?;
    }
    Ok(Outcome::Good)
}

/// The jobs that have ended, and those that have not.
fn list_all(context: &mut Context<'_>, json: bool) -> Result<Outcome, Error> {
    let mut ended = context.connection.execute("query-quorum-jobs", json!({}))?;
    let mut running = context.connection.execute("query-jobs", json!({}))?;
    if json {
        let all = json!({ "query-quorum-jobs": ended.take(), "query-jobs": running.take() });
        writeln!(context.out, "{}", printable_json(&all))?;
        return Ok(Outcome::Good);
    }
    let ended: Vec<EndedJob> = parse_reply("query-quorum-jobs", ended)?;
    let running: Vec<Job> = parse_reply("query-jobs", running)?;
    for job in &ended {
        let at = timestamp(job.timestamp.seconds, job.timestamp.microseconds);
        let at = at.map_or_else(|| "-".to_owned(), |at| at.replace('T', " "));
        let second = at.split('.').next().unwrap_or_default();
        let before = match job.before_start {
            true => ", before the daemon started",
            false => "",
        };
        writeln!(context.out, "{second} UTC{before}")?;
        job.end().write(context.out, context.terminal)?;
    }
    // One may have ended between the two questions.
    let same = |ended: &EndedJob, job: &Job| !ended.before_start && ended.job.id == job.id;
    let is_running = |job: &Job| !ended.iter().any(|ended| same(ended, job));
    let running: Vec<_> = running.into_iter().filter(is_running).collect();
    if !running.is_empty() {
        write_table(context.out, &running, context.terminal)?;
    } else if ended.is_empty() {
        writeln!(context.out, "no jobs")?;
    }
    Ok(Outcome::Good)
}

/// Writes a line for each job.
pub(super) fn write_table(
    out: &mut dyn Write,
    jobs: &[Job],
    terminal: Terminal,
) -> Result<(), Error> {
    let mut table = Table::new(&[
        "job", "type", "replica", ">done", ">of", ">limit", ">found", ">written", "status",
    ]);
    table.may_leave_out(&["written", "found", "limit", "of"]);
    for job in jobs {
        table.row(job_row(job));
    }
    table.write(out, terminal)?;
    for job in jobs {
        if let Some(error) = &job.error {
            let text = format!("{}: {}", printable(&job.id), printable(error));
            for line in terminal.wrapped(0, 2, &text) {
                writeln!(out, "{}", terminal.paint(Style::Bad, line))?;
            }
        }
    }
    Ok(())
}

fn job_row(job: &Job) -> Vec<(String, Style)> {
    let plain = |text: String| (text, Style::Plain);
    let text_or_dash = |text: Option<&str>| text.map_or_else(|| "-".to_owned(), printable);
    let kind = job.r#type.strip_prefix("quorum-").unwrap_or(&job.r#type);
    let status_style = match job.status.as_str() {
        "running" => Style::Good,
        _ => Style::Warning,
    };
    let limit = match job.speed {
        0 => "-".to_owned(),
        speed => format!("{}/s", size(speed)),
    };
    let done = percent(job.current_progress, job.total_progress);
    vec![
        plain(printable(&job.id)),
        plain(printable(kind)),
        plain(text_or_dash(job.node_name.as_deref())),
        plain(format!("{done} %")),
        plain(size(job.total_progress)),
        plain(limit),
        plain((job.corrupt_sectors_found + job.unreadable_sectors_found).to_string()),
        plain(job.sectors_written.to_string()),
        (printable(&job.status), status_style),
    ]
}
