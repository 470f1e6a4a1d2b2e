//! How far a job is: a bar that is drawn over on a terminal, a line for each tenth where there is
//! none.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::format::{clean, duration, percent, size};
use super::shapes::Job;
use super::terminal::{Style, Terminal};

/// The rate is that of the last so many seconds.
const RATE_OVER: Duration = Duration::from_secs(10);

/// Columns of the bar.
const BAR: usize = 24;

/// See the [module](self).
pub(super) struct Progress {
    terminal: Terminal,
    /// When how much was done, for the rate.
    seen: VecDeque<(Instant, u64)>,
    /// Tenths that were told.
    told: Option<u64>,
    is_drawn: bool,
}

impl Progress {
    pub(super) fn new(terminal: Terminal) -> Self {
        Self {
            terminal,
            seen: VecDeque::new(),
            told: None,
            is_drawn: false,
        }
    }

    /// Tells how far the job is now.
    pub(super) fn show(&mut self, out: &mut dyn Write, job: &Job, now: Instant) -> io::Result<()> {
        let left = self.see(job, now);
        let done = percent(job.current_progress, job.total_progress);
        let text = format!(
            "{done:3} %  {} of {}{left}",
            size(job.current_progress),
            size(job.total_progress)
        );
        let what = title(job);
        if self.terminal.is_terminal {
            let filled = usize::try_from(done).unwrap_or(0) * BAR / 100;
            let (full, empty) = if self.terminal.unicode {
                ("█", "░")
            } else {
                ("#", ".")
            };
            // A line that is longer than the terminal could not be drawn over.
            let room = self.terminal.columns.saturating_sub(BAR + 3);
            let texts: String = format!("{what} {text}").chars().take(room).collect();
            let bar = format!("{}{}", full.repeat(filled), empty.repeat(BAR - filled));
            write!(
                out,
                "\r\x1b[2K{} {texts}",
                self.terminal.paint(Style::Good, bar)
            )?;
            self.is_drawn = true;
        } else if self.told.is_none_or(|told| done / 10 > told) {
            self.told = Some(done / 10);
            writeln!(out, "{what} {text}")?;
        }
        out.flush()
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self, out: &mut dyn Write) -> io::Result<()> {
        if std::mem::take(&mut self.is_drawn) {
            write!(out, "\r\x1b[2K")?;
            out.flush()?;
        }
        Ok(())
    }

    /// What is known of the time that is left.
    fn see(&mut self, job: &Job, now: Instant) -> String {
        if job.status == "paused" {
            self.seen.clear();
            return ", paused".into();
        }
        self.seen.push_back((now, job.current_progress));
        let is_old = |at: Instant| now.saturating_duration_since(at) > RATE_OVER;
        while self.seen.len() > 2 && self.seen.front().is_some_and(|(at, _)| is_old(*at)) {
            self.seen.pop_front();
        }
        let (since, before) = self.seen[0];
        let milliseconds = now.saturating_duration_since(since).as_millis();
        let done = u128::from(job.current_progress.saturating_sub(before));
        let rate = (done * 1000).checked_div(milliseconds).unwrap_or(0);
        let Some(rate) = u64::try_from(rate).ok().filter(|rate| *rate > 0) else {
            return String::new();
        };
        let left = job.total_progress.saturating_sub(job.current_progress);
        format!(", {}/s, {} left", size(rate), duration(left.div_ceil(rate)))
    }
}

/// What a job is: `job1 (scrub)`, `job2 (resync of b.raw)`.
pub(super) fn title(job: &Job) -> String {
    describe(&job.id, &job.r#type, job.node_name.as_deref())
}

/// The same by its parts.
pub(super) fn describe(id: &str, kind: &str, node_name: Option<&str>) -> String {
    let kind = kind.strip_prefix("quorum-").unwrap_or(kind);
    let of = node_name.map_or_else(String::new, |name| format!(" of {name}"));
    clean(&format!("{id} ({kind}{of})"))
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
        let mut progress = Progress::new(terminal(true));
        let (mut out, now) = (Vec::new(), Instant::now());
        progress.show(&mut out, &job(50 * MIB), now).unwrap();
        let mut paused = job(50 * MIB);
        paused.status = "paused".into();
        progress.show(&mut out, &paused, now).unwrap();
        progress.clear(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let drawn: Vec<_> = text.split("\r\x1b[2K").collect();
        assert_eq!(drawn.len(), 4, "{text:?}");
        assert!(
            drawn[1].starts_with("████████████░░░░░░░░░░░░ job1"),
            "{text}"
        );
        assert!(drawn[2].ends_with(", paused") && drawn[3].is_empty());
        assert!(!text.contains('\n') && drawn.iter().all(|line| line.chars().count() < 100));
    }
}
