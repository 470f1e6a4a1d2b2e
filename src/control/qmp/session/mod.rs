//! The conversation with one client as a pure state machine: bytes in, replies and calls out.
//!
//! ```text
//! greeting ─► negotiating ── qmp_capabilities ─► negotiated: commands, and events from now on
//! ```
//!
//! Invariants: each message has one reply, in the order of the messages; a reply is one line and
//! ASCII; a reply has the `id` of its message, which may be any JSON value.

use serde::Serialize;
use serde_json::{Map, Value};

use super::commands::{self, Command, Returned};
use super::error::CommandError;
use super::splitter::{Found, Splitter};
use super::version::Version;
use crate::control::Operator;
use crate::control::json::to_ascii;

/// One client's conversation.
#[derive(Debug, Default)]
pub struct Session {
    splitter: Splitter,
    /// Received bytes; those from `looked_at` on are not processed.
    received: Vec<u8>,
    looked_at: usize,
    negotiated: bool,
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Send this line.
    Reply(Vec<u8>),
    /// Run this and send its reply, before the next step.
    Execute(Call),
    /// Send this line and read no more from the client.
    Close(Vec<u8>),
}

/// A command, ready to be run.
#[derive(Debug)]
pub struct Call {
    command: &'static Command,
    arguments: Map<String, Value>,
    id: Option<Value>,
}

impl Call {
    /// Runs the command. Returns the reply, one line without its end.
    pub fn run(self, operator: &dyn Operator) -> Vec<u8> {
        reply(self.command.run(self.arguments, operator), self.id)
    }

    /// Whether it may wait for the file system of an image.
    pub fn may_wait(&self) -> bool {
        commands::WAITING.contains(&self.command.name)
    }

    /// The reply if the command cannot be run, for this reason.
    pub fn fail(self, reason: String) -> Vec<u8> {
        reply(Err(CommandError::generic(reason)), self.id)
    }

    /// The name of the command.
    pub fn name(&self) -> &'static str {
        self.command.name
    }
}

impl Session {
    /// The first line that a client gets.
    pub fn greeting() -> Vec<u8> {
        #[derive(Serialize)]
        struct Greeting {
            #[serde(rename = "QMP")]
            qmp: Qmp,
        }
        #[derive(Serialize)]
        struct Qmp {
            version: Version,
            capabilities: [&'static str; 0],
        }
        to_ascii(&Greeting {
            qmp: Qmp {
                version: Version::of_this_program(),
                capabilities: [],
            },
        })
    }

    /// Appends bytes of the client. [`Self::step`] processes them.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.received.drain(..self.looked_at);
        self.looked_at = 0;
        self.received.extend_from_slice(bytes);
    }

    /// What to do next; `None` until more is received.
    pub fn step(&mut self) -> Option<Step> {
        while let Some(&byte) = self.received.get(self.looked_at) {
            self.looked_at += 1;
            if let Some(found) = self.splitter.push(byte) {
                return Some(self.take(found));
            }
        }
        None
    }

    /// Bytes that are buffered for the client.
    pub fn held_bytes(&self) -> usize {
        self.received.capacity() + self.splitter.held_bytes()
    }

    /// Whether the client has negotiated, and so gets events.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    fn take(&mut self, found: Found) -> Step {
        let text = match found {
            Found::Message(text) => text,
            Found::Garbage(why) => {
                let error = CommandError::generic(format!("JSON parse error, {why}"));
                return Step::Reply(reply(Err(error), None));
            }
            Found::TooLong => {
                let error = CommandError::generic("JSON parse error, the message is too long");
                return Step::Close(reply(Err(error), None));
            }
        };
        let mut message = match serde_json::from_slice(&text) {
            Ok(Value::Object(message)) => message,
            Ok(_) => {
                let error = CommandError::generic("QMP input must be a JSON object");
                return Step::Reply(reply(Err(error), None));
            }
            Err(error) => {
                let error = CommandError::generic(format!("JSON parse error, {error}"));
                return Step::Reply(reply(Err(error), None));
            }
        };
        let id = message.remove("id");
        match self.parse(message) {
            Ok(Parsed::Negotiated(returned)) => Step::Reply(reply(Ok(returned), id)),
            Ok(Parsed::Call(command, arguments)) => Step::Execute(Call {
                command,
                arguments,
                id,
            }),
            Err(error) => Step::Reply(reply(Err(error), id)),
        }
    }

    fn parse(&mut self, mut message: Map<String, Value>) -> Result<Parsed, CommandError> {
        let execute = message.remove("execute");
        let arguments = message.remove("arguments");
        if let Some(member) = message.keys().next() {
            let text = format!("QMP input member '{member}' is unexpected");
            return Err(CommandError::generic(text));
        }
        let name = match execute {
            Some(Value::String(name)) => name,
            Some(_) => {
                return Err(CommandError::generic(
                    "QMP input member 'execute' must be a string",
                ));
            }
            None => return Err(CommandError::generic("QMP input lacks member 'execute'")),
        };
        let arguments = match arguments {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                return Err(CommandError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
            None => Map::new(),
        };
        if name == commands::NEGOTIATION {
            if self.negotiated {
                return Err(CommandError::not_found(
                    "Capabilities negotiation is already complete, command ignored",
                ));
            }
            let returned = commands::negotiate(arguments)?;
            self.negotiated = true;
            return Ok(Parsed::Negotiated(returned));
        }
        if !self.negotiated {
            return Err(CommandError::not_found(format!(
                "Expecting capabilities negotiation with '{}'",
                commands::NEGOTIATION
            )));
        }
        match commands::find(&name) {
            Some(command) => Ok(Parsed::Call(command, arguments)),
            None => Err(CommandError::not_found(format!(
                "The command {name} has not been found"
            ))),
        }
    }
}

enum Parsed {
    Negotiated(Returned),
    Call(&'static Command, Map<String, Value>),
}

/// A whole conversation with a client that sends `bytes` without waiting for replies: the lines
/// that it gets. For tests and fuzzing.
pub fn converse(bytes: &[u8], operator: &dyn Operator) -> Vec<Vec<u8>> {
    let mut session = Session::default();
    let mut lines = vec![Session::greeting()];
    // In parts, as from a socket.
    for part in bytes.chunks(READ_BYTES) {
        session.receive(part);
        while let Some(step) = session.step() {
            match step {
                Step::Reply(line) => lines.push(line),
                Step::Execute(call) => lines.push(call.run(operator)),
                Step::Close(line) => {
                    lines.push(line);
                    return lines;
                }
            }
        }
    }
    lines
}

/// Bytes that are received at a time.
pub(in crate::control) const READ_BYTES: usize = 4096;

fn reply(outcome: Result<Returned, CommandError>, id: Option<Value>) -> Vec<u8> {
    let (name, value) = match outcome {
        Ok(returned) => ("return", returned),
        Err(error) => ("error", to_ascii(&error)),
    };
    let mut line = format!("{{\"{name}\":").into_bytes();
    line.extend(value);
    if let Some(id) = id {
        line.extend(b",\"id\":");
        line.extend(to_ascii(&id));
    }
    line.push(b'}');
    line
}

#[cfg(test)]
mod tests;
