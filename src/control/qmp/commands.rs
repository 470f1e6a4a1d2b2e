//! The commands: one entry of `COMMANDS` for each, and the types of what it takes and returns. What
//! it does is a method of [`Operator`].

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::admin;
use super::block::{self, QueryNamedBlockNodes};
use crate::control::json::to_ascii;
use crate::control::{JobOrder, Operator};
use crate::limits::MAP_BUCKETS;

/// The command that ends the negotiation of capabilities. It belongs to the session.
pub(super) const NEGOTIATION: &str = "qmp_capabilities";

/// A command that a client can have run.
pub struct Command {
    /// What it is called.
    pub name: &'static str,
    run: Run,
}

/// What a command returns, as it is sent: JSON.
pub(super) type Returned = Vec<u8>;

type Run = fn(Map<String, Value>, &dyn Operator) -> Result<Returned, CommandError>;

/// Every command, in alphabetical order.
static COMMANDS: &[Command] = &[
    Command {
        name: "block-job-set-speed",
        run: |arguments, operator| run(arguments, |job| nothing(admin::set_speed(job, operator))),
    },
    Command {
        name: "block_resize",
        run: |arguments, operator| {
            run(arguments, |resize| {
                nothing(admin::resize(&resize, operator))
            })
        },
    },
    Command {
        name: "blockdev-add",
        run: |arguments, operator| {
            run(arguments, |node| {
                nothing(admin::blockdev_add(node, operator))
            })
        },
    },
    Command {
        name: "blockdev-del",
        run: |arguments, operator| {
            run(arguments, |node| {
                nothing(admin::blockdev_del(node, operator))
            })
        },
    },
    Command {
        name: "job-cancel",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(admin::order(job, JobOrder::Cancel, operator))
            })
        },
    },
    Command {
        name: "job-pause",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(admin::order(job, JobOrder::Pause, operator))
            })
        },
    },
    Command {
        name: "job-resume",
        run: |arguments, operator| {
            run(arguments, |job| {
                nothing(admin::order(job, JobOrder::Resume, operator))
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
        name: "query-quorum-map",
        run: |arguments, operator| {
            run(arguments, |query: QueryMap| {
                let buckets = query.buckets.unwrap_or(MAP_BUCKETS);
                if (1..=MAP_BUCKETS).contains(&buckets) {
                    Ok(operator.map(buckets))
                } else {
                    let text = format!("buckets is from 1 to {MAP_BUCKETS}");
                    Err(CommandError::generic(text))
                }
            })
        },
    },
    Command {
        name: "query-status",
        run: |arguments, _| run(arguments, |NoArguments {}| Ok(Status::RUNNING)),
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
        name: "quorum-resync",
        run: |arguments, operator| run(arguments, |replica| admin::resync(replica, operator)),
    },
    Command {
        name: "quorum-scrub",
        run: |arguments, operator| run(arguments, |scrub| admin::scrub(&scrub, operator)),
    },
    Command {
        name: "x-blockdev-change",
        run: |arguments, operator| {
            run(arguments, |change| nothing(admin::change(change, operator)))
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

/// Runs one with its arguments understood.
fn run<A: DeserializeOwned, R: Serialize>(
    arguments: Map<String, Value>,
    command: impl FnOnce(A) -> Result<R, CommandError>,
) -> Result<Returned, CommandError> {
    let arguments = serde_json::from_value(Value::Object(arguments));
    let arguments =
        arguments.map_err(|error| CommandError::generic(format!("Invalid arguments: {error}")))?;
    command(arguments).map(|returned| to_ascii(&returned))
}

/// Takes the arguments of [`NEGOTIATION`].
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

/// Why a command failed, in QEMU's classes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CommandError {
    class: ErrorClass,
    desc: String,
}

/// QEMU's classes of errors, those that are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum ErrorClass {
    GenericError,
    CommandNotFound,
}

impl CommandError {
    /// The command failed, or made no sense.
    pub fn generic(text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: text.into(),
        }
    }

    /// There is no such command, or not now.
    pub(super) fn not_found(text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: text.into(),
        }
    }
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

/// What a command returns that returns nothing.
#[derive(Serialize)]
struct Nothing {}

fn nothing(done: Result<(), CommandError>) -> Result<Nothing, CommandError> {
    done.map(|()| Nothing {})
}

/// QAPI's VersionInfo.
#[derive(Serialize)]
pub(super) struct Version {
    qemu: VersionTriple,
    package: &'static str,
}

#[derive(Serialize)]
struct VersionTriple {
    micro: u32,
    minor: u32,
    major: u32,
}

impl Version {
    pub(super) fn of_this_program() -> Self {
        let mut parts = [
            env!("CARGO_PKG_VERSION_MAJOR"),
            env!("CARGO_PKG_VERSION_MINOR"),
            env!("CARGO_PKG_VERSION_PATCH"),
        ]
        .map(|part| part.parse().expect("cargo has checked it"))
        .into_iter();
        let mut next = || parts.next().expect("three of them");
        let (major, minor, micro) = (next(), next(), next());
        Self {
            qemu: VersionTriple {
                micro,
                minor,
                major,
            },
            package: concat!("quorum-blk ", env!("CARGO_PKG_VERSION")),
        }
    }
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
    /// Whoever answers serves the disk.
    const RUNNING: Self = Self {
        running: true,
        status: "running",
    };
}
