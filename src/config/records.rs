//! The options about what is remembered of the replicas, and about a start that the records refuse.

use std::ffi::OsStr;

use super::command_line::Options;
use super::{ConfigError, State};
use crate::replica::file::ReplicaSource;
use crate::replica::record_file::StateDirectory;

/// What the daemon does with records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records {
    /// Whether anything is remembered.
    pub are_kept: bool,
    /// Where those are that cannot be beside their images.
    pub directory: StateDirectory,
    /// Start without replicas that could have gone on without those that are there.
    pub force_start: bool,
    /// The node-name of the replica whose image is taken as the truth.
    pub adopt: Option<String>,
}

/// Checks the options. `of_service` is the state directory that a service manager has passed.
pub(super) fn check(
    options: &Options,
    replicas: &[ReplicaSource],
    of_service: Option<&OsStr>,
) -> Result<Records, ConfigError> {
    let given = [
        (options.state_dir.is_some(), "--state-dir"),
        (options.force_start, "--force-start"),
        (options.adopt.is_some(), "--adopt"),
    ];
    let mut given = given
        .into_iter()
        .filter_map(|(given, option)| given.then_some(option));
    let excluded = |first, second, reason| {
        Err(ConfigError::Excluded {
            first,
            second,
            reason,
        })
    };
    if options.state == State::None
        && let Some(option) = given.next()
    {
        let reason = "without records there is nothing that it could apply to";
        return excluded(option, "--state none", reason);
    }
    if options.read_only
        && let Some(option) = given.find(|option| *option != "--state-dir")
    {
        let reason = "it changes the records, and those of a read-only disk are not written";
        return excluded(option, "--read-only", reason);
    }
    if let Some(name) = &options.adopt
        && !replicas.iter().any(|replica| replica.node_name == *name)
    {
        return Err(ConfigError::AdoptUnknown(name.clone()));
    }
    let directory = options.state_dir.clone().map(StateDirectory::Given);
    Ok(Records {
        are_kept: options.state == State::Records,
        directory: directory.unwrap_or_else(|| StateDirectory::usual(of_service)),
        force_start: options.force_start,
        adopt: options.adopt.clone(),
    })
}
