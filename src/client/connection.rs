//! The monitor protocol: a blocking connection that runs commands and receives events.
//!
//! Invariants: the length of a line and the number of stored events are bounded; every wait has a
//! deadline, connecting included; anything that is not a message of the protocol is an error.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Error;
use crate::limits::{CLIENT_EVENTS_KEPT_MAX, CLIENT_LINE_BYTES_MAX};

/// A monitor greets each client at once, whatever the disks do. Other sockets never do.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// A connection after the negotiation of capabilities.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Received bytes that `take_line` has not returned yet.
    received: Vec<u8>,
    /// The first bytes of `received` that contain no line end.
    searched: usize,
    /// Events about the end of a job that arrived during another wait.
    job_ends: VecDeque<Value>,
    /// The time limit of each answer.
    limit: Duration,
}

/// A reply or an event.
#[derive(Debug)]
pub(super) struct Message {
    /// As received, without the line end.
    pub(super) line: String,
    /// The parsed line, a JSON object.
    pub(super) value: Value,
}

impl Message {
    /// The name of the event, if it is one.
    pub(super) fn event(&self) -> Option<&str> {
        self.value.get("event").and_then(Value::as_str)
    }
}

impl Connection {
    /// Connects to the monitor at `path`. Each of its answers must arrive within `limit`.
    pub(super) fn open(path: &Path, limit: Duration) -> Result<Self, Error> {
        let stream = connect_within(path, limit).map_err(|source| {
            if is_timeout(source.kind()) {
                let request = "a connection attempt".to_owned();
                return Error::Timeout { request, limit };
            }
            let path = path.to_owned();
            Error::Connect { path, source }
        })?;
        let mut connection = Self {
            stream,
            received: Vec::new(),
            searched: 0,
            job_ends: VecDeque::new(),
            limit,
        };
        let limit = limit.min(GREETING_LIMIT);
        let greeting = connection.receive(Instant::now() + limit)?;
        let greeting = greeting.ok_or_else(|| {
            let path = path.to_owned();
            Error::Silent { path, limit }
        })?;
        if !greeting.value.get("QMP").is_some_and(Value::is_object) {
            return Err(Error::invalid(
                "the greeting of the server",
                "this is not a monitor of quorum-blkd or QEMU",
            ));
        }
        connection.execute("qmp_capabilities", json!({}))?;
        Ok(connection)
    }

    /// Runs a command and returns the value of its reply.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.send(command, arguments)?;
        let deadline = Instant::now() + self.limit;
        loop {
            let mut message = match self.receive(deadline)? {
                Some(message) => message,
                None if Instant::now() < deadline => continue,
                None => return Err(self.timeout(command)),
            };
            if message.event().is_some() {
                self.store_job_end(message.value);
            } else if let Some(error) = message.value.get("error") {
                let desc = error.get("desc").and_then(Value::as_str);
                let desc = desc.unwrap_or("the command failed, and the daemon gives no reason");
                return Err(Error::Rejected(desc.to_owned()));
            } else if let Some(returned) = message.value.get_mut("return") {
                return Ok(returned.take());
            } else {
                let reply = format!("the reply to {command}");
                return Err(Error::invalid(reply, "it has neither return nor error"));
            }
        }
    }

    fn send(&mut self, command: &str, arguments: Value) -> Result<(), Error> {
        let mut request = json!({ "execute": command });
        let arguments_are_empty = arguments
            .as_object()
            .is_some_and(|arguments| arguments.is_empty());
        if !arguments_are_empty {
            request["arguments"] = arguments;
        }
        let sent = self.stream.write_all(format!("{request}\n").as_bytes());
        sent.map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Error::Closed,
            kind if is_timeout(kind) => self.timeout(command),
            _ => Error::Lost(error),
        })
    }

    /// Runs a command without arguments and parses its reply.
    pub(super) fn query<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, Error> {
        let reply = self.execute(command, json!({}))?;
        parse_reply(command, reply)
    }

    /// The next message. None if `deadline` passes or a signal arrives before it.
    pub(super) fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, Error> {
        loop {
            if let Some(line) = self.take_line()? {
                return parse(&line).map(Some);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // A timeout of zero would mean no timeout.
            self.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))
                .map_err(Error::Lost)?;
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(None),
                Err(error) if is_timeout(error.kind()) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(Error::Closed);
                }
                Err(error) => return Err(Error::Lost(error)),
            }
        }
    }

    /// Waits until `deadline`, a signal or the end of a job, and stores the ends of jobs.
    pub(super) fn wait_for_job_end(&mut self, deadline: Instant) -> Result<(), Error> {
        while let Some(message) = self.receive(deadline)? {
            let is_end = self.store_job_end(message.value);
            if is_end || Instant::now() >= deadline {
                break;
            }
        }
        Ok(())
    }

    /// Takes the first stored end of a job that `is_wanted`.
    pub(super) fn take_job_end(
        &mut self,
        mut is_wanted: impl FnMut(&Value) -> bool,
    ) -> Option<Value> {
        let index = self.job_ends.iter().position(&mut is_wanted)?;
        self.job_ends.remove(index)
    }

    /// Stores the event if it is the end of a job, and says whether it is.
    fn store_job_end(&mut self, value: Value) -> bool {
        let name = value.get("event").and_then(Value::as_str);
        if !matches!(name, Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")) {
            return false;
        }
        if self.job_ends.len() == CLIENT_EVENTS_KEPT_MAX {
            self.job_ends.pop_front();
        }
        self.job_ends.push_back(value);
        true
    }

    fn take_line(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let unsearched = &self.received[self.searched..];
        let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.received.len();
            if self.searched > CLIENT_LINE_BYTES_MAX {
                let mib = CLIENT_LINE_BYTES_MAX >> 20;
                let reason = format!("the line is longer than {mib} MiB");
                return Err(Error::invalid("a message of the server", reason));
            }
            return Ok(None);
        };
        let line = self.received.drain(..=self.searched + end).collect();
        self.searched = 0;
        Ok(Some(line))
    }

    fn timeout(&self, request: &str) -> Error {
        Error::Timeout {
            request: request.to_owned(),
            limit: self.limit,
        }
    }
}

/// Connects; the limit covers the connection attempt and each later write.
fn connect_within(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // Linux applies the send timeout while the server's queue of connections is full.
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Parses the value that a command returned.
pub(super) fn parse_reply<T: DeserializeOwned>(command: &str, reply: Value) -> Result<T, Error> {
    serde_json::from_value(reply)
        .map_err(|error| Error::invalid(format!("the reply to {command}"), error))
}

fn parse(line: &[u8]) -> Result<Message, Error> {
    let invalid = |reason: String| Error::invalid("a message of the server", reason);
    let line = std::str::from_utf8(line).map_err(|error| invalid(error.to_string()))?;
    let value: Value = serde_json::from_str(line).map_err(|error| invalid(error.to_string()))?;
    if !value.is_object() {
        return Err(invalid("not a JSON object".into()));
    }
    Ok(Message {
        line: line.trim().to_owned(),
        value,
    })
}

/// Whether a socket reports with this error that its time limit has passed.
fn is_timeout(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
