//! The meaning of bytes for the monitor, read the simple way: all of them are there, each message
//! is cut out as a whole, and each command parses its arguments by hand.

use quorum_blk::control::loss_state::LossState;
use quorum_blk::control::{Change, JobOrder};
use quorum_blk::limits::{MAP_BUCKETS, QMP_MESSAGE_BYTES_MAX};
use serde_json::{Map, Value, json};

use super::super::operator::{Asked, DISK, REPLICAS, answer};

/// The reply to a message.
pub enum Outcome {
    /// A success.
    Returned {
        /// The `id` of the message.
        id: Option<Value>,
        /// The value, where it is known.
        value: Option<Value>,
    },
    /// An error.
    Failed {
        /// The `id` of the message.
        id: Option<Value>,
        /// The class of the error.
        class: &'static str,
    },
}

/// The replies to all the bytes.
#[derive(Default)]
pub struct Conversation {
    /// The reply to each message.
    pub outcomes: Vec<Outcome>,
    /// The calls of the operator.
    pub asked: Vec<Asked>,
    negotiated: bool,
}

const GENERIC: &str = "GenericError";
const NOT_FOUND: &str = "CommandNotFound";

/// The meaning of the bytes after a client has just connected.
pub fn read(bytes: &[u8]) -> Conversation {
    let mut conversation = Conversation::default();
    let mut rest = bytes;
    loop {
        while let [b' ' | b'\t' | b'\r' | b'\n' | 0xff, after @ ..] = rest {
            rest = after;
        }
        if rest.is_empty() {
            return conversation;
        }
        match cut(rest) {
            Cut::Message(text, bytes) => {
                conversation.hear(&text);
                rest = &rest[bytes..];
            }
            Cut::Garbage(bytes) => {
                let (id, class) = (None, GENERIC);
                conversation.outcomes.push(Outcome::Failed { id, class });
                rest = &rest[bytes..];
            }
            Cut::TooLong => {
                let (id, class) = (None, GENERIC);
                conversation.outcomes.push(Outcome::Failed { id, class });
                return conversation;
            }
            Cut::Incomplete => return conversation,
        }
    }
}

enum Cut {
    /// A message with double quotes, and its length in bytes.
    Message(String, usize),
    /// The number of bytes to skip.
    Garbage(usize),
    TooLong,
    Incomplete,
}

/// The beginning of the bytes.
fn cut(bytes: &[u8]) -> Cut {
    if !matches!(bytes[0], b'{' | b'[') {
        return Cut::Garbage(line_bytes(bytes, 0));
    }
    let (mut text, mut depth, mut at) = (Vec::new(), 0, 0);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            0xff => return Cut::Garbage(at + 1),
            b'"' | b'\'' => match string(
                &bytes[at..],
                QMP_MESSAGE_BYTES_MAX.saturating_sub(text.len()),
            ) {
                Ok((string, length)) => {
                    text.extend(string);
                    at += length - 1;
                }
                Err(Cut::Garbage(length)) => return Cut::Garbage(at + length),
                Err(other) => return other,
            },
            _ => {
                depth +=
                    i32::from(matches!(byte, b'{' | b'[')) - i32::from(matches!(byte, b'}' | b']'));
                text.push(byte);
            }
        }
        at += 1;
        if text.len() > QMP_MESSAGE_BYTES_MAX {
            return Cut::TooLong;
        }
        if depth == 0 {
            // Invalid UTF-8 is invalid JSON too.
            return Cut::Message(String::from_utf8(text).unwrap_or_default(), at);
        }
    }
    Cut::Incomplete
}

/// A string with the quotes of JSON, and its length in bytes.
fn string(bytes: &[u8], room: usize) -> Result<(Vec<u8>, usize), Cut> {
    let quote = bytes[0];
    let (mut text, mut at) = (vec![b'"'], 1);
    loop {
        if text.len() > room {
            return Err(Cut::TooLong);
        }
        match bytes[at..] {
            [] | [b'\\'] => break,
            [0xff, ..] => return Err(Cut::Garbage(at + 1)),
            [byte, ..] if byte < b' ' => return Err(Cut::Garbage(line_bytes(bytes, at))),
            // One of the two does not count, so the message may still be short enough.
            [b'\\', b'\'', ..] => {
                if text.len() >= room {
                    return Err(Cut::TooLong);
                }
                text.push(b'\'');
                at += 2;
            }
            [b'\\', escaped, ..] if escaped >= b' ' && escaped != 0xff => {
                text.extend([b'\\', escaped]);
                at += 2;
            }
            [b'\\', ..] => {
                text.push(b'\\');
                at += 1;
            }
            [byte, ..] if byte == quote => {
                text.push(b'"');
                if text.len() > room {
                    return Err(Cut::TooLong);
                }
                return Ok((text, at + 1));
            }
            [b'"', ..] => {
                text.extend(b"\\\"");
                at += 1;
            }
            [byte, ..] => {
                text.push(byte);
                at += 1;
            }
        }
    }
    if text.len() + (bytes.len() - at) > room {
        return Err(Cut::TooLong);
    }
    Err(Cut::Incomplete)
}

