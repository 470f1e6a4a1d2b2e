//! `quorum-blkctl`: a client of the monitor, for people and scripts.
//!
//! It knows the daemon only by its JSON messages (docs/qmp.md). `connection` speaks the protocol,
//! `replies` defines the replies; each command has a file; `format`, `table`, `terminal` and
//! `progress` produce the text.
//!
//! Invariants: whatever the server sends, memory use is bounded, every wait ends, and the output
//! contains none of the server's control characters; only a terminal gets bars and cursor
//! movements; when the reader of the output goes away (`| head`), the program exits quietly.

#![forbid(unsafe_code)]

mod arguments;
mod clear;
mod completion;
mod conditions;
mod connection;
mod cont;
mod disk_map;
mod events;
mod fail;
mod forget;
mod format;
mod inspect;
mod jobs;
mod progress;
mod replicas;
mod replies;
mod resize;
mod scrub;
mod status;
mod table;
mod terminal;
mod threshold;
mod verify;
mod wait;

use std::ffi::OsString;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _};

use self::arguments::{Action, Options};
use self::connection::Connection;
use self::terminal::Terminal;
use crate::common::message::{Quoted, Reason};

/// Why a command failed. Each displays as one line, or a few.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "no monitor to connect to; give --qmp PATH, the path of the daemon's --qmp, or set {}",
        arguments::SOCKET_VARIABLE
    )]
    NoSocket,
    #[error("cannot connect to {}: {}", Quoted(.path), Reason(.source))]
    Connect { path: PathBuf, source: io::Error },
    #[error("lost the connection to the daemon: {}", Reason(.0))]
    Lost(io::Error),
    #[error("the daemon closed the connection")]
    Closed,
    #[error("no answer to {request} within {} s; --timeout TIME waits longer", .limit.as_secs())]
    Timeout { request: String, limit: Duration },
    #[error(
        "{} does not begin to speak within {} s; --qmp needs the socket of the daemon's --qmp, not \
         that of the disk or of the events",
        Quoted(.path),
        .limit.as_secs()
    )]
    Silent { path: PathBuf, limit: Duration },
    /// A message that does not follow the protocol.
    #[error("{message} is invalid: {reason}")]
    Invalid { message: String, reason: String },
    /// The daemon rejected a command.
    #[error("{}", format::printable(.0))]
    Rejected(String),
    /// The command cannot be done, or not completely.
    #[error("{0}")]
    Failed(String),
    /// Ctrl-C while the program waited for a job.
    #[error("{0}")]
    Interrupted(String),
    #[error("cannot write the output: {}", Reason(.0))]
    Output(#[from] io::Error),
}

impl Error {
    fn invalid(message: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Invalid {
            message: message.into(),
            reason: format::printable(&reason.to_string()),
        }
    }
}

/// The result of a command that was done; it decides the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    /// The disk needs attention, or the job did not complete.
    NeedsAttention,
}

impl Outcome {
    fn of(is_good: bool) -> Self {
        if is_good {
            Self::Good
        } else {
            Self::NeedsAttention
        }
    }
}

/// What every command needs: the daemon and the output.
struct Context<'a> {
    connection: Connection,
    terminal: Terminal,
    out: &'a mut dyn Write,
}

/// The definition of the command line, for the man page and the shell completions.
pub fn command_line() -> clap::Command {
    Options::command()
}

/// Runs the program with these arguments, the first of which is its name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    if let Some(kind) = std::env::var_os(completion::VARIABLE) {
        return complete(kind == "quoted", arguments);
    }
    let matches = command_line().try_get_matches_from(arguments);
    let options = match matches.and_then(|matches| Options::from_arg_matches(&matches)) {
        Ok(options) => options,
        Err(error) => {
            // `--help` and `--version` are errors for clap; it prints them on stdout.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let result =
        execute(options, &mut out).and_then(|outcome| Ok(out.flush().map(|()| outcome)?));
    match result {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::NeedsAttention) => ExitCode::from(1),
        // The reader has seen enough.
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // The output so far comes before the error.
            let _ = out.flush();
            let _ = writeln!(io::stderr(), "quorum-blkctl: {error}");
            ExitCode::from(match error {
                Error::Interrupted(_) => 130,
                Error::NoSocket => 2,
                _ => 3,
            })
        }
    }
}

/// Answers a shell that completes the command line in these arguments.
fn complete(is_quoted: bool, arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words = arguments.into_iter().skip(1).map(|word| {
        let word = word.to_string_lossy();
        if is_quoted {
            completion::unquoted(&word)
        } else {
            word.into_owned()
        }
    });
    match completion::run(command_line(), words.collect(), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn execute(options: Options, out: &mut dyn Write) -> Result<Outcome, Error> {
    match options.action {
        Action::Inspect {
            images,
            state_dir,
            json,
        } => inspect::run(&images, state_dir, json, out),
        Action::Verify {
            images,
            state_dir,
            json,
        } => verify::run(&images, state_dir, json, out),
        Action::Forget { images, state_dir } => forget::run(&images, state_dir, out),
        action => {
            let connection = (options.qmp, options.timeout);
            execute_connected(connection, action, out)
        }
    }
}

/// Runs a command of a daemon.
fn execute_connected(
    (socket, timeout): (Option<PathBuf>, Duration),
    action: Action,
    out: &mut dyn Write,
) -> Result<Outcome, Error> {
    let socket = socket.ok_or(Error::NoSocket)?;
    let mut context = Context {
        connection: Connection::open(&socket, timeout)?,
        terminal: Terminal::of_stdout(),
        out,
    };
    let context = &mut context;
    match action {
        Action::Status { watch, json } => status::run(context, watch, json),
        Action::Events { json } => events::run(context, json),
        Action::Map { json } => disk_map::run(context, json),
        Action::Scrub { repair, job } => scrub::scrub(context, repair, &job),
        Action::Resync { node, job } => scrub::resync(context, &node, &job),
        Action::Clear { node } => clear::run(context, node.as_deref()),
        Action::Prefer { node, force, job } => scrub::prefer(context, &node, force, &job),
        Action::Cont => cont::run(context),
        Action::Add { image, detach } => replicas::add(context, &image, detach),
        Action::Remove { node } => replicas::remove(context, &node),
        Action::Fail { node, force } => fail::run(context, &node, force),
        Action::Replace { old, image } => replicas::replace(context, &old, &image),
        Action::Resize { size } => resize::run(context, size),
        Action::Threshold { threshold } => threshold::run(context, threshold),
        Action::Jobs { json, all, command } => jobs::run(context, json, all, command),
        Action::Inspect { .. } | Action::Forget { .. } | Action::Verify { .. } => {
            unreachable!("it needs no daemon")
        }
    }
}
