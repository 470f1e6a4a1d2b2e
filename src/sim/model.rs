//! The naive model of a disk: for every sector, each value that was ever written to it and may
//! still be read.
//!
//! It knows of requests only when they were made and when they were answered. That says which
//! values a read may return: those that no later write has certainly replaced. A value carries the
//! number of its write and is unique, so what a read returned shows which write it saw, and
//! reads that follow one another show in which order the writes took effect.

/// What a sector holds: unique for each write of each sector, and for each fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u64);

const ROT: u64 = 1 << 63;

impl Value {
    /// What write number `write` puts into `sector`. Write 0 is what the disk held in the
    /// beginning: zeroes.
    pub fn written(write: u64, sector: usize) -> Self {
        if write == 0 {
            return Self(0);
        }
        Self(write << 8 | sector as u64)
    }

    /// Bytes that no write has written.
    pub fn rotten(number: u64) -> Self {
        Self(ROT | number)
    }

    /// Whether no write has written it.
    pub fn is_rotten(self) -> bool {
        self.0 & ROT != 0
    }

    /// The number of the write.
    pub fn write(self) -> Option<u64> {
        (!self.is_rotten()).then_some(self.0 >> 8)
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_rotten() {
            write!(f, "rot{}", self.0 & !ROT)
        } else {
            write!(f, "w{}.{}", self.0 >> 8, self.0 & 0xff)
        }
    }
}

/// A moment: the number of guest-visible events before it. What the disk held in the beginning was
/// written from moment 0 to moment 1.
pub type Moment = u64;

/// Not yet.
pub const NEVER: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Written {
    value: Value,
    /// When the guest asked for it.
    began: Moment,
    /// When the guest was answered, or the host crashed.
    ended: Moment,
    /// When the guest first had its answer, with success. A recovery may decide for it anew.
    answered: Moment,
    /// It has certainly replaced what was written before it began.
    acknowledged: bool,
    /// A flush that began after its answer has succeeded: a crash does not undo it.
    durable: bool,
    /// It was acknowledged, a failed flush may have undone it, and no flush of the guest that
    /// covers it has failed.
    undone: bool,
    /// It was in flight when a write was submitted again, and has not ended since: the others that
    /// were in flight may replace it before it is done again.
    again: bool,
    /// The first end and the last begin of all requests that wrote or read this value: it was
    /// current from the one to the other if they come in this order.
    first_end: Moment,
    last_begin: Moment,
}

/// What is known of one sector.
#[derive(Clone, Debug)]
pub struct SectorModel(Vec<Written>);

/// The model.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Vec<Written>>,
    /// When the last flush began of those that the guest asked for and that have failed.
    told: Moment,
}

impl Model {
    /// A disk of `sectors` sectors that hold the values of write 0.
    pub fn new(sectors: usize) -> Self {
        let mut model = Self {
            sectors: Vec::new(),
            told: 0,
        };
        model.grow(sectors);
        model
    }

    /// The disk has this many sectors now; the new ones hold the values of write 0.
    pub fn grow(&mut self, sectors: usize) {
        let initial = |sector| {
            vec![Written {
                value: Value::written(0, sector),
                began: 0,
                ended: 1,
                answered: 1,
                acknowledged: true,
                durable: true,
                undone: false,
                again: false,
                first_end: 1,
                last_begin: 0,
            }]
        };
        self.sectors
            .extend((self.sectors.len()..sectors).map(initial));
    }

    /// A write was submitted.
    pub fn write_began(&mut self, sector: usize, value: Value, now: Moment) {
        self.sectors[sector].push(Written {
            value,
            began: now,
            ended: NEVER,
            answered: NEVER,
            acknowledged: false,
            durable: false,
            undone: false,
            again: false,
            first_end: NEVER,
            last_begin: now,
        });
    }

