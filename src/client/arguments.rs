//! The command line: options and commands, and what is said of them in `--help`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::format::{NewSize, parse_rate, parse_size_change};

/// Where the daemon is, if no option says so.
pub(super) const SOCKET_VARIABLE: &str = "QUORUM_BLK_QMP";

/// Bytes a second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate(pub(super) u64);

fn rate(text: &str) -> Result<Rate, String> {
    parse_rate(text).map(Rate)
}

/// The options as they are written.
#[derive(Debug, Parser)]
#[command(
    name = "quorum-blkctl",
    version,
    about = "Look after a voted disk that quorum-blkd serves",
    after_help = "Exit status:\n  \
        0    done, and all is well\n  \
        1    done, but: the disk is degraded or failing (status, map), something bad was found and not mended \
        (scrub), or the job did not do all it was to do, or was cancelled\n  \
        2    the command line makes no sense\n  \
        3    not done: no daemon there, or it refused, broke off or made no sense\n  \
        130  Ctrl-C while a job was waited for; the job goes on\n\n\
        Sizes and rates are in bytes, or in K, M, G, T, P of 1024."
)]
pub(super) struct Options {
    /// The monitor of the daemon: the PATH that its --qmp was given
    #[arg(long, value_name = "PATH", env = SOCKET_VARIABLE, hide_env_values = true, global = true)]
    pub(super) qmp: Option<PathBuf>,

    /// Time in seconds in which the daemon has to answer, 1 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 60, global = true,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(super) timeout: u64,

    #[command(subcommand)]
    pub(super) action: Action,
}

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    /// Tell how the disk is, each of its replicas, and what jobs do
    Status {
        /// Tell again every so many seconds
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
            value_parser = clap::value_parser!(u64).range(1..=86400))]
        watch: Option<u64>,
        /// Print what the daemon replies to query-quorum and query-jobs, as one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Follow the events, one a line, until the daemon ends
    Events {
        /// Print the events as they are sent, JSON objects
        #[arg(long)]
        json: bool,
    },
    /// Draw where on the disk which replica was bad or is stale, and list the worst places
    Map {
        /// Print what the daemon replies to query-quorum-map
        #[arg(long)]
        json: bool,
    },
    /// Read everything on every replica and let it vote
    Scrub {
        /// Write the winners over what lost
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        job: JobOptions,
    },
    /// Bring a replica up to date whose resync was cancelled or has failed
    Resync {
        /// The replica
        #[arg(value_name = "NODE")]
        node: String,
        #[command(flatten)]
        job: JobOptions,
    },
    /// Add a replica, and wait until it is up to date
    Add {
        #[command(flatten)]
        image: NewImage,
        /// Do not wait
        #[arg(long)]
        detach: bool,
    },
    /// Remove a replica; its image is closed and left as it is
    Remove {
        /// The replica
        #[arg(value_name = "NODE")]
        node: String,
    },
    /// Add a replica, wait until it is up to date, and remove another one
    Replace {
        /// The replica that is to go
        #[arg(value_name = "OLD")]
        old: String,
        #[command(flatten)]
        image: NewImage,
    },
    /// Make the disk larger, and its images
    Resize {
        /// The new size, or with + how much is to be added: 10G, +1G
        #[arg(value_parser = parse_size_change, allow_hyphen_values = true)]
        size: NewSize,
    },
    /// List the jobs, or tell one something
    #[command(args_conflicts_with_subcommands = true)]
    Jobs {
        /// Print what the daemon replies to query-jobs
        #[arg(long)]
        json: bool,
        #[command(subcommand)]
        order: Option<JobOrder>,
    },
}

/// How a job is to be done, and whether it is waited for.
#[derive(Debug, Args)]
pub(super) struct JobOptions {
    /// Bytes a second at most; 0: as fast as leaves the guest its share
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "0")]
    pub(super) speed: Rate,
    /// Do not wait for its end
    #[arg(long)]
    pub(super) detach: bool,
}

/// An image that is to be a replica.
#[derive(Debug, Args)]
pub(super) struct NewImage {
    /// Its image, a raw file or a block device
    #[arg(value_name = "FILE")]
    pub(super) file: PathBuf,
    /// What the replica is called [default: the file name]
    #[arg(long, value_name = "NAME")]
    pub(super) node_name: Option<String>,
    /// Make the file, sparse and of the size of the disk; it must not exist
    #[arg(long)]
    pub(super) create: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum JobOrder {
    /// Begin nothing more until it is resumed
    Pause {
        /// What the job is called
        id: String,
    },
    /// Go on
    Resume {
        /// What the job is called
        id: String,
    },
    /// End, done or not
    Cancel {
        /// What the job is called
        id: String,
    },
    /// Limit how fast it is
    Speed {
        /// What the job is called
        id: String,
        /// Bytes a second at most; 0: as fast as leaves the guest its share
        #[arg(value_parser = rate)]
        rate: Rate,
    },
    /// Wait for its end
    Wait {
        /// What the job is called
        id: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn the_socket_may_come_before_or_after() {
        for line in [
            "quorum-blkctl --qmp s status --watch",
            "quorum-blkctl status --qmp s --watch 5",
        ] {
            let options = Options::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(options.qmp.as_deref(), Some("s".as_ref()));
        }
        for line in [
            "quorum-blkctl status --watch 0",
            "quorum-blkctl resize -1G",
            "quorum-blkctl resize 10X",
            "quorum-blkctl scrub --speed 1Q",
            "quorum-blkctl jobs --json pause job1",
            "quorum-blkctl",
        ] {
            assert!(Options::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
