//! Ends the process if one of its threads hangs, so that it is started anew.
//!
//! A daemon that has lost a thread serves only some requests, or cannot be asked. It aborts, as
//! after a panic: the next daemon repeats the requests in flight.
//!
//! Invariant: it does not fire because a replica, a file system or the machine is slow. A thread
//! that waits for the kernel or for another thread is idle; time counts in ticks of this thread,
//! so that a pause of the whole process is a tick at most; and no tick counts in which the hanging
//! thread waited for a page or for a CPU.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use sd_notify::NotifyState;

use super::logging::{print_last, push_field};
use super::service_manager::notify;
use crate::common::pulse::{Observed, observe};
use crate::limits::WATCHDOG_TICK;
use crate::sandbox::{self, ThreadKind};

/// CPU time of a tick below which a thread that could run did not: 1/100 s, as the kernel counts.
const RAN_AT_LEAST: u64 = 1;

/// Watches until it is dropped.
pub(super) struct Watchdog {
    _stop: Sender<()>,
}

impl Watchdog {
    /// Watches the threads from now on. One that does not turn for `limit` ends the process. The
    /// service manager is notified at the interval that it asks for.
    ///
    /// # Errors
    /// If the thread cannot be created.
    pub(super) fn start(limit: Duration) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let asked = sd_notify::watchdog_enabled();
        let tick = asked.map_or(WATCHDOG_TICK, |asked| WATCHDOG_TICK.min(asked / 3));
        let ticks = limit.as_nanos().div_ceil(tick.as_nanos().max(1));
        let limit_ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
        let thread = std::thread::Builder::new().name("watchdog".into());
        thread.spawn(move || {
            sandbox::enter(ThreadKind::Watchdog);
            let mut hanging = Hanging::new(limit_ticks);
            while stopped.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                if let Some(name) = hanging.tick(&observe(), state_of) {
                    end(&name, limit);
                }
                if asked.is_some() {
                    notify(&[NotifyState::Watchdog]);
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

fn end(name: &str, limit: Duration) -> ! {
    let mut fields = String::new();
    push_field(&mut fields, "thread", name);
    push_field(&mut fields, "seconds", &limit.as_secs().to_string());
    print_last("a thread hangs: the process aborts", &fields);
    let status = format!("thread {name} hangs");
    notify(&[NotifyState::Status(&status), NotifyState::WatchdogTrigger]);
    std::process::abort();
}

/// The threads that have not turned since the last tick.
struct Hanging {
    limit_ticks: u64,
    /// By thread id.
    threads: HashMap<i32, Turn>,
}

struct Turn {
    number: u64,
    cpu_time: u64,
    /// In which it could have ended.
    ticks: u64,
}

/// What the kernel says about a thread.
#[derive(Clone, Copy)]
struct ThreadState {
    /// The letter of proc_pid_stat(5).
    letter: char,
    /// In clock ticks.
    cpu_time: u64,
}

impl Hanging {
    fn new(limit_ticks: u64) -> Self {
        Self {
            limit_ticks,
            threads: HashMap::new(),
        }
    }

    /// Looks at the threads once more. Returns the name of one that hangs.
    fn tick(
        &mut self,
        observed: &[Observed],
        state_of: impl Fn(i32) -> Option<ThreadState>,
    ) -> Option<String> {
        let mut before = std::mem::take(&mut self.threads);
        for thread in observed {
            let Some(number) = thread.turn else { continue };
            let same = before.remove(&thread.id);
            let turn = match same.filter(|turn| turn.number == number) {
                None => Turn {
                    number,
                    cpu_time: 0,
                    ticks: 0,
                },
                Some(mut turn) => {
                    // Where it cannot be asked, the tick counts.
                    let could_end = state_of(thread.id).is_none_or(|state| {
                        let ran = state.cpu_time.saturating_sub(turn.cpu_time);
                        turn.cpu_time = state.cpu_time;
                        match state.letter {
                            'D' => false,
                            'R' => ran >= RAN_AT_LEAST,
                            _ => true,
                        }
                    });
                    turn.ticks += u64::from(could_end);
                    turn
                }
            };
            if turn.ticks >= self.limit_ticks {
                return Some(thread.name.clone());
            }
            self.threads.insert(thread.id, turn);
        }
        None
    }
}

fn state_of(id: i32) -> Option<ThreadState> {
    parse(&fs::read_to_string(format!("/proc/self/task/{id}/stat")).ok()?)
}

/// The state in a line of proc_pid_stat(5). The name in it may hold anything.
fn parse(line: &str) -> Option<ThreadState> {
    let mut fields = line.rsplit_once(')')?.1.split_whitespace();
    let letter = fields.next()?.chars().next()?;
    // utime and stime are the 14th and the 15th field of the line.
    let times = [fields.nth(10)?, fields.next()?];
    let [user, system] = times.map(|time| time.parse::<u64>().ok());
    Some(ThreadState {
        letter,
        cpu_time: user? + system?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 60;

    fn observed(id: i32, turn: Option<u64>) -> Observed {
        Observed {
            id,
            name: format!("worker-{id}"),
            turn,
        }
    }

    /// In how many ticks a thread that does not end its turn is found to hang. In each tick it is
    /// in the state of this letter, and runs for so long.
    fn found_after(letter: char, runs: u64) -> Option<u64> {
        let mut hanging = Hanging::new(LIMIT);
        (1..10 * LIMIT).find(|tick| {
            let state = |_| {
                Some(ThreadState {
                    letter,
                    cpu_time: tick * runs,
                })
            };
            hanging.tick(&[observed(0, Some(1))], state).is_some()
        })
    }

    #[test]
    fn a_thread_that_does_not_turn_is_found_after_the_limit() {
        assert_eq!(found_after('S', 0), Some(LIMIT + 1), "a deadlock");
        assert_eq!(found_after('R', 100), Some(LIMIT + 1), "an endless loop");
        assert_eq!(found_after('t', 0), Some(LIMIT + 1), "it is traced");
    }

    #[test]
    fn a_thread_that_waits_for_the_machine_does_not_hang() {
        assert_eq!(found_after('D', 0), None, "a page is read");
        assert_eq!(found_after('R', 0), None, "there is no CPU for it");
    }

    #[test]
    fn a_thread_that_turns_or_sleeps_does_not_hang() {
        let mut hanging = Hanging::new(LIMIT);
        for tick in 0..10 * LIMIT {
            let threads = [
                observed(0, Some(2 * tick + 1)),
                observed(1, None),
                // It is idle now and then, and each turn takes nearly as long as it may.
                observed(2, (tick % LIMIT != 0).then_some(2 * (tick / LIMIT) + 1)),
            ];
            assert_eq!(hanging.tick(&threads, |_| None), None, "{tick}");
        }
    }

    #[test]
    fn the_state_of_a_thread_is_read_whatever_its_name_is() {
        let line = "7 (a) R 1) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 9 8 7";
        let state = parse(line).unwrap();
        assert_eq!((state.letter, state.cpu_time), ('S', 300));
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(state_of(id).unwrap().letter, 'R', "this thread");
    }
}
