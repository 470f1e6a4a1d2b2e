//! When a replica is late with an operation, so that it may be evicted (W6).
//!
//! A replica R is late with its operation of a request if all of this holds:
//!
//! 1. It has had the operation for longer than the limit of the kind: the replica timeout for a
//!    read or a write, [`LONG_LIMIT`] times as long for a flush or a zeroing.
//! 2. It has had it for more than twice as long as any other replica has recently needed for such
//!    an operation: slow together is not late. From [`MOST`] times the limit on this does not help.
//! 3. The request can be decided without R: enough others have done it and the rest have replied
//!    or are late too, or too few can still do it.
//!
//! Time counts from the last moment at which R ended a long operation (a flush, a zeroing) or one
//! of a job, and as long as a long one is in flight on R, others have its limit: what else was
//! asked of a replica does not make it late. [`PATIENCE_MOST`] bounds even that.
//!
//! An operation of a job makes a replica late only if the replica has ended nothing at all for
//! [`LONG_LIMIT`] times the replica timeout, and while it has a long operation in flight, for as
//! long as 2. allows a flush.
//!
//! Whether a late replica is needed is another question (`Health::is_needed`).
//!
//! Pure: counts and times are passed in. The clocks of workers differ, so engines share counters
//! ([`Loads`]), and each looks at its own clock when it sees that one has changed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{
    LATE_LONG_LIMIT as LONG_LIMIT, LATE_MOST as MOST, LATE_PATIENCE_MOST as PATIENCE_MOST,
    REPLICAS_MAX,
};

/// What the operations of a request are, as far as their time matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Zero,
    Flush,
    /// Anything that no guest waits for.
    Job,
}

/// Kinds whose duration is remembered.
const KINDS: usize = 4;

/// The operations of a request that it waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) kind: Kind,
    pub(super) asked_at: Duration,
    /// The replicas that were asked later, and when.
    pub(super) later: (ReplicaSet, Duration),
    /// The replicas that have not replied.
    pub(super) waiting: ReplicaSet,
    /// Others that have done it, or that are asked as soon as the late ones are evicted.
    pub(super) done: ReplicaSet,
    /// How many must do it.
    pub(super) needed: usize,
    /// The request waits for every reply, not only until enough have done it.
    pub(super) waits_for_all: bool,
}

/// When the first of the replicas `waiting` was asked. `later`: those that were not asked at
/// `asked_at` but at another time, and that.
pub(super) fn first_asked(
    waiting: ReplicaSet,
    asked_at: Duration,
    (later, later_at): (ReplicaSet, Duration),
) -> Option<Duration> {
    if !waiting.without(later).is_empty() {
        Some(asked_at)
    } else {
        (!waiting.is_empty()).then_some(later_at)
    }
}

impl Out {
    /// When the first of the replicas that have not replied was asked.
    fn oldest(&self) -> Option<Duration> {
        first_asked(self.waiting, self.asked_at, self.later)
    }

    fn asked_at(&self, replica: ReplicaIndex) -> Duration {
        if self.later.0.contains(replica) {
            self.later.1
        } else {
            self.asked_at
        }
    }

    /// Whether the request is decided without replies of `late`.
    fn is_decided_without(&self, late: ReplicaSet) -> bool {
        let succeeds = self.done.len() >= self.needed;
        let fails = self.done.len() + self.waiting.len() < self.needed;
        let rest = self.waiting.without(late);
        (succeeds || fails) && (rest.is_empty() || !self.waits_for_all)
    }
}

/// What all engines have in flight on each replica. Counters only, which wrap.
#[derive(Debug, Default)]
pub(super) struct Loads([Load; REPLICAS_MAX]);

#[derive(Debug, Default)]
struct Load {
    /// Flushes and zeroings in flight.
    long: AtomicU32,
    /// Ends of these, and of operations of jobs.
    yielded: AtomicU32,
    /// Changes when anything has ended, some ticks later.
    progress: AtomicU32,
}

impl Loads {
    fn of(&self, replica: ReplicaIndex) -> &Load {
        &self.0[replica.as_usize()]
    }

