//! The progress of a job: a bar on a terminal, a line for each tenth elsewhere.
//!
//! Own code, because indicatif would only replace the 20 lines that draw the bar: it prints nothing
//! into pipes, and its rate reads the clock itself, so that a test cannot set the time.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use unicode_width::UnicodeWidthStr as _;

use super::format::{duration, percent, printable, size};
use super::replies::Job;
use super::table::end_of;
use super::terminal::{Style, Terminal};

/// The rate is an average over this time.
const RATE_OVER: Duration = Duration::from_secs(10);

/// Width of the bar: it takes what the text leaves. With less than the first it is left out.
const BAR_COLUMNS_MIN: usize = 6;
const BAR_COLUMNS_MAX: usize = 80;

/// See the [module](self).
pub(super) struct Progress {
    terminal: Terminal,
    /// Recent progress in bytes, for the rate.
    samples: VecDeque<(Instant, u64)>,
    /// The last tenth with a line of its own.
    last_tenth: Option<u64>,
    is_drawn: bool,
}

impl Progress {
    pub(super) fn new(terminal: Terminal) -> Self {
        Self {
            terminal,
            samples: VecDeque::new(),
            last_tenth: None,
            is_drawn: false,
        }
    }

    /// Shows the progress at the time `now`.
    pub(super) fn show(&mut self, out: &mut dyn Write, job: &Job, now: Instant) -> io::Result<()> {
        let progress = (job.current_progress, job.total_progress);
        if job.status == "paused" {
            self.samples.clear();
            return self.show_text(out, &title(job), progress, ", paused");
        }
        self.show_done(out, &title(job), progress, now)
    }

    /// Shows how many bytes are done at the time `now`, of how many.
    pub(super) fn show_done(
        &mut self,
        out: &mut dyn Write,
        title: &str,
        progress: (u64, u64),
        now: Instant,
    ) -> io::Result<()> {
        let estimate = self.estimate(progress, now);
        self.show_text(out, title, progress, &estimate)
    }

    fn show_text(
        &mut self,
        out: &mut dyn Write,
        title: &str,
        (current, total): (u64, u64),
        estimate: &str,
    ) -> io::Result<()> {
        let done = percent(current, total);
        let text = format!("{done:3} %  {} of {}{estimate}", size(current), size(total));
        let text = format!("{title} {text}");
        if self.terminal.is_terminal {
            self.draw(out, done, &text)?;
        } else if self.last_tenth.is_none_or(|last| done / 10 > last) {
            self.last_tenth = Some(done / 10);
            writeln!(out, "{text}")?;
        }
        out.flush()
    }

    fn draw(&mut self, out: &mut dyn Write, percent: u64, text: &str) -> io::Result<()> {
        let (full, empty) = if self.terminal.unicode {
            ("█", "░")
        } else {
            ("#", ".")
        };
        // A line that wraps could not be overwritten, and one that fills the last column may wrap.
        let room = self.terminal.columns.saturating_sub(1);
        let bar_columns = room.saturating_sub(text.width() + 1).min(BAR_COLUMNS_MAX);
        let text = end_of(text, room, self.terminal);
        let bar = match bar_columns {
            0..BAR_COLUMNS_MIN => String::new(),
            _ => {
                let filled = usize::try_from(percent).unwrap_or(0) * bar_columns / 100;
                let bar = full.repeat(filled) + &empty.repeat(bar_columns - filled);
                format!("{} ", self.terminal.paint(Style::Good, bar))
            }
        };
        self.is_drawn = true;
        write!(out, "\r\x1b[2K{bar}{text}")
    }

    /// Removes the bar.
    pub(super) fn clear(&mut self, out: &mut dyn Write) -> io::Result<()> {
        if std::mem::take(&mut self.is_drawn) {
            write!(out, "\r\x1b[2K")?;
            out.flush()?;
        }
        Ok(())
    }

