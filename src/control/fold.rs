//! Folding: a flood of similar events becomes a few events with exact counts. Pure; the time is
//! passed in.
//!
//! The first event of a kind opens a window. Up to `burst` events of a window are sent one by one.
//! Of the others only the last is sent, when the window ends; its `suppressed` counts the rest.
//!
//! Invariants:
//! - Exact: every pushed event is either taken or still here, alone or counted in a `suppressed`.
//! - Bounded, even if nothing is taken: at most `ready_max` events are ready, and at most
//!   `kinds_max` windows are open for errors, plus a few for each replica and operation.
//! - Events of one kind are taken in the order in which they were pushed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use super::events::{Event, Notice};
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report, Requester};
use crate::common::{Errno, ReplicaIndex};
use crate::jobs::{JobId, JobStatus};

/// Events of one kind are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Failure(OperationType, Requester, Option<Errno>),
    Corrupt(ReplicaIndex, OperationType),
    Error(ReplicaIndex, OperationType, Errno),
    /// Any error: used when there are too many kinds of errors to keep apart.
    AnyError(ReplicaIndex, OperationType),
    Evicted(ReplicaIndex),
    KeptOut(ReplicaIndex),
    RepairLimit,
    Rejoined(ReplicaIndex),
    Image(ReplicaIndex),
    Missing(ReplicaIndex),
    /// There are many of these only if a job is paused and resumed over and over.
    Job(JobId, JobStatus),
}

impl Kind {
    fn of(notice: &Notice) -> Self {
        let report = match notice {
            Notice::Report(report) => report,
            Notice::Job(event) => return Self::Job(event.job.id, event.job.status),
            Notice::Image(replica, _) => return Self::Image(*replica),
            Notice::Missing { replica, .. } => return Self::Missing(*replica),
        };
        match report {
            Report::Failure {
                operation,
                requester,
                error,
                ..
            } => Self::Failure(*operation, *requester, *error),
            Report::Bad {
                replica,
                operation,
                cause,
                ..
            } => match cause {
                Cause::Corrupt(_) => Self::Corrupt(*replica, *operation),
                Cause::Error(errno) => Self::Error(*replica, *operation, *errno),
            },
            Report::Evicted(replica) => Self::Evicted(*replica),
            Report::KeptOut { replica, .. } => Self::KeptOut(*replica),
            Report::RepairLimit { .. } => Self::RepairLimit,
            Report::Rejoined(replica) => Self::Rejoined(*replica),
        }
    }
}

/// The bounds of a [`Fold`].
#[derive(Clone, Copy, Debug)]
pub(super) struct FoldLimits {
    /// Events of a kind that are sent one by one in a window.
    pub(super) burst: u32,
    /// Length of a window.
    pub(super) window: Duration,
    /// Events that are ready to be taken. One half is reserved for the first events of windows, so
    /// that a flood of one kind does not delay the first of another.
    pub(super) ready_max: usize,
    /// Open windows above which the errors of a replica are not kept apart.
    pub(super) kinds_max: usize,
}

struct Window {
    ends_at: Duration,
    sent: u32,
    held: Option<Event>,
}

/// See the [module](self).
pub(super) struct Fold {
    limits: FoldLimits,
    ready: Vec<Event>,
    windows: HashMap<Kind, Window>,
    /// No window ends before this; `None` when no window is open.
    next_end: Option<Duration>,
    /// Events pushed, and events taken with those that were folded into them.
    pushed: u64,
    taken: u64,
}

impl Fold {
    pub(super) fn new(limits: FoldLimits) -> Self {
        Self {
            limits,
            ready: Vec::new(),
            windows: HashMap::new(),
            next_end: None,
            pushed: 0,
            taken: 0,
        }
    }