    /// A flush or a zeroing is submitted.
    pub(super) fn long_begins(&self, replica: ReplicaIndex) {
        self.of(replica).long.fetch_add(1, Ordering::Relaxed);
    }

    /// A flush or a zeroing has ended.
    pub(super) fn long_ended(&self, replica: ReplicaIndex) {
        let before = self.of(replica).long.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "what ends was in flight");
        self.yielded(replica);
    }

    /// An operation has ended for which others may have waited.
    pub(super) fn yielded(&self, replica: ReplicaIndex) {
        self.of(replica).yielded.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a flush or a zeroing is in flight.
    pub(super) fn has_long(&self, replica: ReplicaIndex) -> bool {
        self.of(replica).long.load(Ordering::Relaxed) > 0
    }
}

/// What one engine knows of the speed of replicas.
#[derive(Debug)]
pub(super) struct Lateness {
    timeout: Duration,
    half_timeout: Duration,
    longest: [[Longest; REPLICAS_MAX]; KINDS],
    seen: [Seen; REPLICAS_MAX],
    /// When other workers were last asked to look.
    asked_at: Duration,
    /// No replica has an operation for longer than its limit before this.
    due: Duration,
    /// What jobs know: the guest waits for a replica longer than it should.
    pub(super) guest_waits: bool,
}

/// The longest time that an operation has taken in a window of time, and in the one before.
#[derive(Clone, Copy, Debug, Default)]
struct Longest {
    began: Duration,
    this: Duration,
    before: Duration,
}

/// What an engine saw at its last look.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    yielded: u32,
    yielded_at: Duration,
    progress: u32,
    progress_at: Duration,
    /// Of this engine's own operations.
    ended: u32,
}

