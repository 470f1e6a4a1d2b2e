//! The pace of jobs without a speed limit: a busy guest keeps nine tenths of its requests.
//!
//! The cost of a chunk to the guest is not known in advance. It is nothing on an idle disk, and
//! everything where both wait for the same CPU. So it is measured: the requests that the guest
//! makes while a chunk is in flight, and while none is.
//!
//! ```text
//! chunk in flight    ███          ███          ███
//! guest's requests   | ||  |||||||| ||  ||||||| |||
//! ```
//!
//! Here a third of the requests is missing while a chunk is in flight. A pause of seven times the
//! chunk leaves the guest 96 %.
//!
//! A chunk delays a request by at most its own duration. For a guest with so few requests that this
//! delay is negligible there are no pauses. Pure; the time is passed in.

use std::time::Duration;

use crate::limits::{JOB_CHUNKS_IN_FLIGHT_MAX, JOB_PAUSE_MAX, SECTOR_BYTES};

/// How many requests the guest has made so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GuestRequests(pub u64);

/// The part of its requests that jobs may cost the guest: less than half of a tenth, because the
/// cost of a chunk outlasts it: caches are cold, and requests that it has delayed end later.
const COST_MAX: f64 = 0.04;

/// Below this part of its requests the guest does not notice jobs.
const COST_NOT_NOTICED: f64 = 0.02;

/// The shortest pause after a chunk, in durations of the chunk, even if the chunk seems to cost
/// nothing: a request that takes longer than a chunk counts in the pause, whatever delayed it.
const PAUSE_MIN: f64 = 3.0;

/// Requests of the guest that a measurement needs.
const REQUESTS_MIN: f64 = 32.0;

/// Requests after which earlier measurements count half.
const REQUESTS_KEPT: f64 = 4096.0;

/// The time over which the guest's rate is averaged.
const RATE_OVER: Duration = Duration::from_millis(200);

/// The longest chunk while the guest is busy.
const BUSY_CHUNK_SECTORS: u64 = (256 << 10) / SECTOR_BYTES;

/// See the [module](self).
#[derive(Debug)]
pub struct Pace {
    looked_at: Duration,
    requests: u64,
    in_flight: usize,
    with: Measured,
    without: Measured,
    /// Requests a second, over the last [`RATE_OVER`].
    rate: f64,
    /// The duration of the last chunk.
    took: Duration,
    not_before: Duration,
    /// When the last chunk began.
    began_at: Duration,
    /// The least time between two chunks while the guest waits for a replica.
    gives_way: Duration,
}

/// Requests of the guest, and the time in which it made them.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    requests: f64,
    seconds: f64,
}

impl Measured {
    fn rate(self) -> f64 {
        self.requests / self.seconds.max(1e-9)
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            looked_at: Duration::ZERO,
            requests: 0,
            in_flight: 0,
            with: Measured::default(),
            without: Measured::default(),
            // Assume a busy guest until there is a measurement.
            rate: f64::INFINITY,
            took: Duration::ZERO,
            not_before: Duration::ZERO,
            began_at: Duration::ZERO,
            gives_way: Duration::ZERO,
        }
    }
}

