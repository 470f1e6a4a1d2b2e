//! The settings of a benchmark, from environment variables.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::{env, fs, process};

/// The settings.
pub struct Settings {
    /// Time of one measurement.
    pub time: Duration,
    /// Number of rounds.
    pub rounds: u64,
    /// Measure the rows whose name is, or contains, one of these. Empty: all rows.
    pub only: Vec<String>,
    /// Directory of the images that are not on tmpfs.
    pub directory: PathBuf,
}

impl Settings {
    /// Reads the settings; `seconds` and `rounds` are the defaults.
    pub fn from_environment(seconds: f64, rounds: u64) -> Self {
        let only = variable("BENCH_ONLY").unwrap_or_else(String::new);
        let parts = only
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty());
        let directory: PathBuf =
            variable("BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
        if let Err(error) = fs::create_dir_all(&directory) {
            eprintln!("cannot make {}, BENCH_DIR: {error}", directory.display());
            process::exit(2);
        }
        Self {
            time: Duration::from_secs_f64(variable("BENCH_SECONDS").unwrap_or(seconds)),
            rounds: variable("BENCH_ROUNDS").unwrap_or(rounds).max(1),
            only: parts.map(str::to_owned).collect(),
            directory,
        }
    }

    /// The rows to measure. A whole name selects just that row, even if other names contain it. If
    /// no row is selected, prints the names of all rows.
    pub fn wanted<R: Copy + Display>(&self, rows: &[R]) -> Vec<R> {
        let is_row = |name: &str| rows.iter().any(|row| row.to_string() == name);
        let is_meant = |row: &R, part: &String| {
            let name = row.to_string();
            name == *part || !is_row(part) && name.contains(part)
        };
        let is_wanted =
            |row: &R| self.only.is_empty() || self.only.iter().any(|part| is_meant(row, part));
        let wanted: Vec<R> = rows.iter().copied().filter(is_wanted).collect();
        if wanted.is_empty() {
            println!("BENCH_ONLY matches none of these rows:");
            rows.iter().for_each(|row| println!("  {row}"));
        }
        wanted
    }
}

/// The value of a variable that is set and not empty.
pub fn variable<T: FromStr>(name: &str) -> Option<T> {
    let text = env::var(name).ok().filter(|text| !text.is_empty())?;
    let value = text.parse().ok();
    Some(value.unwrap_or_else(|| panic!("{name}={text}: invalid value")))
}
