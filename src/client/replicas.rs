//! `add`, `remove` and `replace`: replicas that come and go.
//!
//! Invariant: whatever fails, the last line says what the disk is made of now and how to go on; a
//! file that was made for nothing is removed again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::arguments::NewImage;
use super::format::{clean, size};
use super::shapes::{Disk, Replica};
use super::wait::{Awaited, wait};
use super::{Context, Error, Outcome};
use crate::common::message::{Quoted, Reason};

/// An image, checked, that is to be a replica.
struct Newcomer {
    path: PathBuf,
    node_name: String,
}

pub(super) fn add(
    context: &mut Context<'_>,
    image: &NewImage,
    detach: bool,
) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let new = bring_in(context, &disk, image)?;
    let name = clean(&new.node_name);
    if detach {
        writeln!(
            context.out,
            "{name} is a replica of {} and is being brought up to date",
            clean(&disk.node_name)
        )?;
        return Ok(Outcome::Well);
    }
    let goes_on =
        |job: &str| format!("{name} is a replica; {job}, which brings it up to date, goes on");
    let ended = wait(context, Awaited::ResyncOf(&new.node_name), goes_on)?;
    writeln!(context.out, "{}", ended.to_line())?;
    if !ended.is_success() {
        writeln!(
            context.out,
            "{name} is a replica, and not up to date; to go on: quorum-blkctl resync {name}; to go back: \
             quorum-blkctl remove {name}"
        )?;
    }
    Ok(ended.outcome())
}

pub(super) fn remove(context: &mut Context<'_>, node: &str) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let old = find(&disk, node)?;
    let arguments = json!({ "parent": disk.node_name, "child": node });
    context.connection.execute("x-blockdev-change", arguments)?;
    writeln!(
        context.out,
        "{} is removed; its image {} is left as it is",
        clean(node),
        clean(&old.file)
    )?;
    Ok(Outcome::Well)
}

pub(super) fn replace(
    context: &mut Context<'_>,
    old: &str,
    image: &NewImage,
) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let replaced = find(&disk, old)?;
    let new = bring_in(context, &disk, image)?;
    let (name, old_name) = (clean(&new.node_name), clean(old));
    writeln!(
        context.out,
        "{name} is a replica beside {old_name}, and is being brought up to date"
    )?;
    context.out.flush()?;
    let to_go_on = format!("to go on when it is up to date: quorum-blkctl remove {old_name}");
    let goes_on =
        |job: &str| format!("{name} and {old_name} are both replicas; {job} goes on; {to_go_on}");
    let ended = wait(context, Awaited::ResyncOf(&new.node_name), goes_on);
    let ended = ended.map_err(|error| match error {
        interrupted @ Error::Interrupted(_) => interrupted,
        Error::Closed => Error::Not(format!(
            "{}\n{name} and {old_name} were both replicas; one that is started again has those of its command line",
            Error::Closed
        )),
        other => Error::Not(format!(
            "{other}\n{name} and {old_name} are both replicas; {to_go_on}"
        )),
    })?;
    writeln!(context.out, "{}", ended.to_line())?;
    if !ended.is_success() {
        return not_up_to_date(context, &name, &old_name);
    }
    let arguments = json!({ "parent": disk.node_name, "child": old });
    context
        .connection
        .execute("x-blockdev-change", arguments)
        .map_err(|error| {
            Error::Not(format!(
                "{error}\n{name} is up to date, and {old_name} is still a replica; to go on: \
                 quorum-blkctl remove {old_name}"
            ))
        })?;
    writeln!(
        context.out,
        "{old_name} is replaced by {name}; its image {} is left as it is",
        clean(&replaced.file)
    )?;
    Ok(Outcome::Well)
}

fn not_up_to_date(context: &mut Context<'_>, name: &str, old_name: &str) -> Result<Outcome, Error> {
    writeln!(
        context.out,
        "{name} and {old_name} are both replicas, and {name} is not up to date; to go on: quorum-blkctl resync {name}, \
         then quorum-blkctl remove {old_name}; to go back: quorum-blkctl remove {name}"
    )?;
    Ok(Outcome::NotWell)
}

/// Makes the image a replica. If that fails nothing has changed.
fn bring_in(context: &mut Context<'_>, disk: &Disk, image: &NewImage) -> Result<Newcomer, Error> {
    let new = check(disk, image)?;
    if image.create {
        create(&new.path, disk.size)?;
    }
    let result = add_to_disk(context, disk, &new);
    if result.is_err() && image.create {
        // It is ours, and nobody has opened it.
        let _ = fs::remove_file(&new.path);
    }
    result.map(|()| new)
}

fn add_to_disk(context: &mut Context<'_>, disk: &Disk, new: &Newcomer) -> Result<(), Error> {
    let connection = &mut context.connection;
    let node = json!({ "driver": "file", "node-name": new.node_name, "filename": new.path });
    connection.execute("blockdev-add", node)?;
    let arguments = json!({ "parent": disk.node_name, "node": new.node_name });
    if let Err(error) = connection.execute("x-blockdev-change", arguments) {
        let forgotten = connection.execute("blockdev-del", json!({ "node-name": new.node_name }));
        let state = match forgotten {
            Ok(_) => "nothing has changed".to_owned(),
            Err(_) => format!(
                "the daemon may still know the node {}, which is no replica",
                clean(&new.node_name)
            ),
        };
        return Err(Error::Not(format!("{error}; {state}")));
    }
    Ok(())
}

fn check(disk: &Disk, image: &NewImage) -> Result<Newcomer, Error> {
    // The daemon has another working directory.
    let path = std::path::absolute(&image.file);
    let path =
        path.map_err(|error| Error::Not(format!("{}: {}", Quoted(&image.file), Reason(&error))))?;
    let not_text = || {
        Error::Not(format!(
            "{}: the monitor takes paths in UTF-8 only",
            Quoted(&image.file)
        ))
    };
    path.to_str().ok_or_else(not_text)?;
    let file_name = path.file_name().and_then(|name| name.to_str());
    let node_name = image
        .node_name
        .clone()
        .or_else(|| file_name.map(str::to_owned));
    let node_name =
        node_name.ok_or_else(|| Error::Not(format!("{} is no file", Quoted(&image.file))))?;
    let is_taken = |name: &String| *name == node_name;
    let mut names = disk.replicas.iter().map(|replica| &replica.node_name);
    if names.any(is_taken) || is_taken(&disk.node_name) {
        return Err(Error::Not(format!(
            "there is a node {} already; call the new replica something else with --node-name NAME",
            clean(&node_name)
        )));
    }
    Ok(Newcomer { path, node_name })
}

/// Makes a sparse file.
fn create(path: &Path, bytes: u64) -> Result<(), Error> {
    let not = |error: std::io::Error| {
        let what = format!("{} of {}", Quoted(path), size(bytes));
        Error::Not(format!(
            "cannot create {what}: {}; nothing has changed",
            Reason(&error)
        ))
    };
    let file = File::create_new(path).map_err(not)?;
    file.set_len(bytes).map_err(|error| {
        let _ = fs::remove_file(path);
        not(error)
    })
}

fn find<'a>(disk: &'a Disk, node: &str) -> Result<&'a Replica, Error> {
    let found = disk
        .replicas
        .iter()
        .find(|replica| replica.node_name == node);
    found.ok_or_else(|| {
        let names = disk
            .replicas
            .iter()
            .map(|replica| clean(&replica.node_name));
        Error::Not(format!(
            "there is no replica {}; there are {}",
            clean(node),
            names.collect::<Vec<_>>().join(", ")
        ))
    })
}
