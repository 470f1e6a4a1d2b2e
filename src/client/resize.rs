//! `resize`: a disk that grows while it is used.

use serde_json::json;

use super::format::{NewSize, clean, size};
use super::shapes::Disk;
use super::{Context, Error, Outcome};

pub(super) fn run(context: &mut Context<'_>, new: NewSize) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let bytes = match new {
        NewSize::Of(bytes) => bytes,
        NewSize::More(more) => disk.size.saturating_add(more),
    };
    if bytes < disk.size {
        return Err(Error::Not(format!(
            "{} has {} bytes; a disk can grow, not shrink to {bytes}",
            clean(&disk.node_name),
            disk.size
        )));
    }
    let arguments = json!({ "node-name": disk.node_name, "size": bytes });
    context.connection.execute("block_resize", arguments)?;
    let disk: Disk = context.connection.query("query-quorum")?;
    writeln!(
        context.out,
        "{} has {} now ({} bytes)",
        clean(&disk.node_name),
        size(disk.size),
        disk.size
    )?;
    Ok(Outcome::Well)
}
