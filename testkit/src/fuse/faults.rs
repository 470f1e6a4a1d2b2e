//! What an operation on a faulty image suffers.
//!
//! Faults are injected for a kind of operation and can be cleared. Bytes that are unreadable belong
//! to the image, as those of a disk do: only a write makes them readable.

use std::ops::Range;
use std::time::{Duration, Instant};

use fuser::Errno;

/// An operation on the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read.
    Read,
    /// Write.
    Write,
    /// fsync or fdatasync.
    Sync,
    /// ftruncate.
    Resize,
    /// open.
    Open,
    /// stat.
    Attributes,
    /// lseek for data or for a hole.
    FindData,
}

/// How many kinds of [`Operation`] there are.
pub(super) const OPERATIONS: usize = 7;

/// A fault of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It takes a time between these two, and others overtake it.
    Delay(Duration, Duration),
    /// It hangs until the faults are cleared.
    Hang,
    /// It fails with this errno.
    Fail(i32),
    /// The next one fails with this errno, and none after it.
    FailOnce(i32),
    /// It fails with this errno if it touches a byte from the first of these on and before the
    /// second.
    FailIn(i32, u64, u64),
    /// Its bytes are changed by xor with this.
    Corrupt(u8),
    /// At most this many complete in a second.
    PerSecond(u32),
    /// At most this many bytes are transferred in a second.
    BytesPerSecond(u64),
    /// At most this many bytes are transferred by one: the rest is left to the next.
    Short(usize),
    /// A read returns nothing from this byte on, as if the file ended there.
    EndAt(u64),
    /// There is space before this byte only: a write that begins there or behind it fails (ENOSPC),
    /// and of another one what lies before it is written.
    FullFrom(u64),
}

/// What the faults do to an operation that does not fail.
#[derive(Clone, Copy)]
pub(super) struct Effect {
    /// Bytes are changed by xor with this.
    pub(super) mask: u8,
    /// At most this many are transferred.
    pub(super) bytes_max: usize,
    /// None from this offset on.
    pub(super) end: u64,
}

/// When an operation is done.
pub(super) enum Time {
    AtOnce,
    At(Instant),
    Never,
}

/// All faults of an image.
pub(super) struct Faults {
    injected: [Vec<Fault>; OPERATIONS],
    /// [`Fault::PerSecond`] and [`Fault::BytesPerSecond`]: when the next one may be done.
    next_free: [Instant; OPERATIONS],
    /// Byte ranges that cannot be read until they are written, in no order.
    unreadable: Vec<Range<u64>>,
    /// Of random numbers so far.
    count: u64,
}

impl Faults {
    pub(super) fn none() -> Self {
        Self {
            injected: Default::default(),
            next_free: [Instant::now(); OPERATIONS],
            unreadable: Vec::new(),
            count: 0,
        }
    }

    /// From now on `operation` has these and no others.
    pub(super) fn inject(&mut self, operation: Operation, faults: &[Fault]) {
        self.injected[operation as usize] = faults.to_vec();
    }

    /// Clears what was injected.
    pub(super) fn clear(&mut self) {
        self.injected = Default::default();
    }

    /// What the faults do to an operation on these bytes that comes now, and when it is done.
    pub(super) fn of(
        &mut self,
        operation: Operation,
        bytes: &Range<u64>,
        now: Instant,
    ) -> (Result<Effect, Errno>, Time) {
        let mut effect = Effect {
            mask: 0,
            bytes_max: usize::MAX,
            end: u64::MAX,
        };
        let mut errno = None;
        let mut due = None;
        let mut hangs = false;
        for fault in self.injected[operation as usize].clone() {
            let after = match fault {
                Fault::Delay(min, max) => now + min + (max - min).mul_f64(self.fraction()),
                Fault::PerSecond(count) => {
                    self.take_turn(operation, now, Duration::from_secs(1) / count)
                }
                Fault::BytesPerSecond(rate) => {
                    let seconds = (bytes.end - bytes.start) as f64 / rate as f64;
                    let turn = Duration::from_secs_f64(seconds);
                    self.take_turn(operation, now, turn) + turn
                }
                Fault::Hang => {
                    hangs = true;
                    continue;
                }
                Fault::Fail(number) => {
                    errno.get_or_insert(number);
                    continue;
                }
                Fault::FailOnce(number) => {
                    errno.get_or_insert(number);
                    self.injected[operation as usize].retain(|other| *other != fault);
                    continue;
                }
                Fault::FailIn(number, from, to) => {
                    if bytes.start < to && from < bytes.end {
                        errno.get_or_insert(number);
                    }
                    continue;
                }
                Fault::Corrupt(mask) => {
                    effect.mask ^= mask;
                    continue;
                }
                Fault::Short(count) => {
                    effect.bytes_max = effect.bytes_max.min(count);
                    continue;
                }
                Fault::FullFrom(end) if bytes.start >= end => {
                    errno.get_or_insert(libc::ENOSPC);
                    continue;
                }
                Fault::FullFrom(end) => {
                    let space = usize::try_from(end - bytes.start).unwrap_or(usize::MAX);
                    effect.bytes_max = effect.bytes_max.min(space);
                    continue;
                }
                Fault::EndAt(end) => {
                    effect.end = effect.end.min(end);
                    continue;
                }
            };
            due = due.max(Some(after));
        }
        let time = match due {
            _ if hangs => Time::Never,
            Some(due) => Time::At(due),
            None => Time::AtOnce,
        };
        let result = match errno {
            Some(number) => Err(Errno::from_i32(number)),
            None => Ok(effect),
        };
        (result, time)
    }

    /// When this operation may be done, so that each takes `turn` and they go one after another.
    fn take_turn(&mut self, operation: Operation, now: Instant, turn: Duration) -> Instant {
        let due = self.next_free[operation as usize].max(now);
        self.next_free[operation as usize] = due + turn;
        due
    }

    pub(super) fn is_unreadable(&self, bytes: &Range<u64>) -> bool {
        let mut runs = self.unreadable.iter();
        runs.any(|run| run.start < bytes.end && bytes.start < run.end)
    }

    pub(super) fn make_readable(&mut self, bytes: &Range<u64>) {
        let rest = |run: Range<u64>| {
            let before = run.start..run.end.min(bytes.start);
            let after = run.start.max(bytes.end)..run.end;
            [before, after].into_iter().filter(|run| !run.is_empty())
        };
        let unreadable = std::mem::take(&mut self.unreadable);
        self.unreadable = unreadable.into_iter().flat_map(rest).collect();
    }

    pub(super) fn make_unreadable(&mut self, bytes: Range<u64>) {
        self.make_readable(&bytes);
        self.unreadable.push(bytes);
    }

    pub(super) fn unreadable_bytes(&self) -> u64 {
        self.unreadable.iter().map(|run| run.end - run.start).sum()
    }

    /// Something between 0 and 1 that looks random.
    fn fraction(&mut self) -> f64 {
        self.count += 1;
        let mixed = self.count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        f64::from(u16::try_from(mixed).expect("16 bits are left")) / 65536.0
    }
}
