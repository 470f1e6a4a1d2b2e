//! `add`, `remove` and `replace`: change the set of replicas.
//!
//! A replica may take the name of the one it replaces. It has another name as long as both are
//! replicas, and is renamed at the end.
//!
//! Invariant: when a step fails, the last line says which replicas the disk has and how to
//! continue; a file that `--create` created is removed if it does not become a replica.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::arguments::NewImage;
use super::format::{printable, size};
use super::replies::{Disk, Replica};
use super::wait::{Awaited, wait};
use super::{Context, Error, Outcome};
use crate::common::message::{Quoted, Reason};

/// A checked image that is to become a replica.
struct NewReplica {
    path: PathBuf,
    node_name: String,
}

pub(super) fn add(
    context: &mut Context<'_>,
    image: &NewImage,
    detach: bool,
) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let new = check(image)?;
    check_name(&disk, &new.node_name)?;
    add_replica(context, &disk, image, &new)?;
    let name = printable(&new.node_name);
    if detach {
        let disk = printable(&disk.node_name);
        writeln!(
            context.out,
            "{name} is a replica of {disk}; its resync runs"
        )?;
        return Ok(Outcome::Good);
    }
    let interrupted = |job: &str| format!("{name} is a replica; {job}, its resync, continues");
    let ended = wait(context, Awaited::ResyncOf(&new.node_name), interrupted)?;
    ended.write(context.out, context.terminal)?;
    if !ended.is_success() {
        writeln!(
            context.out,
            "{name} is a replica but not up to date; to continue: quorum-blkctl resync {name}; \
             to undo: quorum-blkctl remove {name}"
        )?;
    }
    Ok(ended.outcome())
}

pub(super) fn remove(context: &mut Context<'_>, node: &str) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let old = find(&disk, node)?;
    let arguments = json!({ "parent": disk.node_name, "child": node });
    context.connection.execute("x-blockdev-change", arguments)?;
    let (node, file) = (printable(node), printable(&old.file));
    writeln!(
        context.out,
        "removed {node}; its image {file} keeps its data"
    )?;
    // A daemon that is started with it again would let old data vote.
    writeln!(
        context.out,
        "leave it out of the daemon's command line from now on: its data gets old"
    )?;
    Ok(Outcome::Good)
}

pub(super) fn replace(
    context: &mut Context<'_>,
    old: &str,
    image: &NewImage,
) -> Result<Outcome, Error> {
    let disk: Disk = context.connection.query("query-quorum")?;
    let replaced = find(&disk, old)?;
    let mut new = check(image)?;
    let takes_name = new.node_name == old;
    if takes_name {
        new.node_name = free_name(&disk, old);
    } else {
        check_name(&disk, &new.node_name)?;
    }
    add_replica(context, &disk, image, &new)?;
    let (name, old_name) = (printable(&new.node_name), printable(old));
    writeln!(
        context.out,
        "{name} is a replica in addition to {old_name}; its resync runs"
    )?;
    context.out.flush()?;
    if !wait_for_resync(context, &disk, &new, &old_name)? {
        writeln!(
            context.out,
            "{name} and {old_name} are both replicas, and {name} is not up to date; to continue: \
             quorum-blkctl resync {name}, then quorum-blkctl remove {old_name}; to undo: \
             quorum-blkctl remove {name}"
        )?;
        return Ok(Outcome::NeedsAttention);
    }
    let arguments = json!({ "parent": disk.node_name, "child": old });
    let removed = context.connection.execute("x-blockdev-change", arguments);
    removed.map_err(|error| {
        Error::Failed(format!(
            "{error}\n{name} is up to date, and {old_name} is still a replica; to continue: \
             quorum-blkctl remove {old_name}"
        ))
    })?;
    let (by, file) = (
        printable(&new.path.to_string_lossy()),
        printable(&replaced.file),
    );
    if takes_name {
        let arguments = json!({ "node-name": new.node_name, "new-name": old });
        let renamed = context.connection.execute("quorum-rename", arguments);
        renamed.map_err(|error| {
            Error::Failed(format!(
                "{error}\n{name} has replaced {old_name}, and keeps its name"
            ))
        })?;
        writeln!(
            context.out,
            "replaced {old_name} by {by}, which has its name now; its image {file} keeps its data"
        )?;
    } else {
        writeln!(
            context.out,
            "replaced {old_name} by {name}; its image {file} keeps its data"
        )?;
    }
    writeln!(
        context.out,
        "replace it in the daemon's command line too: its data gets old"
    )?;
    Ok(Outcome::Good)
}

/// A name for a replica that is to take the name of `old`.
fn free_name(disk: &Disk, old: &str) -> String {
    let mut names = (1..).map(|number| format!("new{number}.{old}"));
    let is_free = |name: &String| check_name(disk, name).is_ok();
    let first = names.find(is_free);
    first.expect("a disk has few replicas")
}

/// Waits until the replica that is to replace `old_name` is up to date. False if its resync failed.
fn wait_for_resync(
    context: &mut Context<'_>,
    disk: &Disk,
    new: &NewReplica,
    old_name: &str,
) -> Result<bool, Error> {
    let name = printable(&new.node_name);
    let next = format!("to continue when {name} is up to date: quorum-blkctl remove {old_name}");
    let both = format!("{name} and {old_name} are both replicas");
    let interrupted = |job: &str| format!("{both}; {job} continues; {next}");
    let ended = wait(context, Awaited::ResyncOf(&new.node_name), interrupted);
    let ended = ended.map_err(|error| match error {
        interrupted @ Error::Interrupted(_) => interrupted,
        Error::Closed if disk.records => Error::Failed(format!(
            "{}\n{name} and {old_name} were both replicas, and the disk still has both when the \
             daemon starts again: name both on its command line, then quorum-blkctl remove \
             {old_name}",
            Error::Closed
        )),
        Error::Closed => Error::Failed(format!(
            "{}\n{name} and {old_name} were both replicas; when the daemon starts again, it \
             has the replicas of its command line",
            Error::Closed
        )),
        other => Error::Failed(format!("{other}\n{both}; {next}")),
    })?;
    ended.write(context.out, context.terminal)?;
    Ok(ended.is_success())
}

