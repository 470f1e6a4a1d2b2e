//! Closes what may take long to close.
//!
//! A socket with SO_LINGER waits until its peer has acknowledged, a file of FUSE for its server,
//! and a socket releases what lies in it unread, which may be either. So these are closed by
//! threads of their own. Those that hang are few; what comes then stays open.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use log::{debug, warn};

use crate::limits::{CLOSE_LIMIT, CLOSING_THREADS_MAX};

/// What is called, and then what the caller waits for.
type Call = (Box<dyn FnOnce() + Send>, SyncSender<()>);

/// Threads that have nothing to do, and how many there are in all.
struct Threads {
    idle: Vec<Sender<Call>>,
    count: usize,
}

static THREADS: Mutex<Threads> = Mutex::new(Threads {
    idle: Vec::new(),
    count: 0,
});

/// What asks the thread that starts the others for one, and where it puts it.
type Asked = SyncSender<Option<Sender<Call>>>;

/// Asks the thread that starts the others.
static STARTER: OnceLock<Sender<Asked>> = OnceLock::new();

/// From now on, the threads have the rights of one that has called `prepare`, and not those of the
/// thread that calls [`close`] first.
///
/// # Errors
/// If the thread cannot be created.
pub fn start_with(prepare: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (starter, asked) = channel::<Asked>();
    let thread = thread::Builder::new().name("frontend-close".into());
    thread.spawn(move || {
        prepare();
        for answer in asked {
            let _ = answer.send(start_here());
        }
    })?;
    let _ = STARTER.set(starter);
    Ok(())
}

/// Drops `closed`. Returns when that is done, or has not ended within [`CLOSE_LIMIT`].
pub fn close<T: Send + 'static>(closed: T) {
    call(move || drop(closed));
}

/// Calls `function` on a thread that may hang. Returns when that is done, or has not ended within
/// [`CLOSE_LIMIT`]; where too many threads hang, it is not called, and what it has stays open.
pub(super) fn call(function: impl FnOnce() + Send + 'static) {
    let (done, is_done) = sync_channel::<()>(1);
    let call: Call = (Box::new(function), done);
    let thread = {
        let mut threads = THREADS.lock().expect("no thread panics with it");
        match threads.idle.pop() {
            Some(thread) => Some(thread),
            None if threads.count < CLOSING_THREADS_MAX => {
                let started = start();
                threads.count += usize::from(started.is_some());
                started
            }
            None => None,
        }
    };
    let sent = match thread {
        Some(thread) => thread.send(call).map_err(|unsent| unsent.0),
        None => Err(call),
    };
    if let Err((unsent, _)) = sent {
        warn!("what a frontend has passed is not closed: {CLOSING_THREADS_MAX} threads hang");
        std::mem::forget(unsent);
        return;
    }
    // Ends when the sender is dropped.
    if is_done.recv_timeout(CLOSE_LIMIT) == Err(RecvTimeoutError::Timeout) {
        warn!("what a frontend has passed takes long to close");
    }
}

fn start() -> Option<Sender<Call>> {
    let Some(starter) = STARTER.get() else {
        return start_here();
    };
    let (answer, started) = sync_channel(1);
    starter.send(answer).ok()?;
    started.recv().ok().flatten()
}

fn start_here() -> Option<Sender<Call>> {
    let (sender, receiver) = channel();
    let again = sender.clone();
    let thread = thread::Builder::new().name("frontend-close".into());
    match thread.spawn(move || run(&receiver, &again)) {
        Ok(_) => Some(sender),
        Err(error) => {
            debug!(error:%; "no thread to close with");
            None
        }
    }
}

fn run(receiver: &Receiver<Call>, sender: &Sender<Call>) {
    while let Ok((function, done)) = receiver.recv() {
        function();
        let mut threads = THREADS.lock().expect("no thread panics with it");
        threads.idle.push(sender.clone());
        drop(threads);
        drop(done);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::TryRecvError;
    use std::time::Instant;

    use super::*;

    /// Takes until the other end is dropped.
    struct Slow(Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn what_hangs_is_waited_for_a_limited_time_and_holds_nothing_up() {
        let (release, hangs) = channel::<()>();
        let begun = Instant::now();
        close(Slow(hangs));
        assert!(begun.elapsed() >= CLOSE_LIMIT);
        for _ in 0..100 {
            let (closed, is_closed) = sync_channel::<()>(0);
            close(closed);
            assert_eq!(is_closed.try_recv(), Err(TryRecvError::Disconnected));
        }
        drop(release);
    }
}
