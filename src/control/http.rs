//! Serves the metrics over HTTP, one request for each connection.
//!
//! The code is our own because its bounds are a requirement: no available HTTP server bounds the
//! memory, the time and the number of its connections without threads or a runtime of its own.
//!
//! Invariants: at most [`METRICS_CONNECTIONS_MAX`] connections are served at a time, each for at
//! most [`METRICS_LIMIT`] and for at most [`METRICS_REQUEST_BYTES_MAX`] of a request. A client that
//! sends slowly, endlessly or nothing loses its place to one that waits, and never delays the disk.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Operator;
use super::metrics::{CONTENT_TYPE, render};
use super::wake::Wake;
use crate::common::NOT_POISONED;
use crate::limits::{METRICS_CONNECTIONS_MAX, METRICS_LIMIT, METRICS_REQUEST_BYTES_MAX};
use crate::sandbox::{self, ThreadKind};

/// Headers in a request: more than any client sends.
const HEADERS_MAX: usize = 64;

/// How long a client has its place before it may lose it: much longer than a scrape takes.
const PLACE_KEPT: Duration = Duration::from_millis(100);

/// How often a thread looks whether its client is to lose its place.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long accepting pauses after the system was out of resources for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The threads that serve metrics. Dropping it stops them.
pub struct MetricsServer {
    stop: Arc<Wake>,
    threads: Vec<JoinHandle<()>>,
}

impl MetricsServer {
    /// Serves the state of `operator` at `listener`.
    ///
    /// # Errors
    /// If a thread cannot be created; none is left running.
    pub fn spawn(listener: TcpListener, operator: &Arc<dyn Operator>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let listener = Arc::new(listener);
        let stop = Arc::new(Wake::new()?);
        let places = Arc::new(Places::default());
        let mut server = Self {
            stop,
            threads: Vec::new(),
        };
        for _ in 0..METRICS_CONNECTIONS_MAX {
            let (listener, operator) = (Arc::clone(&listener), Arc::clone(operator));
            let (stop, places) = (Arc::clone(&server.stop), Arc::clone(&places));
            let thread = std::thread::Builder::new().name("metrics".into());
            let thread = thread.spawn(move || {
                sandbox::enter(ThreadKind::Operator);
                accept_all(&listener, &*operator, &stop, &places);
            })?;
            server.threads.push(thread);
        }
        info!(url:% = format_args!("http://{address}/metrics"); "serving metrics");
        if !address.ip().is_loopback() {
            warn!(address:%; "metrics have no authentication, and other hosts can read them");
        }
        Ok(server)
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        // It is never cleared, so every thread sees it.
        self.stop.signal();
        for thread in self.threads.drain(..) {
            thread.join().expect(NOT_POISONED);
        }
    }
}

/// When each client that is served was accepted.
#[derive(Default)]
struct Places(Mutex<Vec<Instant>>);

impl Places {
    fn taken(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.0.lock().expect(NOT_POISONED)
    }
}

/// The place of a client, until it is dropped.
struct Place<'a> {
    places: &'a Places,
    listener: &'a TcpListener,
    taken_at: Instant,
}

impl<'a> Place<'a> {
    fn take(places: &'a Places, listener: &'a TcpListener) -> Self {
        let mut taken = places.taken();
        let mut taken_at = Instant::now();
        // No two are the same.
        while taken.contains(&taken_at) {
            taken_at += Duration::from_nanos(1);
        }
        taken.push(taken_at);
        drop(taken);
        Self {
            places,
            listener,
            taken_at,
        }
    }

    /// Whether its client loses it when another one comes: all are taken, this one for longest.
    fn is_next(&self) -> bool {
        let taken = self.places.taken();
        taken.len() == METRICS_CONNECTIONS_MAX
            && taken.iter().min() == Some(&self.taken_at)
            && self.taken_at.elapsed() >= PLACE_KEPT
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.places
            .taken()
            .retain(|taken_at| *taken_at != self.taken_at);
    }
}