impl Lateness {
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            half_timeout: timeout / 2,
            longest: [[Longest::default(); REPLICAS_MAX]; KINDS],
            seen: [Seen::default(); REPLICAS_MAX],
            asked_at: Duration::ZERO,
            due: Duration::ZERO,
            guest_waits: false,
        }
    }

    /// An operation of `replica` has taken `taken`.
    #[inline]
    pub(super) fn observe(
        &mut self,
        kind: Kind,
        replica: ReplicaIndex,
        taken: Duration,
        now: Duration,
    ) {
        // What is shorter changes no limit.
        if taken > self.half_timeout {
            self.remember(kind, replica, taken, now);
        }
    }

    #[cold]
    #[inline(never)]
    fn remember(&mut self, kind: Kind, replica: ReplicaIndex, taken: Duration, now: Duration) {
        let window = self.window();
        if let Some(longest) = self.longest.get_mut(kind as usize) {
            longest[replica.as_usize()].insert(taken, now, window);
        }
    }

    /// To be called at each tick, before [`Self::late`]. `ended` counts the operations of this
    /// engine that have ended on a replica.
    pub(super) fn look(
        &mut self,
        replicas: ReplicaSet,
        loads: &Loads,
        ended: impl Fn(ReplicaIndex) -> u32,
        now: Duration,
    ) {
        for replica in replicas.iter() {
            let (seen, load) = (&mut self.seen[replica.as_usize()], loads.of(replica));
            let ended = ended(replica);
            if ended != seen.ended {
                seen.ended = ended;
                load.progress.fetch_add(1, Ordering::Relaxed);
            }
            let yielded = load.yielded.load(Ordering::Relaxed);
            if yielded != seen.yielded {
                (seen.yielded, seen.yielded_at) = (yielded, now);
            }
            let progress = load.progress.load(Ordering::Relaxed);
            if progress != seen.progress {
                (seen.progress, seen.progress_at) = (progress, now);
            }
        }
    }

    /// Whether some replica may have an operation for longer than its limit, so that it is time to
    /// look at all requests. As long as replicas answer, that is not at every tick.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        now >= self.due
    }

    /// A look at all requests begins.
    pub(super) fn look_begins(&mut self, now: Duration) {
        // What is asked from now on has no shorter limit.
        self.due = now + self.timeout;
    }

    /// Whether a replica has had what is `out` for longer than the limit of its kind. If not, none
    /// is late and none keeps the guest waiting; the next look is due when that may have changed.
    pub(super) fn exceeds_limit(&mut self, out: &Out, now: Duration) -> bool {
        let Some(oldest) = out.oldest() else {
            return false;
        };
        let exceeded_at = oldest + self.limit(out.kind);
        self.due = self.due.min(exceeded_at);
        now >= exceeded_at
    }

    /// The replicas that are late with what is `out`. `peers` are in service.
    pub(super) fn late(
        &self,
        out: &Out,
        peers: ReplicaSet,
        loads: &Loads,
        now: Duration,
    ) -> ReplicaSet {
        let overdue = |replica: &ReplicaIndex| self.is_overdue(out, *replica, peers, loads, now);
        let late: ReplicaSet = out.waiting.iter().filter(overdue).collect();
        if !late.is_empty() && out.is_decided_without(late) {
            late
        } else {
            ReplicaSet::EMPTY
        }
    }

    fn is_overdue(
        &self,
        out: &Out,
        replica: ReplicaIndex,
        peers: ReplicaSet,
        loads: &Loads,
        now: Duration,
    ) -> bool {
        let asked_at = out.asked_at(replica);
        let held = now.saturating_sub(asked_at);
        if held < self.limit(out.kind) {
            return false;
        }
        if held >= self.timeout * PATIENCE_MOST {
            return true;
        }
        let seen = &self.seen[replica.as_usize()];
        let patience = self.patience(out.kind, replica, peers, loads, now);
        if out.kind == Kind::Job {
            // What other workers know has arrived meanwhile.
            let silent = now.saturating_sub(seen.progress_at);
            return silent >= patience + self.timeout;
        }
        let counted = now.saturating_sub(asked_at.max(seen.yielded_at));
        counted >= patience
    }

    /// How long a replica may have an operation of this kind, given what it has in flight and what
    /// its peers have recently needed.
    fn patience(
        &self,
        asked: Kind,
        replica: ReplicaIndex,
        peers: ReplicaSet,
        loads: &Loads,
        now: Duration,
    ) -> Duration {
        let kind = if loads.has_long(replica) {
            Kind::Flush
        } else {
            asked
        };
        let limit = self.limit(kind);
        let peers = peers.iter().filter(|peer| *peer != replica);
        let recent = |peer: ReplicaIndex, kind: Kind| {
            let longest = self.longest.get(kind as usize);
            longest.map(|longest| longest[peer.as_usize()].recent(now, self.window()))
        };
        let longest = peers.map(|peer| recent(peer, kind).max(recent(peer, asked)));
        let twice = longest.max().flatten().unwrap_or_default() * 2;
        twice.clamp(limit, limit * MOST)
    }

    /// Whether a request of the guest waits for a replica longer than the limit of its kind,
    /// whatever the reason.
    pub(super) fn keeps_guest_waiting(&self, out: &Out, now: Duration) -> bool {
        let held = |replica| now.saturating_sub(out.asked_at(replica));
        let mut waiting = out.waiting.iter();
        out.kind != Kind::Job && waiting.any(|replica| held(replica) >= self.limit(out.kind))
    }

    /// Whether other workers are to look too, as only they know if a replica answers at all.
    pub(super) fn wants_news(&mut self, out: &Out, now: Duration) -> bool {
        if out.kind != Kind::Job || now.saturating_sub(self.asked_at) < self.timeout / 4 {
            return false;
        }
        let silent = |replica: ReplicaIndex| {
            let since = self.seen[replica.as_usize()].progress_at;
            now.saturating_sub(since.max(out.asked_at(replica))) >= self.limit(Kind::Job)
        };
        let wants_news = out.waiting.iter().any(silent);
        if wants_news {
            self.asked_at = now;
        }
        wants_news
    }

    /// How long a replica may have an operation in any case.
    fn limit(&self, kind: Kind) -> Duration {
        match kind {
            Kind::Read | Kind::Write => self.timeout,
            Kind::Zero | Kind::Flush | Kind::Job => self.timeout * LONG_LIMIT,
        }
    }

    /// What a replica has needed counts for one to two of these: a minute by default.
    fn window(&self) -> Duration {
        self.timeout * 30
    }
}

