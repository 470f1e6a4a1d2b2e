//! The monitor, with bytes that arrive in parts of any size: the session alone, and clients on a
//! socket that half-close it or disconnect without reading.
//!
//! What must hold: each message gets the reply of the [naive reading](expected) of the same bytes,
//! once, in order, with its `id`; the operator gets the calls that the messages name and no others;
//! the sizes of the parts make no difference; a reply is one line of JSON in ASCII; the memory for
//! a client is bounded; the next client is served.

mod expected;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::control::events::Names;
use quorum_blk::control::publisher::{self, Publisher};
use quorum_blk::control::qmp::session::{Session, Step, converse};
use quorum_blk::control::queue::EventQueue;
use quorum_blk::control::socket::{Listener, SocketAccess, bind_unix_listener};
use quorum_blk::limits::QMP_MESSAGE_BYTES_MAX;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::Value;

use self::expected::{Conversation, Outcome};
use super::operator::{Asked, Recorder};
use super::script::Script;
use super::signals::ignore_sigpipe;

/// Option: capabilities are negotiated before the bytes of the input.
pub const NEGOTIATE: u8 = 1;
/// Option: a client sends the input over a socket too, and closes its writing side.
pub const SOCKET: u8 = 2;
/// Option: a client sends the input, and disconnects without reading.
pub const LEAVE: u8 = 4;
/// Option: one of the bytes is repeated many times.
pub const REPEAT: u8 = 8;

const NEGOTIATION: &[u8] = b"{\"execute\":\"qmp_capabilities\"}";

/// The memory for a client: a message and the next read, doubled by the growth of a `Vec`.
const HELD_BYTES_MAX: usize = 2 * (QMP_MESSAGE_BYTES_MAX + 2 * 4096);

/// No step takes longer.
const LIMIT: Duration = Duration::from_secs(8);

/// A parsed input.
struct Case {
    options: u8,
    /// The sizes of the parts, used over and over. 0 means all bytes that are left.
    sizes: [u8; 4],
    bytes: Vec<u8>,
}

impl Case {
    fn read(input: &[u8]) -> Self {
        let mut script = Script::new(input);
        let options = script.u8();
        let sizes = std::array::from_fn(|_| script.u8());
        let (place, times) = (script.u8(), script.u8());
        let mut bytes = script.rest().to_vec();
        if options & REPEAT != 0 && !bytes.is_empty() {
            let place = usize::from(place) * bytes.len() / 256;
            let repeated = vec![bytes[place]; usize::from(times) * 1024];
            bytes.splice(place..place, repeated);
        }
        if options & NEGOTIATE != 0 {
            bytes.splice(0..0, NEGOTIATION.iter().copied());
        }
        Self {
            options,
            sizes,
            bytes,
        }
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let mut sizes = self.sizes.iter().cycle();
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let size = match sizes.next() {
                Some(0) | None => rest.len(),
                Some(size) => rest.len().min(usize::from(*size)),
            };
            let (part, after) = rest.split_at(size);
            rest = after;
            (!part.is_empty()).then_some(part)
        })
    }
}

/// Sends the bytes of an input in each way that its options name.
pub fn run(input: &[u8]) {
    let case = Case::read(input);
    let wanted = expected::read(&case.bytes);
    let recorder = Recorder::default();
    let lines = alone(&case, &recorder);
    check(&lines, &wanted);
    assert_eq!(
        recorder.asked(),
        wanted.asked,
        "what the operator is asked for"
    );
    let recorder = Recorder::default();
    assert!(converse(&case.bytes, &recorder) == lines, "cut otherwise");
    assert_eq!(recorder.asked(), wanted.asked, "cut otherwise");
    if case.options & (SOCKET | LEAVE) != 0 {
        let machine = Machine::new();
        if case.options & LEAVE != 0 {
            machine.leave(&case);
        }
        if case.options & SOCKET != 0 {
            machine.converse(&case, &lines);
        }
        machine.expect_well();
    }
}

/// The replies of the session to the parts.
fn alone(case: &Case, recorder: &Recorder) -> Vec<Vec<u8>> {
    let mut session = Session::default();
    let mut lines = vec![Session::greeting()];
    for part in case.parts().flat_map(|part| part.chunks(4096)) {
        session.receive(part);
        while let Some(step) = session.step() {
            match step {
                Step::Reply(line) => lines.push(line),
                Step::Execute(call) => lines.push(call.run(recorder)),
                Step::Close(line) => {
                    lines.push(line);
                    return lines;
                }
            }
        }
        assert!(
            session.held_bytes() <= HELD_BYTES_MAX,
            "{}",
            session.held_bytes()
        );
    }
    lines
}