/// The bytes to the end of the line that `from` is in, or to where a client starts over.
fn line_bytes(bytes: &[u8], from: usize) -> usize {
    let ends = |byte: &u8| matches!(byte, b'\n' | 0xff);
    let end = bytes[from..].iter().position(ends);
    end.map_or(bytes.len(), |end| from + end + 1)
}

impl Conversation {
    fn hear(&mut self, text: &str) {
        let Ok(Value::Object(mut message)) = serde_json::from_str(text) else {
            let (id, class) = (None, GENERIC);
            self.outcomes.push(Outcome::Failed { id, class });
            return;
        };
        let id = message.remove("id");
        let outcome = match self.understand(message) {
            Ok(value) => Outcome::Returned { id, value },
            Err(class) => Outcome::Failed { id, class },
        };
        self.outcomes.push(outcome);
    }

    fn understand(
        &mut self,
        mut message: Map<String, Value>,
    ) -> Result<Option<Value>, &'static str> {
        let execute = message.remove("execute");
        let arguments = message.remove("arguments").unwrap_or(json!({}));
        let (Some(Value::String(name)), Value::Object(arguments), true) =
            (execute, arguments, message.is_empty())
        else {
            return Err(GENERIC);
        };
        match (name.as_str(), self.negotiated) {
            ("qmp_capabilities", true) => Err(NOT_FOUND),
            ("qmp_capabilities", false) => {
                let mut arguments = Arguments(arguments);
                let enable = arguments.take("enable");
                arguments.end()?;
                if !enable.is_none_or(|enable| enable == json!([])) {
                    return Err(GENERIC);
                }
                self.negotiated = true;
                Ok(Some(json!({})))
            }
            (_, false) => Err(NOT_FOUND),
            (name, true) => self.run(name, Arguments(arguments)),
        }
    }

    fn run(&mut self, name: &str, mut arguments: Arguments) -> Result<Option<Value>, &'static str> {
        let value = match name {
            "query-status" => Some(json!({ "running": true, "status": "running" })),
            "query-jobs" | "query-quorum-jobs" => Some(json!([])),
            "query-version" | "query-commands" | "query-block" | "query-quorum" => None,
            "query-quorum-map" => {
                let buckets = match arguments.take("buckets") {
                    None | Some(Value::Null) => MAP_BUCKETS as u64,
                    Some(value) => value.as_u64().ok_or(GENERIC)?,
                };
                if !(1..=MAP_BUCKETS as u64).contains(&buckets) {
                    return Err(GENERIC);
                }
                None
            }
            "query-blockstats" => {
                arguments.flag("query-nodes")?;
                None
            }
            "query-named-block-nodes" => {
                arguments.flag("flat")?;
                None
            }
            "quit" => {
                arguments.end()?;
                self.asked.push(Asked::Quit);
                Some(json!({}))
            }
            "quorum-fail" => {
                let node_name = arguments.text("node-name")?;
                let force = arguments.flag("force")?;
                arguments.end()?;
                self.asked.push(Asked::Fail(node_name, force));
                let loss = LossState {
                    removed: force,
                    ..LossState::default()
                };
                Some(json!(loss))
            }
            _ => {
                let change = change(name, &mut arguments)?;
                arguments.end()?;
                let answer = answer(&change);
                self.asked.push(Asked::Change(change));
                match answer {
                    Ok(Some(job)) => Some(json!({ "id": job })),
                    Ok(None) => Some(json!({})),
                    Err(_) => return Err(GENERIC),
                }
            }
        };
        arguments.end()?;
        Ok(value)
    }
}

