//! `cont`: the cause of the errors is gone, the held requests may go on.

use serde::Deserialize;
use serde_json::json;

use super::connection::parse_reply;
use super::format::printable;
use super::replies::Disk;
use super::{Context, Error, Outcome};
use crate::common::message::counted;

/// The reply to query-status.
#[derive(Deserialize)]
struct Status {
    running: bool,
}

pub(super) fn run(context: &mut Context<'_>) -> Result<Outcome, Error> {
    let state = context.connection.execute("query-quorum", json!({}))?;
    let disk: Disk = parse_reply("query-quorum", state)?;
    context.connection.execute("cont", json!({}))?;
    let name = printable(&disk.node_name);
    if disk.held_requests == 0 {
        writeln!(context.out, "{name} holds no requests")?;
        return Ok(Outcome::Good);
    }
    let status = context.connection.execute("query-status", json!({}))?;
    let status: Status = parse_reply("query-status", status)?;
    let requests = counted(disk.held_requests, "request");
    writeln!(context.out, "{name} submits {requests} again")?;
    if !status.running {
        writeln!(context.out, "not all have ended yet: quorum-blkctl status")?;
    }
    Ok(Outcome::Good)
}
