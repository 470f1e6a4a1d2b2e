//! The command line: its options and commands, and their `--help` texts.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueHint};

use super::format::{NewSize, parse_rate, parse_size_change};
use super::threshold::{self, NewThreshold};
use crate::common::time_span::parse_ms;
use crate::limits::REPLICAS_MAX;

/// The environment variable that replaces `--qmp`.
pub(super) const SOCKET_VARIABLE: &str = "QUORUM_BLK_QMP";

// Each line has at most 80 columns, so that clap does not wrap it.
const EXIT_STATUS: &str = "\
Exit status:
  0    Success; for status and map: the disk is healthy
  1    The command ran, but: the disk is degraded or failing (status, map),
       corrupt sectors were found and not repaired (scrub), the job failed or
       was cancelled, a start would not be as usual (inspect), or images
       differ (verify)
  2    Invalid command line
  3    The command failed: cannot connect, or the daemon rejected it,
       disconnected, or sent an invalid reply; or a start would be refused
       (inspect)
  130  Ctrl-C while waiting for a job; the job continues

Sizes and rates are in bytes, or in K, M, G, T, P (powers of 1024): 512M, 1.5T";

const STATUS_LEGEND: &str = "\
Health:
  healthy    No replica is known to be evicted, missing, stale or corrupt, and
             none has returned an error
  degraded   A replica is evicted, missing, stale or corrupt, or returned an
             error, or the disk has fewer replicas than at its start; the guest
             has not noticed
  failing    The guest got an I/O error, or waits for the command cont, or no
             vote can decide some sectors
  For each reason, a line below says what to do. Errors stay until the
  command clear; failed reads of a replica until a scrub in which none fails.

Columns:
  state      in-service: the replica is read and votes
             syncing: it votes only where it is not stale
             evicted: it does not answer; it rejoins when it does
             missing: its image could not be opened, or no --blk-file names it
  stale      Data that the replica lacks; a resync copies it
  corrupt    Sectors known to be corrupt now; scrub --repair repairs them
  found      Corrupt sectors found since the replica was added; a sector that
             is found again counts again
  repaired   Sectors repaired since the replica was added
  errors     Operations that failed and that are not cleared
  p99        Latency that 99 % of the operations do not exceed
  in flight  Operations that the replica has not answered yet
  A narrow terminal has no room for some of them; map has found and repaired.";

const INSPECT_LEGEND: &str = "\
Columns:
  state      active: a member in service, whose record is kept up to date
             inactive: evicted or missing, or not complete yet
  stale      Data of which it lacks the newest version; where marked: also
             wherever the records mark a change
  doubtful   Data that a failed flush may have lost, or not

Exit status: 0 if the disk would be served with all replicas up to date, and was
ended cleanly, or would be a new one; 1 if it would be served, but has to
recover, or not by all of its replicas; 3 if the start would be refused";

const VERIFY_LEGEND: &str = "\
An image has no vote where its disk knows it as stale or doubtful, and none
anywhere if another program has modified it; it is compared with the winner all
the same. Without records all images vote everywhere, and the majority wins.

Exit status: 0 if no image differs; 1 if one does, or cannot be read somewhere;
3 if an image cannot be opened, or another program writes to it";

/// Bytes per second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate(pub(super) u64);

fn rate(text: &str) -> Result<Rate, String> {
    parse_rate(text).map(Rate)
}

fn parse_timeout(text: &str) -> Result<Duration, &'static str> {
    let from_1s_to_1h = time(text, 3600);
    from_1s_to_1h.ok_or("expected a time from 1s to 1h, such as 5s, 2min, or 60 for seconds")
}

fn parse_watch(text: &str) -> Result<Duration, &'static str> {
    let from_1s_to_24h = time(text, 86_400);
    from_1s_to_24h.ok_or("expected a time from 1s to 24h, such as 5s, 2min, or 60 for seconds")
}

/// Of at least a second, and at most so many.
fn time(text: &str, seconds_max: u64) -> Option<Duration> {
    let ms = parse_ms(text, 1000).filter(|ms| (1000..=seconds_max * 1000).contains(ms));
    ms.map(Duration::from_millis)
}

