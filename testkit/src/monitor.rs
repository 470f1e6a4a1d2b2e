//! A small client of the QEMU Machine Protocol (QEMU's docs/interop/qmp-spec): JSON objects, one a
//! line.

use crate::HANG_LIMIT;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::wait_until;

/// Time between two looks at the clock while the monitor is silent.
const READ_INTERVAL: Duration = Duration::from_millis(200);

/// A connection to a monitor, capabilities negotiated.
pub struct Monitor {
    stream: UnixStream,
    /// Read from it and no whole line yet.
    received: Vec<u8>,
    /// Events that were received and not returned yet.
    events: VecDeque<Value>,
}

impl Monitor {
    /// Connects to the monitor at `socket`, which may not be there yet.
    pub fn connect(socket: &Path) -> Self {
        let mut connected = None;
        wait_until(HANG_LIMIT, || {
            connected = UnixStream::connect(socket).ok();
            connected.is_some()
        });
        let stream = connected.unwrap_or_else(|| panic!("no monitor at {}", socket.display()));
        stream
            .set_read_timeout(Some(READ_INTERVAL))
            .expect("setting a socket's timeout");
        let mut monitor = Self {
            stream,
            received: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = monitor.receive(Instant::now() + HANG_LIMIT);
        let greeting = greeting.expect("no greeting from the monitor in time");
        assert!(greeting["QMP"].is_object(), "{greeting}");
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    /// Runs a command that has to succeed, and returns what the monitor returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Runs a command. The error is the monitor's, an object with `class` and `desc`.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.send(command, arguments);
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let message = self.receive(deadline);
            let mut message =
                message.unwrap_or_else(|| panic!("{command}: no answer within {HANG_LIMIT:?}"));
            if message["event"].is_string() {
                self.events.push_back(message);
            } else if message["error"].is_object() {
                return Err(message["error"].take());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Sends a command, and does not wait for its reply.
    pub fn send(&mut self, command: &str, arguments: Value) {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .expect("sending the monitor a command");
    }

    /// The first event, of those not returned yet and those that come within `limit`, that
    /// `is_wanted`. The others are kept.
    pub fn wait_for_event(
        &mut self,
        mut is_wanted: impl FnMut(&Value) -> bool,
        limit: Duration,
    ) -> Option<Value> {
        if let Some(index) = self.events.iter().position(&mut is_wanted) {
            return self.events.remove(index);
        }
        let deadline = Instant::now() + limit;
        loop {
            let message = self.receive(deadline)?;
            if is_wanted(&message) {
                return Some(message);
            }
            self.events.push_back(message);
        }
    }

    /// The next message, if it comes before `deadline`.
    fn receive(&mut self, deadline: Instant) -> Option<Value> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let message = serde_json::from_slice(&line);
                return Some(message.unwrap_or_else(|error| {
                    panic!(
                        "not a message ({error}): {}",
                        String::from_utf8_lossy(&line)
                    )
                }));
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("the monitor closed the connection"),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted if Instant::now() < deadline => {
                    }
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => return None,
                    _ => panic!("reading from the monitor: {error}"),
                },
            }
        }
    }
}
