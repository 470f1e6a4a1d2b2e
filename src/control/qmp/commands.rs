//! The commands: an entry of `COMMANDS` for each, with its arguments and its return value. The
//! commands call the methods of [`Operator`].

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::block::{self, QueryNamedBlockNodes};
use super::change;
use super::error::CommandError;
use super::version::Version;
use crate::control::json::to_ascii;
use crate::control::state::DiskState;
use crate::control::{JobOrder, Operator};
use crate::limits::MAP_BUCKETS;

/// The command that ends the negotiation of capabilities. The session runs it.
pub(super) const NEGOTIATION: &str = "qmp_capabilities";

/// The commands that may wait for the file system of an image: they open, close or grow it, or wait
/// for a command that does.
pub(super) const WAITING: [&str; 5] = [
    "block_resize",
    "quorum-fail",
    "quorum-rename",
    "quorum-set-threshold",
    "x-blockdev-change",
];

/// A command of the monitor.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    run: Run,
}

/// The return value of a command, as JSON.
pub(super) type Returned = Vec<u8>;

type Run = fn(Map<String, Value>, &dyn Operator) -> Result<Returned, CommandError>;

/// Every command, in alphabetical order.
static COMMANDS: &[Command] = &[
    Command {
        name: "block-job-set-speed",
        run: |arguments, operator| run(arguments, |job| nothing(change::set_speed(job, operator))),
    },
    Command {
        name: "block_resize",
        run: |arguments, operator| {
            run(arguments, |resize| {
                nothing(change::resize(&resize, operator))
            })
        },
    },
    Command {
        name: "blockdev-add",
        run: |arguments, operator| {
            run(arguments, |node| {
                nothing(change::blockdev_add(node, operator))
            })
        },
    },
    Command {
        name: "blockdev-del",
        run: |arguments, operator| {
            run(arguments, |node| {
                nothing(change::blockdev_del(node, operator))
            })
        },
    },
    Command {
        name: "cont",
        run: |arguments, operator| {
            run(arguments, |NoArguments {}| {
                nothing(change::continue_held(operator))
            })
        },
    },
    Command {
        name: "job-cancel",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(change::order(job, JobOrder::Cancel, operator))
            })
        },
    },
    Command {
        name: "job-pause",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(change::order(job, JobOrder::Pause, operator))
            })
        },
    },
    Command {
        name: "job-resume",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(change::order(job, JobOrder::Resume, operator))
            })
        },
    },
    Command {
        name: "query-block",
        run: |arguments, operator| {
            run(arguments, |NoArguments {}| {
                Ok(block::devices(&operator.state()))
            })
        },
    },
    Command {
        name: "query-blockstats",
        run: |arguments, operator| {
            run(arguments, |query| {
                Ok(block::statistics(&operator.state(), &query))
            })
        },
    },
    Command {
        name: "query-commands",
        run: |arguments, _| run(arguments, |NoArguments {}| Ok(names())),
    },
    Command {
        name: "query-jobs",
        run: |arguments, operator| run(arguments, |NoArguments {}| Ok(operator.jobs())),
    },
    Command {
        name: "query-named-block-nodes",
        run: |arguments, operator| {
            run(arguments, |_: QueryNamedBlockNodes| {
                Ok(block::nodes(&operator.state()))
            })
        },
    },
    Command {
        name: "query-quorum",
        run: |arguments, operator| run(arguments, |NoArguments {}| Ok(operator.state())),
    },
    Command {
        name: "query-quorum-jobs",
        run: |arguments, operator| run(arguments, |NoArguments {}| Ok(operator.ended_jobs())),
    },
    Command {
        name: "query-quorum-map",
        run: |arguments, operator| {
            run(arguments, |query: QueryMap| {
                let buckets = query.buckets.unwrap_or(MAP_BUCKETS);
                if (1..=MAP_BUCKETS).contains(&buckets) {
                    Ok(operator.map(buckets))
                } else {
                    let text = format!("'buckets' must be from 1 to {MAP_BUCKETS}");
                    Err(CommandError::generic(text))
                }
            })
        },
    },
    Command {
        name: "query-status",
        run: |arguments, operator| {
            run(arguments, |NoArguments {}| {
                Ok(Status::of(&operator.state()))
            })
        },
    },
    Command {
        name: "query-version",
        run: |arguments, _| run(arguments, |NoArguments {}| Ok(Version::of_this_program())),
    },
    Command {
        name: "quit",
        run: |arguments, operator| {
            run(arguments, |NoArguments {}| {
                operator.quit();
                Ok(Nothing {})
            })
        },
    },
    Command {
        name: "quorum-clear-errors",
        run: |arguments, operator| run(arguments, |of| nothing(change::clear_errors(of, operator))),
    },
    Command {
        name: "quorum-fail",
        run: |arguments, operator| run(arguments, |replica| change::fail(&replica, operator)),
    },
    Command {
        name: "quorum-prefer",
        run: |arguments, operator| run(arguments, |replica| change::prefer(replica, operator)),
    },
    Command {
        name: "quorum-rename",
        run: |arguments, operator| run(arguments, |names| nothing(change::rename(names, operator))),
    },
    Command {
        name: "quorum-resync",
        run: |arguments, operator| run(arguments, |replica| change::resync(replica, operator)),
    },
    Command {
        name: "quorum-scrub",
        run: |arguments, operator| run(arguments, |scrub| change::scrub(&scrub, operator)),
    },
    Command {
        name: "quorum-set-threshold",
        run: |arguments, operator| {
            run(arguments, |threshold| {
                nothing(change::set_threshold(&threshold, operator))
            })
        },
    },
    Command {
        name: "x-blockdev-change",
        run: |arguments, operator| {
            run(arguments, |change| {
                nothing(change::blockdev_change(change, operator))
            })
        },
    },
];