impl Pace {
    /// Counts the guest's requests since the last call.
    pub(super) fn observe(&mut self, now: Duration, guest: GuestRequests) {
        let seconds = now.saturating_sub(self.looked_at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let requests = guest.0.saturating_sub(self.requests) as f64;
        self.looked_at = now;
        self.requests = guest.0;
        let measured = if self.in_flight > 0 {
            &mut self.with
        } else {
            &mut self.without
        };
        measured.requests += requests;
        measured.seconds += seconds;
        if self.with.requests + self.without.requests > REQUESTS_KEPT {
            for measured in [&mut self.with, &mut self.without] {
                measured.requests /= 2.0;
                measured.seconds /= 2.0;
            }
        }
        let weight = (seconds / RATE_OVER.as_secs_f64()).min(1.0);
        self.rate = if self.rate.is_finite() {
            self.rate + (requests / seconds - self.rate) * weight
        } else if self.with.seconds + self.without.seconds >= RATE_OVER.as_secs_f64() {
            requests / seconds
        } else {
            f64::INFINITY
        };
    }

    pub(super) fn began(&mut self, now: Duration, guest: GuestRequests) {
        self.observe(now, guest);
        self.in_flight += 1;
        self.began_at = now;
    }

    /// A chunk that started at `began` has ended. `is_usual`: the next one takes as long.
    pub(super) fn ended(
        &mut self,
        now: Duration,
        guest: GuestRequests,
        began: Duration,
        is_usual: bool,
    ) {
        self.observe(now, guest);
        assert!(self.in_flight > 0, "a chunk in flight ends once");
        self.in_flight -= 1;
        let took = now.saturating_sub(began);
        if is_usual {
            self.took = took;
        }
        let pause = took.as_secs_f64() * self.pause_factor(took);
        let pause = Duration::from_secs_f64(pause.min(JOB_PAUSE_MAX.as_secs_f64()));
        self.not_before = self.not_before.max(now + pause);
    }

    /// From now on chunks begin with at least this time in between, whatever their job.
    pub(super) fn give_way(&mut self, time: Duration) {
        self.gives_way = time;
    }

    /// No chunk begins before.
    pub(super) fn gives_way_until(&self) -> Duration {
        if self.gives_way.is_zero() {
            Duration::ZERO
        } else {
            self.began_at + self.gives_way
        }
    }

    /// When a chunk may start; `None` while enough are in flight.
    pub(super) fn ready_at(&self) -> Option<Duration> {
        let most = if self.cost_at_most(self.took) <= COST_NOT_NOTICED {
            JOB_CHUNKS_IN_FLIGHT_MAX
        } else {
            1
        };
        (self.in_flight < most).then_some(self.not_before)
    }

    /// The longest chunk now.
    pub(super) fn chunk_sectors(&self, most: u64, block_sectors: u64) -> u64 {
        let sectors = if self.cost_at_most(self.took) <= COST_MAX {
            most
        } else {
            most.min(BUSY_CHUNK_SECTORS)
        };
        (sectors - sectors % block_sectors).max(block_sectors)
    }

    /// The most that a chunk of this duration can cost, as a part of the guest's requests: each
    /// waits for it at most for its duration.
    fn cost_at_most(&self, took: Duration) -> f64 {
        self.rate * took.as_secs_f64().max(1e-6)
    }

    /// The pause after a chunk of this duration, in durations of the chunk.
    fn pause_factor(&self, took: Duration) -> f64 {
        let at_most = self.cost_at_most(took).min(1.0);
        if at_most <= COST_MAX {
            return 0.0;
        }
        let known = self.with.requests + self.without.requests >= REQUESTS_MIN
            && self.without.requests >= REQUESTS_MIN / 2.0
            && self.with.seconds > 0.0;
        let cost = if known {
            (1.0 - self.with.rate() / self.without.rate()).clamp(0.0, 1.0)
        } else {
            1.0
        };
        (cost.min(at_most) / COST_MAX - 1.0).max(PAUSE_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that keeps `depth` requests in flight on a machine that does one request in
    /// `request_micros`, and while a chunk is in flight only `left` of that. Returns how many
    /// requests it made in ten seconds, and how much time chunks were in flight.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn run(rate: f64, left: f64, chunk: Duration, jobs: bool) -> (f64, f64) {
        let mut pace = Pace::default();
        let step = Duration::from_micros(50);
        let (mut now, mut requests) = (Duration::ZERO, 0.0);
        let mut in_flight: Option<Duration> = None;
        let mut busy = 0.0;
        while now < Duration::from_secs(10) {
            let guest = GuestRequests(requests as u64);
            match in_flight {
                Some(began) if now >= began + chunk => {
                    pace.ended(now, guest, began, true);
                    in_flight = None;
                }
                None if jobs && pace.ready_at().is_some_and(|at| at <= now) => {
                    pace.began(now, guest);
                    in_flight = Some(now);
                }
                _ => {}
            }
            let share = if in_flight.is_some() { left } else { 1.0 };
            busy += f64::from(u8::from(in_flight.is_some())) * step.as_secs_f64();
            requests += rate * share * step.as_secs_f64();
            now += step;
        }
        (requests, busy / 10.0)
    }

    #[test]
    fn a_busy_guest_keeps_nine_tenths_whatever_a_chunk_costs_it() {
        for (rate, left, millis) in [
            (50_000.0, 0.0, 1),
            (50_000.0, 0.5, 1),
            (50_000.0, 0.95, 4),
            (2_000.0, 0.3, 5),
            (200.0, 0.6, 20),
            (200.0, 0.0, 100),
        ] {
            let chunk = Duration::from_millis(millis);
            let (alone, _) = run(rate, left, chunk, false);
            let (beside, busy) = run(rate, left, chunk, true);
            assert!(
                beside >= 0.9 * alone,
                "{rate} a second, {left} left: {:.3}",
                beside / alone
            );
            // And jobs are not starved.
            assert!(
                busy >= 0.035,
                "{rate} a second, {left} left: busy {busy:.3}"
            );
        }
    }

    #[test]
    fn a_guest_that_waits_for_a_replica_has_it_almost_alone() {
        let (mut pace, guest) = (Pace::default(), GuestRequests(0));
        let seconds = Duration::from_secs;
        pace.began(seconds(5), guest);
        pace.ended(seconds(6), guest, seconds(5), true);
        assert_eq!(pace.gives_way_until(), Duration::ZERO);
        pace.give_way(seconds(20));
        assert_eq!(pace.gives_way_until(), seconds(25));
        pace.began(seconds(25), guest);
        assert_eq!(pace.gives_way_until(), seconds(45));
        pace.give_way(Duration::ZERO);
        assert_eq!(pace.gives_way_until(), Duration::ZERO);
    }

    #[test]
    fn idle_time_of_the_guest_is_used() {
        let chunk = Duration::from_millis(1);
        let (_, alone) = run(0.0, 0.0, chunk, true);
        // A step of this test is a twentieth of a chunk.
        assert!(alone > 0.92, "{alone}");
        let (_, beside_little) = run(20.0, 0.0, chunk, true);
        assert!(beside_little > 0.9, "{beside_little}");
        let (_, for_nothing) = run(50_000.0, 1.0, chunk, true);
        assert!(for_nothing > 0.24, "{for_nothing}");
    }
}
