//! The answer of a replica that was asked where it has data.

use super::SectorRange;

/// Where a replica has data in a range, as far as it has looked. All else up to there are holes:
/// parts of a file that read as zeroes because nothing is stored there.
///
/// Invariant: the runs are in order, do not touch, and end before what was not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FoundData {
    runs: Vec<SectorRange>,
    until: u64,
}

impl FoundData {
    /// Nothing is known before `start`.
    pub fn from(start: u64) -> Self {
        Self {
            runs: Vec::new(),
            until: start,
        }
    }

    /// What is not known to be a hole is data.
    pub fn everywhere(range: SectorRange) -> Self {
        Self {
            runs: vec![range],
            until: range.end(),
        }
    }

    /// The data, in order.
    pub fn runs(&self) -> &[SectorRange] {
        &self.runs
    }

    /// The first sector that was not looked at.
    pub fn until(&self) -> u64 {
        self.until
    }

    /// From where the last answer ends up to `end` there is a hole.
    pub fn hole_until(&mut self, end: u64) {
        self.until = self.until.max(end);
    }

    /// From where the last answer ends up to `end` there is data.
    pub fn data_until(&mut self, end: u64) {
        if end <= self.until {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.end() == self.until => last.count = end - last.start,
            _ => self
                .runs
                .push(SectorRange::new(self.until, end - self.until)),
        }
        self.until = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_meet_are_one() {
        let mut found = FoundData::from(8);
        found.hole_until(8);
        found.data_until(10);
        found.data_until(10);
        found.data_until(16);
        found.hole_until(24);
        found.data_until(32);
        found.hole_until(40);
        let runs = [SectorRange::new(8, 8), SectorRange::new(24, 8)];
        assert_eq!((found.runs(), found.until()), (&runs[..], 40));
    }
}