    /// The write was answered.
    pub fn write_ended(
        &mut self,
        sector: usize,
        value: Value,
        now: Moment,
        success: bool,
        durable: bool,
    ) {
        let written = self.sectors[sector].iter_mut().find(|w| w.value == value);
        let written = written.expect("nothing is forgotten before it has ended");
        written.ended = now;
        written.again = false;
        written.acknowledged = success;
        written.durable = success && durable;
        if success {
            written.answered = written.answered.min(now);
            written.first_end = written.first_end.min(now);
        }
    }

    /// The operator prefers this value, which is being written (W12), and may have been there
    /// before. `false` if it is that of a write which the guest has no answer to, and ends with it.
    pub fn preference_began(&mut self, sector: usize, value: Value, now: Moment) -> bool {
        let all = &mut self.sectors[sector];
        if all.iter().any(|w| w.value == value && w.ended == NEVER) {
            return false;
        }
        all.retain(|w| w.value != value);
        self.write_began(sector, value, now);
        true
    }

    /// The same, for what is decided after an unclean end. The guest may have an answer to it.
    pub fn recovery_began(&mut self, sector: usize, value: Value, now: Moment) -> bool {
        let written = |w: &&Written| w.value == value;
        let known = self.sectors[sector].iter().find(written);
        let answered = known.map_or(NEVER, |known| known.answered);
        let begins = self.preference_began(sector, value, now);
        if begins && let Some(written) = self.sectors[sector].last_mut() {
            written.answered = answered;
        }
        begins
    }

    /// A write that was held is submitted again (W9). It may replace another one that ran at the
    /// same time, and then that one replaces it again: the guest has no answer to either. So what
    /// reads return of them shows no order before they end.
    pub fn write_again(&mut self, sector: usize) {
        for written in &mut self.sectors[sector] {
            if written.ended == NEVER {
                written.again = true;
                written.first_end = NEVER;
                written.last_begin = written.began;
            }
        }
    }

    /// Whether a read that began at `since` may return the value: no write that began after this
    /// one ended was acknowledged before.
    pub fn is_permitted(&self, sector: usize, value: Value, since: Moment) -> bool {
        let all = &self.sectors[sector];
        let Some(written) = all.iter().find(|w| w.value == value) else {
            return false;
        };
        !all.iter()
            .any(|w| w.acknowledged && w.began >= written.ended && w.ended <= since)
    }

    /// Whether the value may have replaced the other one: its write had not ended when that of the
    /// other began, and no read had returned it.
    pub fn may_follow(&self, sector: usize, value: Value, other: Value) -> bool {
        let written = |value| self.sectors[sector].iter().find(|w| w.value == value);
        let both = written(value).zip(written(other));
        both.is_some_and(|(value, other)| value.ended.min(value.first_end) > other.began)
    }

    /// Whether a flush that began at `since` may make this value durable: as for a read, and a
    /// write that was undone counts until the guest has heard of a failed flush.
    pub fn may_be_flushed(&self, sector: usize, value: Value, since: Moment) -> bool {
        let all = &self.sectors[sector];
        let Some(written) = all.iter().find(|w| w.value == value) else {
            return false;
        };
        !all.iter().any(|w| {
            let replaces = w.began >= written.ended && w.ended <= since;
            (w.acknowledged || w.undone) && replaces
        })
    }

    /// A failed flush may have undone what was acknowledged and is not durable. Returns whether
    /// there is such a write.
    pub fn undo(&mut self, sector: usize) -> bool {
        let mut any = false;
        for written in &mut self.sectors[sector] {
            if written.acknowledged && !written.durable {
                written.acknowledged = false;
                written.undone = written.answered > self.told;
                any = true;
            }
        }
        self.unsee(sector);
        any
    }

    /// As many copies as win a vote may have lost what is not durable, and one of them has lied: no
    /// error says so.
    pub fn overrule(&mut self, sector: usize) {
        for written in &mut self.sectors[sector] {
            written.acknowledged &= written.durable;
        }
    }

    /// What is not durable may be gone, although a read may have returned it.
    pub fn unsee(&mut self, sector: usize) {
        for written in &mut self.sectors[sector] {
            if !written.durable {
                written.first_end = NEVER;
                written.last_begin = written.began;
            }
        }
    }

