//! `forget`: takes images out of their disk. It needs no daemon, and none may have them open.

use std::io::Write;
use std::path::PathBuf;

use super::format::{printable, size};
use super::{Error, Outcome};
use crate::common::SECTOR_BYTES;
use crate::common::message::Quoted;
use crate::inspect::ReplicaSource;
use crate::inspect::forget::{Forgotten, forget};

pub(super) fn run(
    images: &[ReplicaSource],
    state_directory: Option<PathBuf>,
    out: &mut dyn Write,
) -> Result<Outcome, Error> {
    let mut forgotten = Vec::new();
    let result = forget(images, state_directory, |image| forgotten.push(image));
    for image in &forgotten {
        for line in lines(image) {
            writeln!(out, "{line}")?;
        }
    }
    result.map_err(|error| Error::Failed(error.to_string()))?;
    Ok(Outcome::Good)
}

fn lines(image: &Forgotten) -> Vec<String> {
    let path = printable(&image.path);
    let Some([from, to]) = &image.record else {
        return vec![format!("{path} has no record: it is part of no disk")];
    };
    let mut lines = vec![format!("{path} is part of no disk any more")];
    if let Some(replica) = &image.replica {
        let (name, disk) = (printable(&replica.node_name), replica.disk);
        if replica.members > 1 {
            lines.push(format!(
                "  disk {disk} counts {name} as missing until it is removed there"
            ));
        }
        if replica.stale_sectors > 0 {
            let bytes = size(replica.stale_sectors.saturating_mul(SECTOR_BYTES));
            lines.push(format!(
                "  it lacks the newest data in {bytes}, which nothing remembers any more"
            ));
        }
    }
    lines.push("  a start with it alone makes a new disk of what it holds".to_owned());
    lines.push(format!(
        "  to undo this, before anything writes to it: mv -n {} {}",
        Quoted(to),
        Quoted(from)
    ));
    lines
}