fn accept_all(listener: &TcpListener, operator: &dyn Operator, stop: &Wake, places: &Places) {
    while let Ok(()) = wait(listener.as_fd(), PollFlags::IN, stop, None) {
        match listener.accept() {
            Ok((stream, peer)) => {
                let place = Place::take(places, listener);
                if let Err(error) = serve(&stream, operator, stop, &place) {
                    debug!(peer:%, error:%; "metrics request failed");
                }
            }
            // Another thread has accepted the client, or the client has disconnected.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                warn!(error:%; "cannot accept a metrics client; trying again later");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn serve(
    mut stream: &TcpStream,
    operator: &dyn Operator,
    stop: &Wake,
    place: &Place<'_>,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let deadline = Some((place, Instant::now() + METRICS_LIMIT));
    let mut request = Vec::new();
    let answer = loop {
        wait(stream.as_fd(), PollFlags::IN, stop, deadline)?;
        let mut bytes = [0; 1024];
        match stream.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => request.extend_from_slice(&bytes[..count]),
            Err(error) if is_temporary(&error) => continue,
            Err(error) => return Err(error),
        }
        if let Some(answer) = answer(&request, || render(&operator.state())) {
            break answer;
        }
    };
    let mut rest = answer.as_slice();
    while !rest.is_empty() {
        wait(stream.as_fd(), PollFlags::OUT, stop, deadline)?;
        match stream.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(error),
        }
    }
    stream.shutdown(Shutdown::Write)
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// The answer to the bytes of a request; `None` while the request is incomplete. Pure, but for
/// `metrics`.
pub fn answer(request: &[u8], metrics: impl FnOnce() -> String) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let plain = "text/plain; charset=utf-8";
    let (status, content_type, body) = match parsed.parse(request) {
        Ok(httparse::Status::Partial) if request.len() <= METRICS_REQUEST_BYTES_MAX => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => (
            "431 Request Header Fields Too Large",
            plain,
            String::from("too long\n"),
        ),
        Err(error) => ("400 Bad Request", plain, format!("{error}\n")),
        Ok(httparse::Status::Complete(_)) => {
            let path = parsed.path.unwrap_or_default();
            match (parsed.method, path.split('?').next()) {
                (Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", CONTENT_TYPE, metrics()),
                (Some("GET" | "HEAD"), _) => {
                    ("404 Not Found", plain, String::from("see /metrics\n"))
                }
                _ => ("405 Method Not Allowed", plain, String::from("GET only\n")),
            }
        }
    };
    let allow = if status.starts_with("405") {
        "Allow: GET, HEAD\r\n"
    } else {
        ""
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
         {allow}Connection: close\r\n\r\n",
        body.len()
    );
    let sent = if parsed.method == Some("HEAD") {
        ""
    } else {
        &body
    };
    Some([head.as_bytes(), sent.as_bytes()].concat())
}

/// Waits until `fd` is ready.
///
/// # Errors
/// If `fd` is not ready by the deadline of the client, its place is needed for another one, or
/// `stop` is signalled.
fn wait(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    stop: &Wake,
    client: Option<(&Place<'_>, Instant)>,
) -> io::Result<()> {
    loop {
        let mut polls = vec![
            PollFd::from_borrowed_fd(fd, events),
            PollFd::new(stop, PollFlags::IN),
        ];
        let mut left = None;
        if let Some((place, deadline)) = client {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            let rest = Timespec::try_from(rest.min(LOOK_AGAIN));
            left = Some(rest.expect("a short time"));
            if place.is_next() {
                polls.push(PollFd::new(place.listener, PollFlags::IN));
            }
        }
        match poll(&mut polls, left.as_ref()) {
            Err(rustix::io::Errno::INTR) | Ok(0) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if !polls[1].revents().is_empty() => {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            Ok(_) if !polls[0].revents().is_empty() => return Ok(()),
            Ok(_) => return Err(io::Error::other("another client needs its place")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn status_of(request: &[u8]) -> Option<String> {
        let answer = answer(request, || "m 1\n".into())?;
        let text = String::from_utf8(answer).unwrap();
        Some(text.split("\r\n").next().unwrap().to_owned())
    }

    #[test]
    fn a_request_for_metrics_is_answered() {
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        assert_eq!(status_of(&request[..request.len() - 1]), None, "not yet");
        let text = String::from_utf8(answer(request, || "m 1\n".into()).unwrap()).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"));
        assert!(
            text.contains("\r\nContent-Length: 4\r\n") && text.ends_with("\r\n\r\nm 1\n"),
            "{text}"
        );
        let head = answer(b"HEAD /metrics?x=y HTTP/1.0\r\n\r\n", || "m 1\n".into()).unwrap();
        assert!(head.ends_with(b"close\r\n\r\n"));
    }

    #[test]
    fn other_requests_get_an_error_status() {
        for (request, status) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "HTTP/1.1 404 Not Found"),
            (
                b"POST /metrics HTTP/1.1\r\n\r\n",
                "HTTP/1.1 405 Method Not Allowed",
            ),
            (b"\x16\x03\x01\x02", "HTTP/1.1 400 Bad Request"),
            (b"GET /metrics HTTP/9\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        ] {
            assert_eq!(status_of(request).as_deref(), Some(status));
        }
        let long = [
            b"GET /metrics HTTP/1.1\r\nA: ",
            b"x".repeat(METRICS_REQUEST_BYTES_MAX).as_slice(),
        ]
        .concat();
        let many = [
            b"GET /metrics HTTP/1.1\r\n".as_slice(),
            &b"A: b\r\n".repeat(HEADERS_MAX + 1),
            b"\r\n",
        ]
        .concat();
        for request in [long, many] {
            let status = status_of(&request).unwrap();
            assert_eq!(status, "HTTP/1.1 431 Request Header Fields Too Large");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_answer_or_need_more(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Some(status) = status_of(&bytes) {
                prop_assert!(status.starts_with("HTTP/1.1 4"), "{}", status);
            }
        }
    }
}