    /// A flush of the guest that began at `began` has failed: the guest knows that what it covers
    /// may be undone.
    pub fn flush_failed(&mut self, began: Moment) {
        self.told = self.told.max(began);
        for written in self.sectors.iter_mut().flatten() {
            written.undone &= written.answered > began;
        }
    }

    /// A read from `began` to `ended` returned the value. Whether that goes with what other reads
    /// have returned: there must be an order in which each value is current once, without a gap.
    /// For two values that is impossible if each was read or written after the other had been.
    ///
    /// # Errors
    /// The value that contradicts this one.
    pub fn observe(
        &mut self,
        sector: usize,
        value: Value,
        began: Moment,
        ended: Moment,
    ) -> Result<(), Value> {
        let all = &mut self.sectors[sector];
        let Some(index) = all.iter().position(|w| w.value == value) else {
            return Ok(());
        };
        if all[index].again {
            return Ok(());
        }
        let seen = &mut all[index];
        seen.first_end = seen.first_end.min(ended);
        seen.last_begin = seen.last_begin.max(began);
        let seen = *seen;
        let contradicts = |w: &&Written| {
            w.value != value && seen.first_end < w.last_begin && w.first_end < seen.last_begin
        };
        all.iter()
            .find(contradicts)
            .map_or(Ok(()), |w| Err(w.value))
    }

    /// Whether reads have shown that the value was replaced before `now`.
    pub fn is_past(&self, sector: usize, value: Value, now: Moment) -> bool {
        let all = &self.sectors[sector];
        let Some(seen) = all.iter().find(|w| w.value == value) else {
            return false;
        };
        let replaces =
            |w: &Written| w.value != value && seen.first_end < w.last_begin && w.first_end < now;
        all.iter().any(replaces)
    }

    /// A flush that began at `began` has succeeded. `oldest` is when the oldest request in flight
    /// began.
    pub fn flushed(&mut self, began: Moment, oldest: Moment) {
        for all in &mut self.sectors {
            for written in &mut *all {
                written.durable |= written.acknowledged && written.ended <= began;
            }
            forget(all, oldest);
        }
    }

    /// Forgets what no read may return any more.
    pub fn forget(&mut self, oldest: Moment) {
        for all in &mut self.sectors {
            if all.len() > 8 {
                forget(all, oldest);
            }
        }
    }

    /// What is known of a sector.
    pub fn sector(&self, sector: usize) -> SectorModel {
        SectorModel(self.sectors[sector].clone())
    }

    /// What was decided since `before` is taken back; what was written since may be there or not.
    pub fn take_back(&mut self, sector: usize, before: SectorModel) {
        let SectorModel(mut all) = before;
        for written in std::mem::take(&mut self.sectors[sector]) {
            if all.iter().all(|known| known.value != written.value) {
                all.push(Written {
                    acknowledged: false,
                    durable: false,
                    ..written
                });
            }
        }
        self.sectors[sector] = all;
    }

    /// A forced start: the disk holds one of these values there, and all else is given up.
    pub fn branch(&mut self, sector: usize, values: &[Value], now: Moment) {
        let all = &mut self.sectors[sector];
        all.clear();
        for value in values {
            if all.iter().all(|known| known.value != *value) {
                all.push(Written {
                    value: *value,
                    began: 0,
                    ended: now,
                    answered: NEVER,
                    acknowledged: false,
                    durable: false,
                    undone: false,
                    again: false,
                    first_end: NEVER,
                    last_begin: 0,
                });
            }
        }
    }

    /// The host crashed. What was not flushed may be there or not; what was in flight too.
    pub fn crashed(&mut self, now: Moment) {
        for all in &mut self.sectors {
            for written in &mut *all {
                written.ended = written.ended.min(now);
                written.acknowledged = written.durable;
                (written.undone, written.again) = (false, false);
                written.first_end = if written.durable {
                    written.ended
                } else {
                    NEVER
                };
                written.last_begin = written.began;
            }
            forget(all, now);
        }
    }