/// Compares the replies with the naive reading of the same bytes.
fn check(lines: &[Vec<u8>], wanted: &Conversation) {
    assert_eq!(
        lines.len() - 1,
        wanted.outcomes.len(),
        "one reply for each message"
    );
    for (line, outcome) in lines[1..].iter().zip(&wanted.outcomes) {
        let text = std::str::from_utf8(line).expect("text");
        assert!(
            text.is_ascii() && !text.contains(['\r', '\n']),
            "a line of ASCII: {text}"
        );
        let Ok(Value::Object(mut reply)) = serde_json::from_str(text) else {
            panic!("not an object: {text}");
        };
        assert_eq!(reply.remove("id"), wanted_id(outcome), "the id of {text}");
        match outcome {
            Outcome::Returned { value, .. } => {
                let returned = reply
                    .remove("return")
                    .unwrap_or_else(|| panic!("failed: {text}"));
                assert!(
                    value.as_ref().is_none_or(|value| *value == returned),
                    "{text}"
                );
                assert!(returned.is_object() || returned.is_array(), "{text}");
            }
            Outcome::Failed { class, .. } => {
                let Some(Value::Object(mut error)) = reply.remove("error") else {
                    panic!("succeeded: {text}");
                };
                assert_eq!(error.remove("class"), Some((*class).into()), "{text}");
                assert!(
                    error.remove("desc").is_some_and(|desc| desc.is_string()),
                    "{text}"
                );
                assert!(error.is_empty(), "{text}");
            }
        }
        assert!(reply.is_empty(), "more than a reply: {text}");
    }
}

fn wanted_id(outcome: &Outcome) -> Option<Value> {
    let (Outcome::Returned { id, .. } | Outcome::Failed { id, .. }) = outcome;
    id.clone()
}

/// The monitor on its socket.
struct Machine {
    publisher: Publisher,
    recorder: Arc<Recorder>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("qmp.sock");
        let recorder = Arc::new(Recorder::default());
        let monitor = publisher::Monitor {
            listener: Listener::Bound(
                bind_unix_listener(&path, SocketAccess::OWNER).expect("a socket"),
            ),
            operator: recorder.clone(),
        };
        let names = Names {
            reference: "quorum0".into(),
            nodes: ["0.raw".to_owned()].into_iter().collect(),
        };
        let queue = EventQueue::new().expect("an eventfd");
        let publisher = Publisher::spawn(None, Some(monitor), queue, names).expect("a thread");
        Self {
            publisher,
            recorder,
            path,
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        ignore_sigpipe();
        let socket = UnixStream::connect(&self.path).expect("the monitor listens");
        socket.set_nonblocking(true).expect("a socket");
        socket
    }

    /// Sends all bytes and reads all replies.
    fn converse(&self, case: &Case, lines: &[Vec<u8>]) {
        let socket = self.connect();
        let mut received = Vec::new();
        // The monitor closes the connection after a message that is too long.
        let _ = case
            .parts()
            .try_for_each(|part| send(&socket, part, &mut received));
        let _ = socket.shutdown(Shutdown::Write);
        while read(&socket, &mut received) {
            wait(&socket, PollFlags::IN);
        }
        let wanted: Vec<u8> = lines
            .iter()
            .flat_map(|line| [line, &b"\r\n"[..]].concat())
            .collect();
        assert!(
            received == wanted,
            "on a socket: {}",
            String::from_utf8_lossy(&received)
        );
    }

    /// Sends as much as the socket has room for, and closes it.
    fn leave(&self, case: &Case) {
        let socket = self.connect();
        let _ = case.parts().try_for_each(|part| (&socket).write_all(part));
    }

    /// Asserts that another client is served.
    fn expect_well(self) {
        let case = Case {
            options: SOCKET,
            sizes: [0; 4],
            bytes: [NEGOTIATION, b"{'execute':'quit','id':[]}"].concat(),
        };
        self.converse(&case, &converse(&case.bytes, &Recorder::default()));
        assert!(self.recorder.asked().contains(&Asked::Quit));
        self.publisher.stop();
        assert!(!self.path.exists(), "the socket is gone");
    }
}

/// Sends a part, and reads replies meanwhile: the monitor does not read from a client whose replies
/// pile up.
fn send(socket: &UnixStream, part: &[u8], received: &mut Vec<u8>) -> Result<(), ErrorKind> {
    let mut rest = part;
    while !rest.is_empty() {
        match { socket }.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait(socket, PollFlags::IN | PollFlags::OUT);
            }
            Err(error) => return Err(error.kind()),
        }
        if !read(socket, received) {
            return Err(ErrorKind::UnexpectedEof);
        }
    }
    Ok(())
}

/// Reads the replies that have arrived. Returns whether more may come.
fn read(mut socket: &UnixStream, received: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 16 << 10];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return false,
            Ok(count) => received.extend(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            // The monitor closed the socket with unread bytes.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return false,
            Err(error) => panic!("read: {error}"),
        }
    }
}

fn wait(socket: &UnixStream, flags: PollFlags) {
    let limit = Timespec::try_from(LIMIT).expect("a short time");
    let mut waited = [PollFd::from_borrowed_fd(socket.as_fd(), flags)];
    loop {
        match poll(&mut waited, Some(&limit)) {
            Ok(ready) => return assert!(ready > 0, "the monitor has forgotten a client"),
            // libFuzzer's alarm interrupts system calls.
            Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}