impl Longest {
    fn insert(&mut self, taken: Duration, now: Duration, window: Duration) {
        let passed = now.saturating_sub(self.began);
        if passed >= window {
            let before = if passed < window * 2 {
                self.this
            } else {
                Duration::ZERO
            };
            *self = Self {
                began: now,
                this: Duration::ZERO,
                before,
            };
        }
        self.this = self.this.max(taken);
    }

    fn recent(self, now: Duration, window: Duration) -> Duration {
        let passed = now.saturating_sub(self.began);
        if passed >= window * 2 {
            Duration::ZERO
        } else if passed >= window {
            self.this
        } else {
            self.this.max(self.before)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ReplicaIndex = ReplicaIndex(0);
    const B: ReplicaIndex = ReplicaIndex(1);
    const C: ReplicaIndex = ReplicaIndex(2);

    fn set(replicas: &[ReplicaIndex]) -> ReplicaSet {
        replicas.iter().copied().collect()
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A write to three replicas at 100 s that two must do.
    fn out(kind: Kind, done: &[ReplicaIndex]) -> Out {
        let done = set(done);
        Out {
            kind,
            asked_at: seconds(100),
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: ReplicaSet::first(3).without(done),
            done,
            needed: 2,
            waits_for_all: true,
        }
    }

    struct Disk {
        lateness: Lateness,
        loads: Loads,
    }

    impl Disk {
        fn new() -> Self {
            Self {
                lateness: Lateness::new(seconds(1)),
                loads: Loads::default(),
            }
        }

        /// Those that are late so many seconds after the request began.
        fn late(&mut self, out: &Out, after: u64) -> ReplicaSet {
            let (all, now) = (ReplicaSet::first(3), seconds(100 + after));
            self.lateness.look(all, &self.loads, |_| 0, now);
            self.lateness.late(out, all, &self.loads, now)
        }
    }

    #[test]
    fn each_kind_has_its_limit() {
        let mut disk = Disk::new();
        let (write, flush) = (out(Kind::Write, &[A, B]), out(Kind::Flush, &[A, B]));
        assert_eq!(disk.late(&write, 0), ReplicaSet::EMPTY);
        assert_eq!(disk.late(&write, 1), set(&[C]));
        assert_eq!(disk.late(&flush, 9), ReplicaSet::EMPTY);
        assert_eq!(disk.late(&flush, 10), set(&[C]));
    }

    #[test]
    fn all_requests_are_looked_at_when_one_may_exceed_its_limit() {
        let lateness = &mut Disk::new().lateness;
        let (write, mut flush) = (out(Kind::Write, &[]), out(Kind::Flush, &[]));
        lateness.look_begins(seconds(100));
        assert!(!lateness.exceeds_limit(&write, seconds(100)));
        assert!(!lateness.is_due(seconds(100)) && lateness.is_due(seconds(101)));
        lateness.look_begins(seconds(101));
        assert!(lateness.exceeds_limit(&write, seconds(101)));
        assert!(lateness.is_due(seconds(101)), "as long as it is in flight");
        lateness.look_begins(seconds(102));
        assert!(!lateness.is_due(seconds(102)), "it has ended");
        assert!(lateness.is_due(seconds(103)), "what was asked since");
        flush.later = (flush.waiting, seconds(101));
        lateness.look_begins(seconds(110));
        assert!(!lateness.exceeds_limit(&flush, seconds(110)));
        assert!(!lateness.is_due(seconds(110)) && lateness.is_due(seconds(111)));
        assert!(lateness.exceeds_limit(&flush, seconds(111)));
    }

    #[test]
    fn slow_together_is_not_late() {
        let mut disk = Disk::new();
        let write = out(Kind::Write, &[A, B]);
        disk.lateness
            .observe(Kind::Write, B, seconds(3), seconds(99));
        disk.lateness
            .observe(Kind::Write, C, seconds(9), seconds(99));
        assert_eq!(
            disk.late(&write, 5),
            ReplicaSet::EMPTY,
            "twice as long as B"
        );
        assert_eq!(disk.late(&write, 6), set(&[C]));
        disk.lateness
            .observe(Kind::Write, B, seconds(30), seconds(100));
        assert_eq!(disk.late(&write, 9), ReplicaSet::EMPTY);
        assert_eq!(
            disk.late(&write, 10),
            set(&[C]),
            "at most ten times the limit"
        );
        let mut later = write;
        later.asked_at += seconds(300);
        assert_eq!(disk.late(&later, 301), set(&[C]), "that was long ago");
    }

    #[test]
    fn a_request_that_needs_the_replica_waits_for_it() {
        let mut disk = Disk::new();
        assert_eq!(disk.late(&out(Kind::Write, &[A]), 50), ReplicaSet::EMPTY);
        let mut failed = out(Kind::Write, &[A]);
        failed.waiting.remove(B);
        assert_eq!(disk.late(&failed, 50), ReplicaSet::EMPTY, "C decides");
        failed.done.remove(A);
        assert_eq!(disk.late(&failed, 50), set(&[C]), "it fails in any case");
        // B was asked later and may still answer.
        let mut read = out(Kind::Read, &[A]);
        read.needed = 1;
        read.later = (set(&[B]), seconds(140));
        assert_eq!(disk.late(&read, 40), ReplicaSet::EMPTY);
        read.waits_for_all = false;
        assert_eq!(disk.late(&read, 40), set(&[C]));
    }

    #[test]
    fn what_else_a_replica_does_makes_it_not_late() {
        let mut disk = Disk::new();
        let write = out(Kind::Write, &[A, B]);
        disk.loads.long_begins(C);
        assert_eq!(disk.late(&write, 9), ReplicaSet::EMPTY, "behind a flush");
        disk.loads.long_ended(C);
        assert_eq!(disk.late(&write, 9), ReplicaSet::EMPTY);
        assert_eq!(disk.late(&write, 10), set(&[C]), "a second after the flush");
        disk.loads.yielded(C);
        assert_eq!(
            disk.late(&write, 11),
            ReplicaSet::EMPTY,
            "after a chunk of a job"
        );
        for after in 12..100 {
            disk.loads.yielded(C);
            assert_eq!(disk.late(&write, after), ReplicaSet::EMPTY);
        }
        disk.loads.yielded(C);
        assert_eq!(disk.late(&write, 100), set(&[C]), "but not for ever");
    }

    #[test]
    fn a_job_makes_no_replica_late_that_answers_anything() {
        let mut disk = Disk::new();
        let scrub = out(Kind::Job, &[A, B]);
        let (all, now) = (ReplicaSet::first(3), seconds(105));
        disk.lateness.look(all, &disk.loads, |_| 1, now);
        disk.lateness.look(all, &disk.loads, |_| 0, now);
        assert_eq!(disk.late(&scrub, 14), ReplicaSet::EMPTY);
        assert_eq!(disk.late(&scrub, 15), ReplicaSet::EMPTY);
        assert!(disk.lateness.wants_news(&scrub, seconds(115)));
        assert_eq!(disk.late(&scrub, 16), set(&[C]));
    }

    /// The first flush after a power cut may take long, and nothing else is asked meanwhile.
    #[test]
    fn the_flush_of_a_job_may_take_as_long_as_one_of_the_guest() {
        let mut disk = Disk::new();
        let flush = out(Kind::Job, &[A, B]);
        disk.loads.long_begins(C);
        let (all, now) = (ReplicaSet::first(3), seconds(100));
        disk.lateness.look(all, &disk.loads, |_| 1, now);
        disk.lateness.look(all, &disk.loads, |_| 0, now);
        assert_eq!(disk.late(&flush, 11), set(&[C]), "others need no time");
        let lateness = &mut disk.lateness;
        lateness.observe(Kind::Flush, B, seconds(20), seconds(120));
        assert_eq!(disk.late(&flush, 40), ReplicaSet::EMPTY);
        assert_eq!(disk.late(&flush, 41), set(&[C]), "twice as long as B");
    }
}
