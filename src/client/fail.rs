//! `fail`: remove a replica whatever is lost with it, and say what.

use serde::Deserialize;
use serde_json::json;

use super::connection::parse_reply;
use super::format::{printable, size};
use super::replicas::find;
use super::replies::Disk;
use super::{Context, Error, Outcome};
use crate::common::SECTOR_BYTES;

/// The reply to quorum-fail.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Loss {
    lost_sectors: u64,
    doubtful_sectors: u64,
    not_durable_sectors: u64,
    undecided_sectors: u64,
}

impl Loss {
    /// A line for each kind of loss.
    fn lines(&self, node: &str) -> Vec<String> {
        let kinds = [
            (
                self.lost_sectors,
                format!("can be read no more without {node}, until the guest writes there"),
            ),
            (
                self.doubtful_sectors,
                "may get older data or no winner: the other copies are in doubt".into(),
            ),
            (
                self.not_durable_sectors,
                "would be lost by a crash of the host: not flushed on enough other replicas".into(),
            ),
            (
                self.undecided_sectors,
                format!("have old or new data since a failed write, and {node} votes no more"),
            ),
        ];
        let kinds = kinds.into_iter().filter(|(sectors, _)| *sectors > 0);
        let line = |(sectors, what): (u64, String)| {
            let bytes = size(sectors.saturating_mul(SECTOR_BYTES));
            format!("  {bytes} {what}")
        };
        kinds.map(line).collect()
    }
}

pub(super) fn run(context: &mut Context<'_>, node: &str, force: bool) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let old = find(&disk, node)?;
    let arguments = json!({ "node-name": node, "force": force });
    let reply = context.connection.execute("quorum-fail", arguments)?;
    let loss: Loss = parse_reply("quorum-fail", reply)?;
    let (node, file) = (printable(node), printable(&old.file));
    let lines = loss.lines(&node);
    if !force {
        return Err(Error::Failed(match lines.is_empty() {
            true => format!(
                "nothing would be lost with {node}, and nothing has changed; to remove it: \
                 quorum-blkctl remove {node}"
            ),
            false => format!(
                "this would be lost with {node}:\n{}\nnothing has changed; to remove it all the \
                 same: quorum-blkctl fail {node} --force",
                lines.join("\n")
            ),
        }));
    }
    writeln!(
        context.out,
        "removed {node}; its image {file} keeps its data"
    )?;
    if lines.is_empty() {
        writeln!(context.out, "nothing is lost with it")?;
    } else {
        writeln!(context.out, "this is lost with it:\n{}", lines.join("\n"))?;
    }
    writeln!(
        context.out,
        "leave it out of the daemon's command line from now on: its data gets old"
    )?;
    Ok(Outcome::Good)
}
