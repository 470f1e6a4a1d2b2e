//! The commands that change the disk, and their arguments: with QEMU's names and meaning where QEMU
//! has the command.

use std::path::PathBuf;

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::error::CommandError;
use crate::control::loss_state::LossState;
use crate::control::{Change, JobOrder, Operator};

/// QAPI's BlockdevOptions, for the drivers that open an image: a file, or a raw node over one.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct BlockdevAdd {
    driver: Driver,
    node_name: String,
    filename: Option<PathBuf>,
    #[serde(default, deserialize_with = "object")]
    file: Option<FileNode>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
enum Driver {
    File,
    HostDevice,
    Raw,
}

// A derived implementation would also accept an object as a name.
impl TryFrom<String> for Driver {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        match name.as_str() {
            "file" => Ok(Self::File),
            "host_device" => Ok(Self::HostDevice),
            "raw" => Ok(Self::Raw),
            _ => Err("unknown driver, expected file, host_device or raw"),
        }
    }
}

/// Reads members by name. A derived implementation would also accept an array, in order.
fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(value: D) -> Result<Option<T>, D::Error> {
    let members = Option::<Map<String, Value>>::deserialize(value)?;
    let object = members.map(|members| serde_json::from_value(Value::Object(members)));
    object.transpose().map_err(D::Error::custom)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FileNode {
    driver: Driver,
    filename: PathBuf,
}

/// The arguments of blockdev-del.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct BlockdevDel {
    node_name: String,
}

/// The arguments of x-blockdev-change.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockdevChange {
    parent: String,
    child: Option<String>,
    node: Option<String>,
    /// Ours: with `node`, overwrite the data that it holds.
    #[serde(default)]
    force: bool,
}

/// The arguments of block_resize.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: u64,
}

/// The arguments of quorum-scrub.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scrub {
    #[serde(default)]
    repair: bool,
    #[serde(default)]
    speed: u64,
}

/// The arguments of quorum-resync.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Resync {
    node_name: String,
    #[serde(default)]
    speed: u64,
}

/// The arguments of quorum-prefer.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Prefer {
    node_name: String,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    speed: u64,
}

/// The arguments of quorum-clear-errors.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct ClearErrors {
    node_name: Option<String>,
}

/// The arguments of quorum-fail.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Fail {
    node_name: String,
    #[serde(default)]
    force: bool,
}

/// The arguments of quorum-set-threshold: one of them.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct SetThreshold {
    vote_threshold: Option<usize>,
    #[serde(default)]
    majority: bool,
}

/// The arguments of quorum-rename.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Rename {
    node_name: String,
    new_name: String,
}

/// The return value of a command that starts a job.
#[derive(Serialize)]
pub(super) struct Begun {
    id: String,
}

/// The arguments of job-pause, job-resume and job-cancel.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedJob {
    id: String,
}

/// The arguments of block-job-set-speed, which calls the id of the job `device`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JobSpeed {
    device: String,
    speed: u64,
}

pub(super) fn blockdev_add(node: BlockdevAdd, operator: &dyn Operator) -> Result<(), CommandError> {
    let filename = match (node.driver, node.filename, node.file) {
        (Driver::File | Driver::HostDevice, Some(filename), None) => filename,
        (Driver::Raw, None, Some(file)) if file.driver != Driver::Raw => file.filename,
        _ => {
            return Err(CommandError::generic(
                "expected driver file or host_device with a filename, or raw over one of these",
            ));
        }
    };
    let (node_name, path) = (node.node_name, filename);
    done(operator, Change::AddNode { node_name, path })
}

pub(super) fn blockdev_del(node: BlockdevDel, operator: &dyn Operator) -> Result<(), CommandError> {
    done(operator, Change::RemoveNode(node.node_name))
}