/// The options as written.
#[derive(Debug, Parser)]
#[command(
    name = "quorum-blkctl",
    subcommand_value_name = "COMMAND",
    version,
    about = "Show and maintain a voted disk that quorum-blkd serves",
    after_help = EXIT_STATUS
)]
pub(super) struct Options {
    /// Socket of the daemon's monitor: the PATH of its --qmp option
    #[arg(long, value_name = "PATH", env = SOCKET_VARIABLE, hide_env_values = true, global = true,
        value_hint = ValueHint::FilePath, help_heading = "Connection")]
    pub(super) qmp: Option<PathBuf>,

    /// Fail if the daemon does not answer within this time, from 1s to 1h; a number without unit
    /// is in seconds. Raise it if the daemon's disks are very slow
    #[arg(long, value_name = "TIME", default_value = "60s", global = true,
        help_heading = "Connection", value_parser = parse_timeout)]
    pub(super) timeout: Duration,

    #[command(subcommand)]
    pub(super) action: Action,
}

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    /// Show the health of the disk, its replicas and its jobs
    #[command(after_help = STATUS_LEGEND)]
    Status {
        /// Show it again after each TIME, from 1s to 24h, until Ctrl-C; a number without unit is in
        /// seconds [default without TIME: 2s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s",
            value_parser = parse_watch)]
        watch: Option<Duration>,
        /// Print the daemon's replies to query-quorum, query-jobs and query-quorum-jobs as one JSON
        /// object
        #[arg(long)]
        json: bool,
    },
    /// Print events, one per line, until the daemon stops
    Events {
        /// Print the events as the daemon sends them, as JSON objects
        #[arg(long)]
        json: bool,
    },
    /// Show where on the disk replicas are corrupt, stale or had errors
    Map {
        /// Print the daemon's reply to query-quorum-map as JSON
        #[arg(long)]
        json: bool,
    },
    /// Read the whole disk on every replica and vote on each sector
    Scrub {
        /// Write the data that won the vote to the replicas that lost it. Without this option, a
        /// scrub only reports
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        job: JobOptions,
    },
    /// Copy the newest data to a replica that is stale because its resync failed or was cancelled
    Resync {
        /// Name of the replica
        #[arg(value_name = "NODE")]
        node: String,
        #[command(flatten)]
        job: JobOptions,
    },
    /// Decide with the copy of one replica where no vote has a winner: it is written to the others
    Prefer {
        /// Name of the replica
        #[arg(value_name = "NODE")]
        node: String,
        /// Do it: what the others hold there is lost. Without this, the command only says how much
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        job: JobOptions,
    },
    /// Clear the errors of a replica, once their cause is gone; without NODE, clear the I/O errors
    /// of the guest and the errors of all replicas, and expect as many replicas as there are now
    Clear {
        /// Name of the replica
        #[arg(value_name = "NODE")]
        node: Option<String>,
    },
    /// Submit the requests again that failed and are held (--rerror, --werror of quorum-blkd)
    Cont,
    /// Add a replica and wait until it is up to date. Unless a vote threshold was given, two
    /// replicas need both (2 of 2)
    Add {
        #[command(flatten)]
        image: NewImage,
        /// Do not wait until it is up to date
        #[arg(long)]
        detach: bool,
    },
    /// Remove a replica; its image is closed and keeps its data
    Remove {
        /// Name of the replica
        #[arg(value_name = "NODE")]
        node: String,
    },
    /// Remove a replica that the disk needs, and give up what only it holds
    Fail {
        /// Name of the replica
        #[arg(value_name = "NODE")]
        node: String,
        /// Do it. Without this, the command only says what would be lost
        #[arg(long)]
        force: bool,
    },
    /// Add a replica, wait until it is up to date, then remove another one
    Replace {
        /// Name of the replica to remove
        #[arg(value_name = "OLD")]
        old: String,
        #[command(flatten)]
        image: NewImage,
    },
    /// Change how many replicas must agree for a read, or store the data for a write, to succeed.
    /// The next start has it too, unless its command line has another --vote-threshold
    Threshold {
        /// 1 to the number of replicas; or majority: more than half of them, also when replicas are
        /// added or removed. A higher one holds as soon as so many replicas are up to date
        #[arg(value_name = "T|majority", value_parser = threshold::parse)]
        threshold: NewThreshold,
    },
    /// Grow the disk and all of its images
    Resize {
        /// New size of the disk (10G), or with + the size to add (+1G)
        #[arg(value_parser = parse_size_change, allow_hyphen_values = true)]
        size: NewSize,
    },
    /// Show what the records of images say, and what would happen if these were started now. It
    /// needs no daemon, and changes nothing
    #[command(after_help = INSPECT_LEGEND)]
    Inspect {
        /// Images of one disk, as --blk-file of quorum-blkd names them: PATH[,node-name=NAME]
        #[arg(value_name = "IMAGE", required = true, num_args = 1..=REPLICAS_MAX,
            value_hint = ValueHint::FilePath, value_parser = OsStringValueParser::new()
                .try_map(|value| crate::inspect::parse_image(&value)))]
        images: Vec<crate::inspect::ReplicaSource>,
        /// Directory of records that are not beside their images, as --state-dir of quorum-blkd
        /// [default: /var/lib/quorum-blk]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        state_dir: Option<PathBuf>,
        /// Print it as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Compare images with each other, sector by sector, and print the SHA-256 of each. It needs no
    /// daemon, changes nothing, and no other program may write to them
    #[command(after_help = VERIFY_LEGEND)]
    Verify {
        /// Images, as for inspect
        #[arg(value_name = "IMAGE", required = true, num_args = 1..=REPLICAS_MAX,
            value_hint = ValueHint::FilePath, value_parser = OsStringValueParser::new()
                .try_map(|value| crate::inspect::parse_image(&value)))]
        images: Vec<crate::inspect::ReplicaSource>,
        /// Directory of records that are not beside their images, as --state-dir of quorum-blkd
        /// [default: /var/lib/quorum-blk]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        state_dir: Option<PathBuf>,
        /// Print the result as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take images out of their disk: their records are put aside, and what they have missed is not
    /// known any more. It needs no daemon, and none may have them open
    Forget {
        /// Images, as for inspect
        #[arg(value_name = "IMAGE", required = true, num_args = 1..=REPLICAS_MAX,
            value_hint = ValueHint::FilePath, value_parser = OsStringValueParser::new()
                .try_map(|value| crate::inspect::parse_image(&value)))]
        images: Vec<crate::inspect::ReplicaSource>,
        /// Directory of records that are not beside their images, as --state-dir of quorum-blkd
        /// [default: /var/lib/quorum-blk]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        state_dir: Option<PathBuf>,
    },
    /// List the jobs, or control one of them
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_value_name = "COMMAND"
    )]
    Jobs {
        /// Print the daemon's reply to query-jobs as JSON
        #[arg(long)]
        json: bool,
        /// Show the last jobs that have ended, with what they found; the running ones come last
        #[arg(long)]
        all: bool,
        #[command(subcommand)]
        command: Option<JobCommand>,
    },
}