/// Parses a command into a call of the operator.
fn change(name: &str, arguments: &mut Arguments) -> Result<Change, &'static str> {
    Ok(match name {
        "block-job-set-speed" => Change::Job {
            id: arguments.text("device")?,
            order: JobOrder::Speed(arguments.number("speed")?.ok_or(GENERIC)?),
        },
        "job-cancel" | "job-pause" | "job-resume" => Change::Job {
            id: arguments.text("id")?,
            order: match name {
                "job-cancel" => JobOrder::Cancel,
                "job-pause" => JobOrder::Pause,
                _ => JobOrder::Resume,
            },
        },
        "quorum-resync" => Change::Resync {
            node_name: arguments.text("node-name")?,
            speed_bytes: arguments.number("speed")?.unwrap_or(0),
        },
        "quorum-prefer" => Change::Prefer {
            node_name: arguments.text("node-name")?,
            force: arguments.flag("force")?,
            speed_bytes: arguments.number("speed")?.unwrap_or(0),
        },
        "block_resize" => {
            let device = arguments.optional_text("device")?;
            let node = arguments.optional_text("node-name")?;
            let mut names = [device, node].into_iter().flatten().peekable();
            if names.peek().is_none() || names.any(|name| name != DISK) {
                return Err(GENERIC);
            }
            Change::Resize {
                size_bytes: arguments.number("size")?.ok_or(GENERIC)?,
            }
        }
        "quorum-clear-errors" => Change::ClearErrors(arguments.optional_text("node-name")?),
        "quorum-rename" => Change::RenameReplica {
            node_name: arguments.text("node-name")?,
            new_name: arguments.text("new-name")?,
        },
        "quorum-scrub" => Change::Scrub {
            repair: arguments.flag("repair")?,
            speed_bytes: arguments.number("speed")?.unwrap_or(0),
        },
        "quorum-set-threshold" => {
            let threshold = match arguments.take("vote-threshold") {
                None | Some(Value::Null) => None,
                Some(value) => Some(value.as_u64().ok_or(GENERIC)?),
            };
            if threshold.is_some() == arguments.flag("majority")? {
                return Err(GENERIC);
            }
            let threshold = threshold.map(usize::try_from).transpose();
            Change::Threshold(threshold.map_err(|_| GENERIC)?)
        }
        "cont" => Change::Continue,
        "blockdev-del" => Change::RemoveNode(arguments.text("node-name")?),
        "blockdev-add" => add_node(arguments)?,
        "x-blockdev-change" => change_replicas(arguments)?,
        _ => return Err(NOT_FOUND),
    })
}

/// `blockdev-add`, of one driver or of two on top of each other.
fn add_node(arguments: &mut Arguments) -> Result<Change, &'static str> {
    let driver = arguments.text("driver")?;
    let node_name = arguments.text("node-name")?;
    let filename = arguments.optional_text("filename")?;
    let file = arguments.take("file").filter(|file| !file.is_null());
    let path = match (driver.as_str(), filename, file) {
        ("file" | "host_device", Some(filename), None) => filename,
        ("raw", None, Some(Value::Object(file))) => {
            let mut file = Arguments(file);
            let driver = file.text("driver")?;
            let filename = file.text("filename")?;
            file.end()?;
            let opens = ["file", "host_device"].contains(&driver.as_str());
            opens.then_some(filename).ok_or(GENERIC)?
        }
        _ => return Err(GENERIC),
    };
    let path = path.into();
    Ok(Change::AddNode { node_name, path })
}

/// `x-blockdev-change`, which adds or removes one replica.
fn change_replicas(arguments: &mut Arguments) -> Result<Change, &'static str> {
    let parent = arguments.text("parent")?;
    let child = arguments.optional_text("child")?;
    let node = arguments.optional_text("node")?;
    let force = arguments.flag("force")?;
    match (child, node) {
        _ if parent != DISK => Err(GENERIC),
        (None, Some(node_name)) => Ok(Change::AddReplica { node_name, force }),
        (Some(child), None) if !force => {
            let mut places = REPLICAS.iter().enumerate();
            let named = places.find(|(place, _)| child == format!("children.{place}"));
            let name = named.map(|(_, name)| (*name).into());
            Ok(Change::RemoveReplica(name.unwrap_or(child)))
        }
        _ => Err(GENERIC),
    }
}

/// The arguments of a command that were not read yet.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    fn text(&mut self, name: &str) -> Result<String, &'static str> {
        match self.take(name) {
            Some(Value::String(text)) => Ok(text),
            _ => Err(GENERIC),
        }
    }

    fn optional_text(&mut self, name: &str) -> Result<Option<String>, &'static str> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(GENERIC),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, &'static str> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or(GENERIC),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool, &'static str> {
        match self.take(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or(GENERIC),
        }
    }

    /// Rejects arguments that are left.
    fn end(&self) -> Result<(), &'static str> {
        self.0.is_empty().then_some(()).ok_or(GENERIC)
    }
}
