//! Lines of one kind, of which frontends, guests and clients can cause any number.
//!
//! A kind is a place in the source code: its lines differ in their values only. Of each kind,
//! [`LOG_BURST`] lines are written in a [`LOG_WINDOW`]. Those that follow are counted, and a line
//! at the end of the window says how many there were.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::time::Instant;

use log::{Level, Record};

use crate::limits::{LOG_BURST, LOG_WINDOW};

/// The modules whose lines others can cause. What the others log is about replicas, records and
/// what the operator does; the events about replicas are folded where they arise.
const FLOODED: [&str; 4] = [
    "quorum_blk::control",
    "quorum_blk::daemon::connections",
    "quorum_blk::device",
    "quorum_blk::untrusted",
];

/// The place of a line in the source code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Site {
    file: &'static str,
    line: u32,
}

impl Site {
    /// The place of a record whose number is to be limited. `None`: all of its kind are written.
    /// Lines for debugging are: the operator has asked for them.
    pub(super) fn of(record: &Record<'_>) -> Option<Self> {
        let module = record.module_path()?;
        let is_own = module.starts_with("quorum_blk");
        let is_flooded = FLOODED.iter().any(|prefix| module.starts_with(prefix));
        if record.level() > Level::Info || is_own && !is_flooded {
            return None;
        }
        Some(Self {
            file: record.file_static()?,
            line: record.line()?,
        })
    }
}

/// How many lines of a kind were left out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) level: Level,
    pub(super) text: String,
    pub(super) count: u64,
}

/// The kinds seen so far, at most as many as there are places in the source code.
#[derive(Default)]
pub(super) struct Floods(HashMap<Site, Kind>);

struct Kind {
    window_ends: Instant,
    written: u32,
    left_out: Option<LeftOut>,
}

impl Floods {
    /// Whether a line is to be written. If not, it is counted.
    pub(super) fn admit(
        &mut self,
        site: Site,
        level: Level,
        text: fmt::Arguments<'_>,
        now: Instant,
    ) -> bool {
        let window = || Kind {
            window_ends: now + LOG_WINDOW,
            written: 0,
            left_out: None,
        };
        let kind = self.0.entry(site).or_insert_with(window);
        if kind.window_ends <= now && kind.left_out.is_none() {
            *kind = window();
        }
        if kind.written < LOG_BURST {
            kind.written += 1;
            return true;
        }
        let left_out = kind.left_out.get_or_insert_with(|| LeftOut {
            level,
            text: text.to_string(),
            count: 0,
        });
        left_out.count += 1;
        false
    }

    /// When the first window ends in which lines were left out.
    pub(super) fn due_at(&self) -> Option<Instant> {
        let counting = self.0.values().filter(|kind| kind.left_out.is_some());
        counting.map(|kind| kind.window_ends).min()
    }

    /// What was left out in the windows that have ended.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<LeftOut> {
        let ended = self.0.values_mut().filter(|kind| kind.window_ends <= now);
        ended.filter_map(|kind| kind.left_out.take()).collect()
    }

    /// Ends all windows: the process ends.
    pub(super) fn end_windows(&mut self) {
        let now = Instant::now();
        for kind in self.0.values_mut() {
            kind.window_ends = kind.window_ends.min(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(line: u32) -> Site {
        Site {
            file: "connections.rs",
            line,
        }
    }

    #[test]
    fn a_flood_is_cut_and_counted_and_other_kinds_are_not() {
        let mut floods = Floods::default();
        let start = Instant::now();
        let text = || format_args!("frontend connected");
        let mut admit = |line, now| floods.admit(site(line), Level::Info, text(), now);
        let written = (0..LOG_BURST + 7).filter(|_| admit(1, start)).count();
        assert_eq!(written, LOG_BURST as usize);
        assert!(admit(2, start), "another kind");
        let end = start + LOG_WINDOW;
        assert!(!admit(1, end), "what was left out comes first");
        assert_eq!(floods.due_at(), Some(end));
        assert_eq!(floods.take_due(start), []);
        let [left_out] = &floods.take_due(end)[..] else {
            panic!("one kind was flooded");
        };
        assert_eq!((left_out.count, &*left_out.text), (8, "frontend connected"));
        assert_eq!(floods.due_at(), None);
        assert!(
            floods.admit(site(1), Level::Info, text(), end),
            "a new window"
        );
    }

    #[test]
    fn a_kind_that_is_rare_is_never_cut() {
        let mut floods = Floods::default();
        let mut now = Instant::now();
        for _ in 0..10 * LOG_BURST {
            assert!(floods.admit(site(1), Level::Warn, format_args!(""), now));
            now += LOG_WINDOW / LOG_BURST + std::time::Duration::from_millis(1);
        }
    }

    fn is_limited(level: Level, module: &'static str) -> bool {
        let mut record = Record::builder();
        record.level(level).module_path_static(Some(module));
        record.file_static(Some("a.rs")).line(Some(1));
        Site::of(&record.build()).is_some()
    }

    #[test]
    fn what_others_can_cause_is_limited_and_what_an_operator_must_see_is_not() {
        assert!(is_limited(Level::Warn, "quorum_blk::device::frontend"));
        assert!(is_limited(Level::Info, "quorum_blk::daemon::connections"));
        assert!(is_limited(Level::Error, "vhost::vhost_user"));
        assert!(!is_limited(Level::Debug, "quorum_blk::device::frontend"));
        assert!(!is_limited(Level::Warn, "quorum_blk::admin::missing"));
        assert!(!is_limited(Level::Error, "quorum_blk::daemon::last_flush"));
        // The record of an event has no place.
        let mut event = Record::builder();
        event
            .level(Level::Warn)
            .target("quorum_blk::control::events");
        assert!(Site::of(&event.build()).is_none());
    }
}
