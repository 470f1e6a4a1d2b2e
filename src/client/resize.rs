//! `resize`: grows the disk while a guest uses it.

use serde_json::json;

use super::format::{NewSize, printable, size};
use super::replies::Disk;
use super::{Context, Error, Outcome};

pub(super) fn run(context: &mut Context<'_>, new: NewSize) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let bytes = match new {
        NewSize::Absolute(bytes) => bytes,
        NewSize::Grow(more) => disk.size.saturating_add(more),
    };
    if bytes < disk.size {
        return Err(Error::Failed(format!(
            "{} has {} bytes and cannot shrink to {bytes}; a disk can only grow",
            printable(&disk.node_name),
            disk.size
        )));
    }
    let arguments = json!({ "node-name": disk.node_name, "size": bytes });
    context.connection.execute("block_resize", arguments)?;
    let disk: Disk = context.connection.query("query-quorum")?;
    writeln!(
        context.out,
        "{} now has {} ({} bytes)",
        printable(&disk.node_name),
        size(disk.size),
        disk.size
    )?;
    Ok(Outcome::Good)
}