    /// Adds an event. Returns whether it is the first that became ready since the last
    /// [`take`](Self::take), so that the taker has to be woken.
    pub(super) fn push(&mut self, now: Duration, mut event: Event) -> bool {
        assert_eq!(event.suppressed, 0, "a new event stands for itself");
        self.pushed += 1;
        let limits = self.limits;
        let was_empty = self.ready.is_empty();
        let kind = self.kind(&event.notice);
        let fresh = Window {
            ends_at: now.saturating_add(limits.window),
            sent: 0,
            held: None,
        };
        self.next_end = Some(
            self.next_end
                .map_or(fresh.ends_at, |end| end.min(fresh.ends_at)),
        );
        let window = match self.windows.entry(kind) {
            Entry::Vacant(vacant) => vacant.insert(fresh),
            Entry::Occupied(occupied) => {
                let window = occupied.into_mut();
                // A window stays open beyond its end while there is no room for its held event.
                if now >= window.ends_at
                    && (window.held.is_none() || self.ready.len() < limits.ready_max)
                {
                    self.ready.extend(window.held.take());
                    *window = fresh;
                }
                window
            }
        };

        let ready_max = match window.sent {
            0 => limits.ready_max,
            _ => limits.ready_max / 2,
        };
        // Later events of the window must not overtake the held one.
        if window.held.is_none() && window.sent < limits.burst && self.ready.len() < ready_max {
            window.sent += 1;
            self.ready.push(event);
        } else {
            if let Some(held) = window.held.take() {
                event.suppressed += held.stands_for();
            }
            window.held = Some(event);
        }
        assert!(
            self.ready.len() <= limits.ready_max,
            "ready events are bounded"
        );
        was_empty && !self.ready.is_empty()
    }

    /// Takes the ready events and those held by windows that ended by `now`. Also returns when the
    /// next window ends.
    pub(super) fn take(&mut self, now: Duration) -> (Vec<Event>, Option<Duration>) {
        let mut events = std::mem::take(&mut self.ready);
        if self.next_end.is_some_and(|end| now >= end) {
            let first_held = events.len();
            self.windows.retain(|_, window| {
                let open = now < window.ends_at;
                if !open {
                    events.extend(window.held.take());
                }
                open
            });
            events[first_held..].sort_by_key(|event| event.made_at);
            self.next_end = self.windows.values().map(|window| window.ends_at).min();
        }
        self.taken += events.iter().map(Event::stands_for).sum::<u64>();
        let all_taken = self.windows.is_empty();
        assert!(
            self.taken <= self.pushed && (!all_taken || self.taken == self.pushed),
            "{} events were pushed and {} taken",
            self.pushed,
            self.taken
        );
        (events, self.next_end)
    }

    /// Takes all events, including those that open windows hold.
    pub(super) fn take_all(&mut self) -> Vec<Event> {
        self.take(Duration::MAX).0
    }

