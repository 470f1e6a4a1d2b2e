//! Turns the measurements of several rounds into figures.

use super::measure::Measured;
use super::plan::Row;
use super::spread::Spread;
use super::systems::System;

/// The figures of a system on a row: medians, and the spread where the report shows it.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests a second.
    pub requests_per_second: Spread,
    /// Megabytes (10^6) a second.
    pub megabytes_per_second: f64,
    /// p50, p99, p99.9, in microseconds.
    pub latency_us: [f64; 3],
    /// CPU time for each request, in microseconds.
    pub cpu_us: f64,
    /// Peak memory, in MiB.
    pub memory_mib: Option<f64>,
    /// Cores that the client used.
    pub client_cores: Option<f64>,
}

/// The measurements of every system on a row, round by round.
pub struct Outcome {
    /// The row.
    pub row: Row,
    /// For each system, one measurement per round.
    pub rounds: Vec<(System, Vec<Measured>)>,
}

impl Outcome {
    /// The figures of a system, if it was measured.
    pub fn figures(&self, system: System) -> Option<Figures> {
        let rounds = self.of(system)?;
        let median = |value: &dyn Fn(&Measured) -> f64| Spread::of(rounds.iter().map(value)).median;
        let median_if_any = |value: &dyn Fn(&Measured) -> Option<f64>| {
            let values: Option<Vec<f64>> = rounds.iter().map(value).collect();
            values.map(|values| Spread::of(values).median)
        };
        let requests_per_second = Spread::of(rounds.iter().map(|round| round.requests_per_second));
        Some(Figures {
            requests_per_second,
            megabytes_per_second: requests_per_second.median * self.row.pattern.len as f64 / 1e6,
            latency_us: [0, 1, 2].map(|index| median(&|round| round.latency_us[index])),
            cpu_us: median(&|round| round.cpu_us),
            memory_mib: median_if_any(&|round| round.memory_mib),
            client_cores: median_if_any(&|round| round.client_cores),
        })
    }

    /// The ratio of our requests per second to those of `other`, taken round by round.
    pub fn ratio_to(&self, other: System) -> Option<Spread> {
        let pairs = self.of(System::Ours)?.iter().zip(self.of(other)?);
        Some(Spread::of(pairs.map(|(ours, other)| {
            ours.requests_per_second / other.requests_per_second
        })))
    }

    fn of(&self, system: System) -> Option<&[Measured]> {
        let found = self.rounds.iter().find(|(of, _)| *of == system);
        found.map(|(_, rounds)| rounds.as_slice())
    }
}

/// A number with three significant digits: `94.2`, `8.31k`, `144k`, `1.20M`.
pub fn short(number: f64) -> String {
    let (number, unit) = match number {
        _ if number >= 999_500.0 => (number / 1e6, "M"),
        _ if number >= 999.5 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let decimals = match number {
        _ if number >= 99.95 => 0,
        _ if number >= 9.995 => 1,
        _ => 2,
    };
    format!("{number:.decimals$}{unit}")
}

/// A latency: `17.3`, `3410`.
pub fn microseconds(number: f64) -> String {
    let decimals = usize::from(number < 99.95);
    format!("{number:.decimals$}")
}

/// A ratio: `1.42×`.
pub fn times(ratio: f64) -> String {
    format!("{ratio:.2}×")
}

/// A fraction: `63 %`.
pub fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}