impl Command {
    pub(super) fn run(
        &self,
        arguments: Map<String, Value>,
        operator: &dyn Operator,
    ) -> Result<Returned, CommandError> {
        (self.run)(arguments, operator)
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The command of this name.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// Parses the arguments and runs the command.
fn run<A: DeserializeOwned, R: Serialize>(
    arguments: Map<String, Value>,
    command: impl FnOnce(A) -> Result<R, CommandError>,
) -> Result<Returned, CommandError> {
    let arguments = serde_json::from_value(Value::Object(arguments));
    let arguments =
        arguments.map_err(|error| CommandError::generic(format!("Invalid arguments: {error}")))?;
    command(arguments).map(|returned| to_ascii(&returned))
}

/// Checks the arguments of [`NEGOTIATION`].
pub(super) fn negotiate(arguments: Map<String, Value>) -> Result<Returned, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Capabilities {
        #[serde(default)]
        enable: Vec<String>,
    }
    run(arguments, |Capabilities { enable }| match enable.first() {
        Some(capability) => Err(CommandError::generic(format!(
            "Capability '{capability}' is not available"
        ))),
        None => Ok(Nothing {}),
    })
}

/// The arguments of query-quorum-map.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryMap {
    buckets: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// The return value of a command that returns nothing.
#[derive(Serialize)]
struct Nothing {}

fn nothing(done: Result<(), CommandError>) -> Result<Nothing, CommandError> {
    done.map(|()| Nothing {})
}

/// QAPI's CommandInfo.
#[derive(Serialize)]
struct CommandName {
    name: &'static str,
}

fn names() -> Vec<CommandName> {
    let all = COMMANDS.iter().map(|command| command.name);
    let mut names: Vec<&str> = all.chain([NEGOTIATION]).collect();
    names.sort_unstable();
    names.into_iter().map(|name| CommandName { name }).collect()
}

/// QAPI's StatusInfo.
#[derive(Serialize)]
struct Status {
    running: bool,
    status: &'static str,
}

impl Status {
    /// The monitor answers only while the disk is served.
    fn of(disk: &DiskState) -> Self {
        let running = disk.held_requests == 0;
        Self {
            running,
            status: if running { "running" } else { "io-error" },
        }
    }
}