/// Adds the image as a replica. If that fails, nothing has changed.
fn add_replica(
    context: &mut Context<'_>,
    disk: &Disk,
    image: &NewImage,
    new: &NewReplica,
) -> Result<(), Error> {
    if image.create {
        create(&new.path, disk)?;
    }
    let result = add_to_disk(context, disk, new, image.force);
    if result.is_err() && image.create {
        // This program created it, and the daemon does not have it open.
        let _ = fs::remove_file(&new.path);
    }
    result
}

fn add_to_disk(
    context: &mut Context<'_>,
    disk: &Disk,
    new: &NewReplica,
    force: bool,
) -> Result<(), Error> {
    let connection = &mut context.connection;
    let node = json!({ "driver": "file", "node-name": new.node_name, "filename": new.path });
    connection.execute("blockdev-add", node)?;
    let mut arguments = json!({ "parent": disk.node_name, "node": new.node_name });
    if force {
        arguments["force"] = json!(true);
    }
    if let Err(error) = connection.execute("x-blockdev-change", arguments) {
        let deleted = connection.execute("blockdev-del", json!({ "node-name": new.node_name }));
        let state = match deleted {
            Ok(_) => "nothing has changed".to_owned(),
            Err(_) => format!(
                "the daemon may still have the node {}, which is not a replica",
                printable(&new.node_name)
            ),
        };
        return Err(Error::Failed(format!("{error}; {state}")));
    }
    Ok(())
}

fn check(image: &NewImage) -> Result<NewReplica, Error> {
    // The working directory of the daemon is a different one.
    let path = std::path::absolute(&image.file);
    let path = path
        .map_err(|error| Error::Failed(format!("{}: {}", Quoted(&image.file), Reason(&error))))?;
    let not_text = || {
        Error::Failed(format!(
            "{}: the path is not valid UTF-8, which the monitor requires",
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
        node_name.ok_or_else(|| Error::Failed(format!("{} is not a file", Quoted(&image.file))))?;
    Ok(NewReplica { path, node_name })
}

/// Checks that no node of the disk has this name.
fn check_name(disk: &Disk, node_name: &str) -> Result<(), Error> {
    let mut names = disk.replicas.iter().map(|replica| &replica.node_name);
    if names.any(|name| name == node_name) || disk.node_name == node_name {
        return Err(Error::Failed(format!(
            "there is a node {} already; give the new replica another name with --node-name NAME",
            printable(node_name)
        )));
    }
    Ok(())
}

/// Creates a sparse file. The daemon must be able to open it as it opens the images of its other
/// replicas, so it gets their owner and mode where this user may set them.
fn create(path: &Path, disk: &Disk) -> Result<(), Error> {
    let bytes = disk.size;
    let failed = |error: std::io::Error| {
        let file = format!("{} of {}", Quoted(path), size(bytes));
        Error::Failed(format!(
            "cannot create {file}: {}; nothing has changed",
            Reason(&error)
        ))
    };
    let like = disk.replicas.iter().find_map(|replica| {
        let found = fs::metadata(&replica.file).ok()?;
        found.is_file().then_some(found)
    });
    let file = create_like(path, like.as_ref()).map_err(failed)?;
    file.set_len(bytes).map_err(|error| {
        let _ = fs::remove_file(path);
        failed(error)
    })
}

/// Creates a file that only its owner may use, whatever the umask is, and then gives it owner,
/// group and mode of `like`. Where it cannot have the group, that of this user gets no rights.
fn create_like(path: &Path, like: Option<&Metadata>) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    if let Some(like) = like {
        let (owner, group) = (Some(like.uid()), Some(like.gid()));
        let has_group = fchown(&file, owner, group).or_else(|_| fchown(&file, None, group));
        let rights = if has_group.is_ok() { 0o777 } else { 0o707 };
        let _ = file.set_permissions(Permissions::from_mode(like.mode() & rights));
    }
    Ok(file)
}

pub(super) fn find<'a>(disk: &'a Disk, node: &str) -> Result<&'a Replica, Error> {
    let found = disk
        .replicas
        .iter()
        .find(|replica| replica.node_name == node);
    found.ok_or_else(|| {
        let names = disk
            .replicas
            .iter()
            .map(|replica| printable(&replica.node_name));
        Error::Failed(format!(
            "there is no replica {}; the replicas are {}",
            printable(node),
            names.collect::<Vec<_>>().join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;
    use rustix::process::umask;

    use super::*;

    /// Also before it has the rights of another image, and where there is none to take them from.
    #[test]
    fn what_is_created_is_not_for_other_users_whatever_the_umask() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mode = |file: &File| file.metadata().unwrap().mode() & 0o777;
        let before = umask(Mode::empty());
        let first = create_like(&path("first"), None).unwrap();
        assert_eq!(mode(&first), 0o600);
        for rights in [0o600, 0o640, 0o660] {
            first
                .set_permissions(Permissions::from_mode(rights))
                .unwrap();
            let like = first.metadata().unwrap();
            let made = create_like(&path(&format!("{rights:o}")), Some(&like)).unwrap();
            assert_eq!(mode(&made), rights);
        }
        umask(before);
    }
}
