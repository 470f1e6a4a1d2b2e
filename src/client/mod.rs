//! `quorum-blkctl`: a client of the monitor, for people and their scripts.
//!
//! It knows the daemon by the JSON it sends (docs/qmp.md) and by nothing else. [`connection`]
//! speaks the protocol, `shapes` are the replies; each command has a file; `format`, `table`,
//! `terminal` and `progress` make the text.
//!
//! Invariants: whatever the other side sends, memory is bounded and what is printed holds no
//! control characters of its; colours, bars and cursor movements go to a terminal only; a reader
//! that goes away (`| head`) ends the program quietly.

mod arguments;
pub mod connection;
mod disk_map;
mod events;
pub mod format;
mod jobs;
mod progress;
mod replicas;
mod resize;
mod scrub;
mod shapes;
mod status;
mod table;
mod terminal;
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

/// Why a command was not done, or not to its end. Each displays as one line, or a few.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody said where the daemon is.
    #[error(
        "which daemon? give --qmp PATH, the PATH of its --qmp, or set {}",
        arguments::SOCKET_VARIABLE
    )]
    NoSocket,
    /// There is no daemon there.
    #[error("cannot connect to {}: {}", Quoted(.path), Reason(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the daemon broke: {}", Reason(.0))]
    Broken(io::Error),
    /// The daemon has ended, or does not want to talk.
    #[error("the daemon has closed the connection")]
    Closed,
    /// It has not answered in time.
    #[error("no answer to {what} within {} s", .limit.as_secs())]
    Silent {
        /// What was asked.
        what: String,
        /// How long was waited.
        limit: Duration,
    },
    /// What it says is not what a monitor says.
    #[error("{what} makes no sense: {why}")]
    Nonsense {
        /// What was read.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The daemon has refused a command.
    #[error("{}", format::clean(.0))]
    Refused(String),
    /// What was asked for cannot be done.
    #[error("{0}")]
    Not(String),
    /// Ctrl-C while a job was waited for.
    #[error("{0}")]
    Interrupted(String),
    /// What is to be printed cannot be.
    #[error("cannot write: {}", Reason(.0))]
    Output(#[from] io::Error),
}

impl Error {
    fn nonsense(what: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Nonsense {
            what: what.into(),
            why: format::clean(&why.to_string()),
        }
    }
}

/// How a command that was done has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All is well.
    Well,
    /// The disk needs somebody, or a job has not done all it was to do.
    NotWell,
}

impl Outcome {
    fn of(is_well: bool) -> Self {
        if is_well { Self::Well } else { Self::NotWell }
    }
}

/// What a command works with.
struct Context<'a> {
    connection: Connection,
    terminal: Terminal,
    out: &'a mut dyn Write,
}

/// The options and commands of the program, for its manual and for shells.
pub fn command_line() -> clap::Command {
    Options::command()
}

/// Runs the program with these arguments, the first of which is its name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = command_line().try_get_matches_from(arguments);
    let options = match matches.and_then(|matches| Options::from_arg_matches(&matches)) {
        Ok(options) => options,
        Err(error) => {
            // Help and version are errors too; those go to standard output and are status 0.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let result =
        execute(options, &mut out).and_then(|outcome| Ok(out.flush().map(|()| outcome)?));
    match result {
        Ok(Outcome::Well) => ExitCode::SUCCESS,
        Ok(Outcome::NotWell) => ExitCode::from(1),
        // Whoever read has seen enough.
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // What was said before comes first.
            let _ = out.flush();
            let _ = writeln!(io::stderr(), "quorum-blkctl: {error}");
            ExitCode::from(match error {
                Error::Interrupted(_) => 130,
                _ => 3,
            })
        }
    }
}

fn execute(options: Options, out: &mut dyn Write) -> Result<Outcome, Error> {
    let socket = options.qmp.ok_or(Error::NoSocket)?;
    let mut context = Context {
        connection: Connection::open(&socket, Duration::from_secs(options.timeout))?,
        terminal: Terminal::of_stdout(),
        out,
    };
    let context = &mut context;
    match options.action {
        Action::Status { watch, json } => {
            status::run(context, watch.map(Duration::from_secs), json)
        }
        Action::Events { json } => events::run(context, json),
        Action::Map { json } => disk_map::run(context, json),
        Action::Scrub { repair, job } => scrub::scrub(context, repair, &job),
        Action::Resync { node, job } => scrub::resync(context, &node, &job),
        Action::Add { image, detach } => replicas::add(context, &image, detach),
        Action::Remove { node } => replicas::remove(context, &node),
        Action::Replace { old, image } => replicas::replace(context, &old, &image),
        Action::Resize { size } => resize::run(context, size),
        Action::Jobs { json, order } => jobs::run(context, json, order),
    }
}
