//! Serves the metrics: HTTP, one request a connection, to whoever scrapes them.
//!
//! Invariants: at most [`METRICS_CONNECTIONS_MAX`] connections are served at a time, each for
//! [`METRICS_LIMIT`] at most and after at most [`METRICS_REQUEST_BYTES_MAX`] of a request, so one
//! who sends slowly, endlessly or nothing keeps others waiting for that long at worst; the disk
//! notices nothing of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::Operator;
use super::metrics::{CONTENT_TYPE, render};
use crate::common::NOT_POISONED;
use crate::limits::{METRICS_CONNECTIONS_MAX, METRICS_LIMIT, METRICS_REQUEST_BYTES_MAX};

/// Headers of a request, more than any client sends.
const HEADERS_MAX: usize = 64;

/// How long nobody is accepted after the system had no means for that.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The threads that serve metrics. Dropping it ends them.
pub struct MetricsServer {
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl MetricsServer {
    /// Serves what `operator` sees at `listener`.
    ///
    /// # Errors
    /// If a thread cannot be made; then none is left running.
    pub fn spawn(listener: TcpListener, operator: &Arc<dyn Operator>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let listener = Arc::new(listener);
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let mut server = Self {
            stop,
            threads: Vec::new(),
        };
        for _ in 0..METRICS_CONNECTIONS_MAX {
            let (listener, operator, stop) = (
                Arc::clone(&listener),
                Arc::clone(operator),
                Arc::clone(&server.stop),
            );
            let thread = std::thread::Builder::new().name("metrics".into());
            let thread = thread.spawn(move || accept_all(&listener, &*operator, &stop))?;
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
        // The counter cannot overflow. Nobody reads it, so every thread sees it.
        let _ = self.stop.write(1);
        for thread in self.threads.drain(..) {
            thread.join().expect(NOT_POISONED);
        }
    }
}

fn accept_all(listener: &TcpListener, operator: &dyn Operator, stop: &EventFd) {
    while let Ok(()) = wait(listener.as_raw_fd(), libc::POLLIN, stop, None) {
        match listener.accept() {
            Ok((stream, peer)) => {
                if let Err(error) = serve(&stream, operator, stop) {
                    debug!(peer:%, error:%; "metrics request failed");
                }
            }
            // Another thread was first, or the client has left.
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

fn serve(mut stream: &TcpStream, operator: &dyn Operator, stop: &EventFd) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let deadline = Some(Instant::now() + METRICS_LIMIT);
    let mut request = Vec::new();
    let answer = loop {
        wait(stream.as_raw_fd(), libc::POLLIN, stop, deadline)?;
        let mut bytes = [0; 1024];
        match stream.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => request.extend_from_slice(&bytes[..count]),
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(error),
        }
        if let Some(answer) = answer(&request, || render(&operator.state())) {
            break answer;
        }
    };
    let mut rest = answer.as_slice();
    while !rest.is_empty() {
        wait(stream.as_raw_fd(), libc::POLLOUT, stop, deadline)?;
        match stream.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    stream.shutdown(Shutdown::Write)
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// What to answer to the bytes of a request; `None` while there are too few of them to tell. Pure,
/// but for `metrics`.
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
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    let sent = if parsed.method == Some("HEAD") {
        ""
    } else {
        &body
    };
    Some([head.as_bytes(), sent.as_bytes()].concat())
}

/// Waits until `fd` is ready. An error when that takes too long, or `stop` is written to.
fn wait(
    fd: RawFd,
    events: libc::c_short,
    stop: &EventFd,
    deadline: Option<Instant>,
) -> io::Result<()> {
    let wanted = |fd, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    loop {
        let timeout_ms = deadline.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut polls = [wanted(fd, events), wanted(stop.as_raw_fd(), libc::POLLIN)];
        // SAFETY: two initialised pollfds, valid for the call.
        let count = unsafe { libc::poll(polls.as_mut_ptr(), 2, timeout_ms) };
        match count {
            ..0 => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            0 => return Err(ErrorKind::TimedOut.into()),
            _ if polls[1].revents != 0 => return Err(ErrorKind::ConnectionAborted.into()),
            _ => return Ok(()),
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
    fn who_asks_for_metrics_gets_them() {
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
    fn what_is_none_of_that_is_refused() {
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
        fn any_bytes_have_an_answer_or_need_more(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(status) = status_of(&bytes) {
                prop_assert!(status.starts_with("HTTP/1.1 4"), "{}", status);
            }
        }
    }
}