    /// The rate and the time left.
    fn estimate(&mut self, (current, total): (u64, u64), now: Instant) -> String {
        self.samples.push_back((now, current));
        let is_old = |at: Instant| now.saturating_duration_since(at) > RATE_OVER;
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| is_old(*at)) {
            self.samples.pop_front();
        }
        let (since, before) = self.samples[0];
        let milliseconds = now.saturating_duration_since(since).as_millis();
        let done = u128::from(current.saturating_sub(before));
        let rate = (done * 1000).checked_div(milliseconds).unwrap_or(0);
        let Some(rate) = u64::try_from(rate).ok().filter(|rate| *rate > 0) else {
            return String::new();
        };
        let left = total.saturating_sub(current);
        format!(", {}/s, {} left", size(rate), duration(left.div_ceil(rate)))
    }
}

/// A job's name and kind: `job1 (scrub)`, `job2 (resync of b.raw)`.
pub(super) fn title(job: &Job) -> String {
    describe(&job.id, &job.r#type, job.node_name.as_deref())
}

/// As `title`, from its parts.
pub(super) fn describe(id: &str, kind: &str, node_name: Option<&str>) -> String {
    let kind = kind.strip_prefix("quorum-").unwrap_or(kind);
    let of = node_name.map_or_else(String::new, |name| format!(" of {name}"));
    printable(&format!("{id} ({kind}{of})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn job(done: u64) -> Job {
        Job {
            id: "job1".into(),
            r#type: "quorum-resync".into(),
            status: "running".into(),
            current_progress: done,
            total_progress: 100 * MIB,
            error: None,
            node_name: Some("b\x1b".into()),
            speed: 0,
            corrupt_sectors_found: 0,
            unreadable_sectors_found: 0,
            sectors_written: 0,
        }
    }

    fn terminal(is_terminal: bool) -> Terminal {
        Terminal {
            is_terminal,
            columns: 100,
            colour: false,
            unicode: true,
        }
    }

    #[test]
    fn a_pipe_gets_a_line_for_each_tenth() {
        let mut progress = Progress::new(terminal(false));
        let (mut out, began) = (Vec::new(), Instant::now());
        for step in 0..=40 {
            let now = began + Duration::from_millis(100 * step);
            progress
                .show(&mut out, &job(step * 5 * MIB / 2), now)
                .unwrap();
        }
        progress.clear(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 11, "{text}");
        assert_eq!(lines[0], "job1 (resync of b\\u{1b})   0 %  0 B of 100 MiB");
        assert_eq!(
            lines[5],
            "job1 (resync of b\\u{1b})  50 %  50 MiB of 100 MiB, 25 MiB/s, 2 s left"
        );
    }

    #[test]
    fn a_terminal_gets_one_line_that_fits() {
        for columns in [40, 80, 120, 200] {
            let mut terminal = terminal(true);
            terminal.columns = columns;
            let mut progress = Progress::new(terminal);
            let (mut out, began) = (Vec::new(), Instant::now());
            let mut job = job(50 * MIB);
            job.node_name = Some("a-replica-with-a-long-name.raw".into());
            progress.show(&mut out, &job, began).unwrap();
            job.current_progress += 1;
            let later = began + Duration::from_millis(100);
            progress.show(&mut out, &job, later).unwrap();
            job.status = "paused".into();
            progress.show(&mut out, &job, later).unwrap();
            progress.clear(&mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            let drawn: Vec<_> = text.split("\r\x1b[2K").collect();
            assert_eq!(drawn.len(), 5, "{text:?}");
            assert!(drawn[2].ends_with("10 B/s, 1456 h 21 min left"), "{text}");
            assert!(drawn[3].ends_with(", paused") && drawn[4].is_empty());
            assert!(!text.contains('\n'), "{text}");
            assert!(drawn.iter().all(|line| line.width() < columns), "{text}");
            let bar = drawn[1].chars().filter(|c| "█░".contains(*c)).count();
            match columns {
                40 => assert_eq!(bar, 0, "{text}"),
                200 => assert_eq!(bar, BAR_COLUMNS_MAX, "{text}"),
                _ => assert!(bar == 0 || bar >= BAR_COLUMNS_MIN, "{text}"),
            }
        }
    }
}
