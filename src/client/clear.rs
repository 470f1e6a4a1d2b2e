//! `clear`: the operator has seen the errors.

use serde_json::json;

use super::format::printable;
use super::{Context, Error, Outcome};

pub(super) fn run(context: &mut Context<'_>, node: Option<&str>) -> Result<Outcome, Error> {
    let arguments = match node {
        Some(node) => json!({ "node-name": node }),
        None => json!({}),
    };
    context
        .connection
        .execute("quorum-clear-errors", arguments)?;
    match node {
        Some(node) => writeln!(context.out, "cleared the errors of {}", printable(node))?,
        None => writeln!(
            context.out,
            "cleared the I/O errors of the guest and the errors of all replicas"
        )?,
    }
    Ok(Outcome::Good)
}
