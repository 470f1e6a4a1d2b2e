//! Whether the threads of the daemon turn.
//!
//! A thread that serves others is idle or busy: it is idle while it sleeps until there is something
//! to do, and while it waits for another thread or for the kernel. A thread that stays busy hangs.
//! To say so costs a thread one store.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::NOT_POISONED;
use crate::limits::WATCHED_THREADS_MAX;

/// Odd while the thread is busy; another odd number for each turn. Alone in its cache line, since
/// only its thread writes to it.
#[repr(align(64))]
struct Pulse(AtomicU64);

static PULSES: [Pulse; WATCHED_THREADS_MAX] =
    [const { Pulse(AtomicU64::new(0)) }; WATCHED_THREADS_MAX];

static THREADS: Mutex<Vec<Thread>> = Mutex::new(Vec::new());

thread_local! {
    /// Of this thread, if it is watched.
    static OWN: Cell<Option<&'static AtomicU64>> = const { Cell::new(None) };
}

/// A thread that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Thread {
    place: usize,
    id: i32,
    name: String,
}

/// What a thread does at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its id, gettid(2).
    pub id: i32,
    /// Its name.
    pub name: String,
    /// The number of its turn, if it is busy.
    pub turn: Option<u64>,
}

/// Has the calling thread watched until this is dropped.
#[derive(Debug)]
pub struct Watched(());

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(own) = OWN.take() {
            threads().retain(|thread| !std::ptr::eq(&raw const PULSES[thread.place].0, own));
        }
    }
}

/// Has the calling thread watched. It is idle. A thread that is beyond
/// [`WATCHED_THREADS_MAX`] is not watched.
#[must_use]
pub fn watch() -> Watched {
    let mut threads = threads();
    let is_taken = |place: &usize| threads.iter().any(|thread| thread.place == *place);
    if let Some(place) = (0..WATCHED_THREADS_MAX).find(|place| !is_taken(place)) {
        let own = &PULSES[place].0;
        own.store(0, Ordering::Relaxed);
        OWN.set(Some(own));
        threads.push(Thread {
            place,
            id: rustix::thread::gettid().as_raw_nonzero().get(),
            name: std::thread::current().name().unwrap_or_default().to_owned(),
        });
    }
    Watched(())
}

/// The calling thread begins a turn.
pub fn busy() {
    if let Some(own) = OWN.get() {
        let before = own.load(Ordering::Relaxed);
        own.store((before + 1) | 1, Ordering::Relaxed);
    }
}

/// The calling thread is about to sleep.
pub fn idle() {
    if let Some(own) = OWN.get() {
        let before = own.load(Ordering::Relaxed);
        own.store((before + 1) & !1, Ordering::Relaxed);
    }
}

/// One turn of the calling thread, which is idle before and after it.
pub fn turn<T>(function: impl FnOnce() -> T) -> T {
    busy();
    let result = function();
    idle();
    result
}

/// The calling thread waits for another one, which is watched itself, or for a file system.
pub fn waiting<T>(function: impl FnOnce() -> T) -> T {
    let was_busy = OWN
        .get()
        .is_some_and(|own| own.load(Ordering::Relaxed) % 2 == 1);
    idle();
    let result = function();
    if was_busy {
        busy();
    }
    result
}

/// What the watched threads do now.
pub fn observe() -> Vec<Observed> {
    let observe = |thread: &Thread| {
        let pulse = PULSES[thread.place].0.load(Ordering::Relaxed);
        Observed {
            id: thread.id,
            name: thread.name.clone(),
            turn: (pulse % 2 == 1).then_some(pulse),
        }
    };
    threads().iter().map(observe).collect()
}

fn threads() -> std::sync::MutexGuard<'static, Vec<Thread>> {
    THREADS.lock().expect(NOT_POISONED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_turn() -> Option<u64> {
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        let observed = observe().into_iter().find(|observed| observed.id == id);
        observed.expect("this thread is watched").turn
    }

    #[test]
    fn a_thread_is_busy_in_its_turns_except_where_it_waits() {
        busy();
        waiting(idle);
        let watched = watch();
        assert_eq!(own_turn(), None);
        let first = turn(own_turn);
        assert!(first.is_some());
        assert_eq!(own_turn(), None);
        let second = turn(|| {
            assert_eq!(waiting(own_turn), None);
            own_turn()
        });
        assert!(second > first, "another turn: {first:?}, {second:?}");
        waiting(|| ());
        assert_eq!(own_turn(), None, "it was idle before");
        busy();
        let third = own_turn();
        busy();
        assert!(own_turn() > third, "a turn that follows at once");
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        drop(watched);
        assert!(observe().iter().all(|observed| observed.id != id));
    }
}