pub(super) fn blockdev_change(
    change: BlockdevChange,
    operator: &dyn Operator,
) -> Result<(), CommandError> {
    let disk = operator.state();
    if change.parent != disk.node_name {
        let what = format!(
            "Cannot find device='{0}' nor node-name='{0}'",
            change.parent
        );
        return Err(CommandError::generic(what));
    }
    match (change.child, change.node) {
        (None, Some(node_name)) => {
            let force = change.force;
            done(operator, Change::AddReplica { node_name, force })
        }
        (Some(_), None) if change.force => Err(CommandError::generic(
            "force goes with node: it allows to overwrite the data of its image",
        )),
        (Some(child), None) => {
            // QEMU names children by their index.
            let mut replicas = disk.replicas.iter().enumerate();
            let at_place = replicas.find(|(place, _)| child == format!("children.{place}"));
            let node_name = at_place.map(|(_, replica)| replica.node_name.clone());
            done(operator, Change::RemoveReplica(node_name.unwrap_or(child)))
        }
        (Some(_), Some(_)) => Err(CommandError::generic(
            "Parameters child and node are in conflict",
        )),
        (None, None) => Err(CommandError::generic(
            "Either child or node must be specified",
        )),
    }
}

pub(super) fn resize(resize: &Resize, operator: &dyn Operator) -> Result<(), CommandError> {
    let disk = operator.state();
    let (device, node) = (resize.device.as_deref(), resize.node_name.as_deref());
    let mut named = [device, node].into_iter().flatten().peekable();
    if named.peek().is_none() || named.any(|name| name != disk.node_name) {
        let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
        let what = format!("Cannot find device='{device}' nor node-name='{node}'");
        return Err(CommandError::generic(what));
    }
    let size_bytes = resize.size;
    done(operator, Change::Resize { size_bytes })
}

pub(super) fn scrub(scrub: &Scrub, operator: &dyn Operator) -> Result<Begun, CommandError> {
    let (repair, speed_bytes) = (scrub.repair, scrub.speed);
    begun(
        operator,
        Change::Scrub {
            repair,
            speed_bytes,
        },
    )
}

pub(super) fn rename(rename: Rename, operator: &dyn Operator) -> Result<(), CommandError> {
    let (node_name, new_name) = (rename.node_name, rename.new_name);
    done(
        operator,
        Change::RenameReplica {
            node_name,
            new_name,
        },
    )
}

pub(super) fn resync(replica: Resync, operator: &dyn Operator) -> Result<Begun, CommandError> {
    let (node_name, speed_bytes) = (replica.node_name, replica.speed);
    begun(
        operator,
        Change::Resync {
            node_name,
            speed_bytes,
        },
    )
}

pub(super) fn prefer(replica: Prefer, operator: &dyn Operator) -> Result<Begun, CommandError> {
    begun(
        operator,
        Change::Prefer {
            node_name: replica.node_name,
            force: replica.force,
            speed_bytes: replica.speed,
        },
    )
}

pub(super) fn fail(replica: &Fail, operator: &dyn Operator) -> Result<LossState, CommandError> {
    let failed = operator.fail(&replica.node_name, replica.force);
    failed.map_err(CommandError::generic)
}

pub(super) fn set_threshold(
    new: &SetThreshold,
    operator: &dyn Operator,
) -> Result<(), CommandError> {
    if new.vote_threshold.is_some() == new.majority {
        let what = "expected either a vote-threshold, or majority: true";
        return Err(CommandError::generic(what));
    }
    done(operator, Change::Threshold(new.vote_threshold))
}

/// cont.
pub(super) fn continue_held(operator: &dyn Operator) -> Result<(), CommandError> {
    done(operator, Change::Continue)
}

pub(super) fn clear_errors(of: ClearErrors, operator: &dyn Operator) -> Result<(), CommandError> {
    done(operator, Change::ClearErrors(of.node_name))
}

pub(super) fn order(
    job: NamedJob,
    order: JobOrder,
    operator: &dyn Operator,
) -> Result<(), CommandError> {
    done(operator, Change::Job { id: job.id, order })
}

pub(super) fn set_speed(job: JobSpeed, operator: &dyn Operator) -> Result<(), CommandError> {
    let (id, order) = (job.device, JobOrder::Speed(job.speed));
    done(operator, Change::Job { id, order })
}

fn done(operator: &dyn Operator, change: Change) -> Result<(), CommandError> {
    operator
        .change(change)
        .map(|_| ())
        .map_err(CommandError::generic)
}

fn begun(operator: &dyn Operator, change: Change) -> Result<Begun, CommandError> {
    let begun = operator.change(change).map_err(CommandError::generic)?;
    Ok(Begun {
        id: begun.unwrap_or_default(),
    })
}