/// The options of commands that start a job.
#[derive(Debug, Args)]
pub(super) struct JobOptions {
    /// Limit the job to RATE bytes per second; 0: no limit, but a busy guest keeps most of the
    /// bandwidth
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "0")]
    pub(super) speed: Rate,
    /// Do not wait for the end of the job
    #[arg(long)]
    pub(super) detach: bool,
}

/// The image of a new replica.
#[derive(Debug, Args)]
pub(super) struct NewImage {
    /// Image of the new replica, a raw file or a block device
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) file: PathBuf,
    /// Name of the new replica [default: the file name]
    #[arg(long, value_name = "NAME")]
    pub(super) node_name: Option<String>,
    /// Create FILE, sparse and as large as the disk; it must not exist
    #[arg(long)]
    pub(super) create: bool,
    /// Overwrite the data that FILE holds. Without this, only an empty image is accepted
    #[arg(long, conflicts_with = "create")]
    pub(super) force: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum JobCommand {
    /// Pause a job until it is resumed
    Pause {
        /// Name of the job
        #[arg(value_name = "JOB")]
        id: String,
    },
    /// Resume a paused job
    Resume {
        /// Name of the job
        #[arg(value_name = "JOB")]
        id: String,
    },
    /// Cancel a job
    Cancel {
        /// Name of the job
        #[arg(value_name = "JOB")]
        id: String,
    },
    /// Change the speed limit of a job
    Speed {
        /// Name of the job
        #[arg(value_name = "JOB")]
        id: String,
        /// Limit in bytes per second; 0: no limit, but a busy guest keeps most of the bandwidth
        #[arg(value_parser = rate)]
        rate: Rate,
    },
    /// Wait until a job ends, or show the result of one that has ended
    Wait {
        /// Name of the job
        #[arg(value_name = "JOB")]
        id: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_of_the_options_is_valid() {
        Options::command().debug_assert();
    }

    #[test]
    fn the_socket_may_come_before_or_after_the_command() {
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