    fn kind(&self, notice: &Notice) -> Kind {
        let kind = Kind::of(notice);
        if self.windows.len() < self.limits.kinds_max || self.windows.contains_key(&kind) {
            return kind;
        }
        match kind {
            Kind::Error(replica, operation, _) => Kind::AnyError(replica, operation),
            Kind::Failure(operation, requester, _) => Kind::Failure(operation, requester, None),
            _ => kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::SectorRange;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    const LIMITS: FoldLimits = FoldLimits {
        burst: 3,
        window: Duration::from_millis(100),
        ready_max: 64,
        kinds_max: 8,
    };

    /// An event whose sector and second are its serial number.
    fn event(errno: i32, serial: u64) -> Event {
        Event {
            notice: Notice::Report(Report::Bad {
                replica: ReplicaIndex(0),
                operation: OperationType::Read,
                range: SectorRange::new(serial, 1),
                cause: Cause::Error(Errno(errno)),
            }),
            made_at: UNIX_EPOCH + Duration::from_secs(serial),
            suppressed: 0,
        }
    }

    fn parts(event: &Event) -> (i32, u64) {
        match &event.notice {
            Notice::Report(Report::Bad {
                range,
                cause: Cause::Error(errno),
                ..
            }) => (errno.0, range.start),
            other => panic!("not pushed here: {other:?}"),
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// (serial, suppressed) of each event.
    fn seen(events: &[Event]) -> Vec<(u64, u64)> {
        events
            .iter()
            .map(|event| (parts(event).1, event.suppressed))
            .collect()
    }

    #[test]
    fn the_rest_of_a_burst_comes_as_one_when_the_window_ends() {
        let mut fold = Fold::new(LIMITS);
        assert!(fold.push(ms(5), event(5, 0)), "the first wakes");
        assert!(!fold.push(ms(5), event(5, 1)), "the second finds it awake");
        for serial in 2..10 {
            fold.push(ms(6), event(5, serial));
        }
        let (events, again) = fold.take(ms(7));
        assert_eq!(seen(&events), [(0, 0), (1, 0), (2, 0)]);
        assert_eq!(again, Some(ms(105)));
        assert_eq!(fold.take(ms(104)), (vec![], Some(ms(105))));
        let (events, again) = fold.take(ms(105));
        assert_eq!(seen(&events), [(9, 6)]);
        assert_eq!(again, None);
    }

    #[test]
    fn a_new_window_sends_the_held_event_and_then_single_ones_again() {
        let mut fold = Fold::new(LIMITS);
        for serial in 0..5 {
            fold.push(ms(0), event(5, serial));
        }
        fold.push(ms(100), event(5, 5));
        let (events, again) = fold.take(ms(100));
        assert_eq!(seen(&events), [(0, 0), (1, 0), (2, 0), (4, 1), (5, 0)]);
        assert_eq!(again, Some(ms(200)));
    }

    #[test]
    fn kinds_do_not_share_a_burst() {
        let mut fold = Fold::new(LIMITS);
        for serial in 0..4 {
            fold.push(ms(0), event(5, serial));
        }
        fold.push(ms(0), event(28, 4));
        assert_eq!(
            seen(&fold.take(ms(0)).0),
            [(0, 0), (1, 0), (2, 0), (4, 0)],
            "another errno is another kind"
        );
        let mut failure = event(5, 5);
        failure.notice = Notice::Report(Report::Failure {
            operation: OperationType::Read,
            range: SectorRange::new(5, 1),
            requester: Requester::Guest,
            error: None,
            no_space: false,
        });
        assert!(fold.push(ms(0), failure));
    }

    #[test]
    fn untaken_events_are_bounded_and_counted() {
        let mut fold = Fold::new(LIMITS);
        let mut serial = 0;
        for now in 0..1000 {
            for errno in 1..100 {
                fold.push(ms(now * 10), event(errno, serial));
                serial += 1;
                assert!(fold.ready.len() <= LIMITS.ready_max);
                assert!(fold.windows.len() <= LIMITS.kinds_max + 1);
            }
        }
        let events = fold.take_all();
        assert_eq!(events.iter().map(Event::stands_for).sum::<u64>(), serial);
        assert!(fold.windows.is_empty());
    }

    #[test]
    fn a_flood_leaves_room_for_the_first_of_another_kind() {
        let mut fold = Fold::new(FoldLimits {
            burst: 1000,
            ..LIMITS
        });
        for serial in 0..1000 {
            fold.push(ms(0), event(5, serial));
        }
        fold.push(ms(0), event(28, 1000));
        let (events, _) = fold.take(ms(0));
        assert_eq!(events.len(), LIMITS.ready_max / 2 + 1);
        assert_eq!(events.last().map(parts), Some((28, 1000)));
    }

    /// The counts of the events of one kind, taken without delay: for each window those of the
    /// single events and of the folded one.
    fn naive(pushed_at: &[u64]) -> Vec<u64> {
        let mut counts = Vec::new();
        let mut rest = pushed_at;
        while let Some(first) = rest.first() {
            let end = first + 100;
            let window = rest.iter().take_while(|at| **at < end).count();
            let single = window.min(3);
            counts.extend(std::iter::repeat_n(1, single));
            if window > single {
                counts.push((window - single) as u64);
            }
            rest = &rest[window..];
        }
        counts
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_count(
            steps in prop::collection::vec((0u64..60, 1i32..5, prop::bool::weighted(0.3)), 0..300)
        ) {
            let mut fold = Fold::new(LIMITS);
            let mut pushed: HashMap<i32, Vec<u64>> = HashMap::new();
            let mut taken: HashMap<i32, Vec<Event>> = HashMap::new();
            let mut now = 0;
            let mut sort = |events: Vec<Event>| {
                for event in events {
                    taken.entry(parts(&event).0).or_default().push(event);
                }
            };
            for (serial, (step, errno, take)) in (0u64..).zip(steps) {
                // Most steps take no time at all, so that bursts occur.
                now += if step < 40 { 0 } else { step };
                pushed.entry(errno).or_default().push(now);
                fold.push(ms(now), event(errno, serial));
                // The taker is woken for the first event and when a window ends; more often does
                // no harm.
                if take || fold.ready.len() >= LIMITS.ready_max / 2 {
                    sort(fold.take(ms(now)).0);
                }
            }
            sort(fold.take_all());
            for (errno, times) in &pushed {
                let events = taken.remove(errno).unwrap_or_default();
                let counts: Vec<u64> = events.iter().map(Event::stands_for).collect();
                prop_assert_eq!(counts, naive(times));
                prop_assert!(events.is_sorted_by_key(|event| event.made_at));
            }
            prop_assert!(taken.is_empty());
        }
    }
}
