//! The protocol: a blocking connection to a monitor, over which commands are run and events come.
//!
//! Invariants: a line has a bound, and so has what is kept of events; every wait has an end; what
//! is no message of the protocol is an error, whatever it is instead.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Error;
use crate::limits::{CLIENT_EVENTS_KEPT_MAX, CLIENT_LINE_BYTES_MAX};

/// A connection, capabilities negotiated.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Read and no whole line yet, or lines that nobody has looked at.
    received: Vec<u8>,
    /// So much of it has no line end.
    searched: usize,
    /// Ends of jobs that came while something else was waited for.
    job_ends: VecDeque<Value>,
    limit: Duration,
}

/// Something that the daemon sent.
#[derive(Debug)]
pub struct Message {
    /// As it was sent, without the end of the line.
    pub line: String,
    /// What it says, a JSON object.
    pub value: Value,
}

impl Message {
    /// The name of the event, if it is one.
    pub fn event(&self) -> Option<&str> {
        self.value.get("event").and_then(Value::as_str)
    }
}

impl Connection {
    /// Connects to the monitor at `path`, whose answers are waited for as long as `limit`.
    ///
    /// # Errors
    /// If nobody is there, or it does not behave like a monitor.
    pub fn open(path: &Path, limit: Duration) -> Result<Self, Error> {
        let connected = UnixStream::connect(path);
        let stream = connected.map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        stream
            .set_write_timeout(Some(limit))
            .map_err(Error::Broken)?;
        let mut connection = Self {
            stream,
            received: Vec::new(),
            searched: 0,
            job_ends: VecDeque::new(),
            limit,
        };
        let greeting = connection.receive(Instant::now() + limit)?;
        let greeting = greeting.ok_or_else(|| connection.silent("a new client"))?;
        if !greeting.value.get("QMP").is_some_and(Value::is_object) {
            return Err(Error::nonsense(
                "the daemon's greeting",
                "this is not a monitor of quorum-blkd or QEMU",
            ));
        }
        connection.execute("qmp_capabilities", json!({}))?;
        Ok(connection)
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// If it was refused, or there is no answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let mut request = json!({ "execute": command });
        if arguments
            .as_object()
            .is_none_or(|arguments| !arguments.is_empty())
        {
            request["arguments"] = arguments;
        }
        match self.stream.write_all(format!("{request}\n").as_bytes()) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
                ) =>
            {
                return Err(Error::Closed);
            }
            Err(error) if is_timeout(error.kind()) => return Err(self.silent(command)),
            other => other.map_err(Error::Broken)?,
        }
        let deadline = Instant::now() + self.limit;
        loop {
            let mut message = match self.receive(deadline)? {
                Some(message) => message,
                None if Instant::now() < deadline => continue,
                None => return Err(self.silent(command)),
            };
            if message.event().is_some() {
                self.keep(message.value);
            } else if let Some(error) = message.value.get("error") {
                let desc = error.get("desc").and_then(Value::as_str);
                let desc = desc.unwrap_or("the command failed, and the daemon does not say why");
                return Err(Error::Refused(desc.to_owned()));
            } else if let Some(returned) = message.value.get_mut("return") {
                return Ok(returned.take());
            } else {
                let what = format!("the reply to {command}");
                return Err(Error::nonsense(what, "it has neither return nor error"));
            }
        }
    }

    /// Runs a command that takes no arguments, and understands what it returned.
    ///
    /// # Errors
    /// As [`Self::execute`], and if the reply is not of this shape.
    pub fn query<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, Error> {
        let reply = self.execute(command, json!({}))?;
        understand(command, reply)
    }

    /// The next message, if it comes before `deadline` and no signal comes before it.
    ///
    /// # Errors
    /// If the connection has ended, or it is no message.
    pub fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, Error> {
        loop {
            if let Some(line) = self.take_line()? {
                return parse(&line).map(Some);
            }
            // A timeout of zero would be none.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))
                .map_err(Error::Broken)?;
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(None),
                Err(error) if is_timeout(error.kind()) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(Error::Closed);
                }
                Err(error) => return Err(Error::Broken(error)),
            }
        }
    }

    /// Waits until `deadline` or for a signal, and keeps the ends of jobs that are told meanwhile.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn linger(&mut self, deadline: Instant) -> Result<(), Error> {
        while let Some(message) = self.receive(deadline)? {
            let is_end = is_job_end(&message);
            self.keep(message.value);
            if is_end || Instant::now() >= deadline {
                break;
            }
        }
        Ok(())
    }

    /// The first end of a job that `is_wanted`, of those that were told.
    pub fn take_job_end(&mut self, mut is_wanted: impl FnMut(&Value) -> bool) -> Option<Value> {
        let index = self.job_ends.iter().position(&mut is_wanted)?;
        self.job_ends.remove(index)
    }

    fn keep(&mut self, value: Value) {
        let name = value.get("event").and_then(Value::as_str);
        if !matches!(name, Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")) {
            return;
        }
        if self.job_ends.len() == CLIENT_EVENTS_KEPT_MAX {
            self.job_ends.pop_front();
        }
        self.job_ends.push_back(value);
    }

    fn take_line(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let unsearched = &self.received[self.searched..];
        let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.received.len();
            if self.searched > CLIENT_LINE_BYTES_MAX {
                let why = format!("a line has more than {} MiB", CLIENT_LINE_BYTES_MAX >> 20);
                return Err(Error::nonsense("what the daemon sends", why));
            }
            return Ok(None);
        };
        let line = self.received.drain(..=self.searched + end).collect();
        self.searched = 0;
        Ok(Some(line))
    }

    fn silent(&self, what: &str) -> Error {
        Error::Silent {
            what: what.to_owned(),
            limit: self.limit,
        }
    }
}

/// What a command returned, understood.
///
/// # Errors
/// If it is not of this shape.
pub fn understand<T: DeserializeOwned>(command: &str, reply: Value) -> Result<T, Error> {
    serde_json::from_value(reply)
        .map_err(|error| Error::nonsense(format!("the reply to {command}"), error))
}

fn is_job_end(message: &Message) -> bool {
    matches!(
        message.event(),
        Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")
    )
}

fn parse(line: &[u8]) -> Result<Message, Error> {
    let nonsense = |why: String| Error::nonsense("what the daemon sends", why);
    let line = std::str::from_utf8(line).map_err(|error| nonsense(error.to_string()))?;
    let value: Value = serde_json::from_str(line).map_err(|error| nonsense(error.to_string()))?;
    if !value.is_object() {
        return Err(nonsense("not a JSON object".into()));
    }
    Ok(Message {
        line: line.trim().to_owned(),
        value,
    })
}

/// How a socket tells that its time is over.
fn is_timeout(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