    /// The daemon was killed. What the guest has no answer to may be there or not.
    pub fn killed(&mut self, now: Moment) {
        for written in self.sectors.iter_mut().flatten() {
            written.ended = written.ended.min(now);
            written.again = false;
            if !written.acknowledged {
                written.first_end = NEVER;
                written.last_begin = written.began;
            }
        }
    }

    /// The values that a read from now on may return.
    pub fn permitted(&self, sector: usize) -> impl Iterator<Item = Value> + '_ {
        let all = &self.sectors[sector];
        all.iter()
            .map(|w| w.value)
            .filter(move |value| self.is_permitted(sector, *value, NEVER - 1))
    }
}

/// Forgets the values that were replaced, durably, before the oldest request began.
fn forget(all: &mut Vec<Written>, oldest: Moment) {
    let Some(replaced_before) = all
        .iter()
        .filter(|w| w.durable && w.ended <= oldest)
        .map(|w| w.began)
        .max()
    else {
        return;
    };
    all.retain(|w| w.ended > replaced_before);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(write: u64) -> Value {
        Value::written(write, 0)
    }

    #[test]
    fn a_read_sees_the_last_write_or_one_that_ran_meanwhile() {
        let mut model = Model::new(1);
        model.write_began(0, value(1), 10);
        assert!(model.is_permitted(0, value(0), 11));
        assert!(model.is_permitted(0, value(1), 11));
        model.write_ended(0, value(1), 12, true, false);
        assert!(model.is_permitted(0, value(0), 11));
        assert!(!model.is_permitted(0, value(0), 12));
        model.write_began(0, value(2), 13);
        model.write_ended(0, value(2), 14, false, false);
        assert!(model.is_permitted(0, value(1), 20));
        assert!(model.is_permitted(0, value(2), 20));
        assert!(!model.is_permitted(0, value(9), 20));
    }

    #[test]
    fn reads_do_not_go_back() {
        let mut model = Model::new(1);
        model.write_began(0, value(1), 10);
        assert_eq!(model.observe(0, value(1), 11, 12), Ok(()));
        assert_eq!(
            model.observe(0, value(0), 11, 13),
            Ok(()),
            "concurrent reads may"
        );
        assert_eq!(model.observe(0, value(0), 13, 14), Err(value(1)));
    }

    #[test]
    fn a_write_whose_flush_has_failed_may_be_undone_by_the_next_failure() {
        for (asked_at, may_be_old) in [(11, false), (14, true)] {
            let mut model = Model::new(1);
            model.write_began(0, value(1), 10);
            model.write_ended(0, value(1), 12, true, false);
            model.flush_failed(asked_at);
            assert!(!model.may_be_flushed(0, value(0), 20));
            assert!(model.undo(0));
            assert_eq!(model.may_be_flushed(0, value(0), 20), may_be_old);
        }
    }

    #[test]
    fn what_was_answered_before_it_was_recovered_is_undone_by_a_flush_that_fails() {
        for (asked_at, may_be_old) in [(11, false), (13, true)] {
            let mut model = Model::new(1);
            model.write_began(0, value(1), 10);
            model.write_ended(0, value(1), 12, true, false);
            model.killed(12);
            assert!(model.recovery_began(0, value(1), 14));
            model.write_ended(0, value(1), 15, true, false);
            assert!(model.undo(0));
            model.flush_failed(asked_at);
            assert_eq!(model.may_be_flushed(0, value(0), 20), may_be_old);
        }
    }

    #[test]
    fn a_crash_undoes_what_was_not_flushed() {
        let mut model = Model::new(1);
        model.write_began(0, value(1), 10);
        model.write_ended(0, value(1), 11, true, false);
        model.flushed(12, 12);
        model.write_began(0, value(2), 13);
        model.write_ended(0, value(2), 14, true, false);
        model.write_began(0, value(3), 15);
        assert_eq!(model.permitted(0).collect::<Vec<_>>(), [value(2), value(3)]);
        model.crashed(16);
        assert_eq!(
            model.permitted(0).collect::<Vec<_>>(),
            [value(1), value(2), value(3)]
        );
    }
}
