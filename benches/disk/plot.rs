//! Draws the charts as SVG.
//!
//! The `plotters` crate was tried and not taken. It has no grouped bars, so each bar, its value and
//! its whisker would still be placed by hand. Its axis labels have one line and overlap, where
//! these have two, and its legend covers bars.

use std::fmt::Write as _;

use super::spread::Spread;
use super::summary::{short, times};

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 16.0;
/// Heights of a panel's title, of its bars, and of the labels below.
const PANEL_TITLE: f64 = 42.0;
const PANEL_BARS: f64 = 150.0;
const PANEL_LABELS: f64 = 46.0;
/// Colours of the systems.
const COLOURS: [&str; 3] = ["#2563eb", "#f59e0b", "#c3c8d0"];
/// Colours of the storages in the chart of ratios.
const OTHER_COLOURS: [&str; 3] = ["#0d9488", "#a855f7", "#94a3b8"];
const INK: &str = "#1f2328";

/// How the height of a bar depends on its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Proportional to the value.
    Linear,
    /// Proportional to the logarithm of the value.
    Logarithmic,
}

/// One of several charts in a picture: groups of bars side by side.
pub struct Panel {
    /// The title above it.
    pub title: String,
    /// For each group two lines of label, and a value for each series.
    pub groups: Vec<([String; 2], Vec<Option<f64>>)>,
}

/// Draws panels below each other, with a bar for each of `series`.
pub fn bars(title: &str, series: &[&str], panels: &[Panel], scale: Scale) -> String {
    let mut svg = Svg::new(title, series, COLOURS);
    for panel in panels {
        svg.panel(panel, scale);
    }
    svg.finish()
}

/// Draws grouped ratios on a logarithmic scale with a line at 1.
pub fn ratios(title: &str, series: &[&str], groups: &[(String, Vec<Option<Spread>>)]) -> String {
    const LABELS: f64 = 262.0;
    const BAR: f64 = 11.0;
    let mut svg = Svg::new(title, series, OTHER_COLOURS);
    let spreads = || {
        groups
            .iter()
            .flat_map(|(_, values)| values.iter().flatten())
    };
    let min = spreads().map(|spread| spread.min).fold(0.7, f64::min);
    let max = spreads().map(|spread| spread.max).fold(1.5, f64::max);
    let x_of = |ratio: f64| {
        let room = WIDTH - LABELS - MARGIN - 60.0;
        LABELS + (ratio / min).ln() / (max / min).ln() * room
    };
    let height: f64 = groups
        .iter()
        .map(|(_, values)| values.len() as f64 * BAR + 12.0)
        .sum();
    let (top, bottom) = (svg.y, svg.y + height);
    for tick in [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0] {
        if (min..=max).contains(&tick) {
            let (colour, width) = if tick == 1.0 {
                (INK, 1.5)
            } else {
                ("#d8dce2", 1.0)
            };
            svg.line([x_of(tick), top], [x_of(tick), bottom], colour, width);
            svg.text(
                [x_of(tick), bottom + 16.0],
                "middle",
                12,
                &format!("{tick}×"),
            );
        }
    }
    for (label, values) in groups {
        let middle = svg.y + values.len() as f64 * BAR / 2.0 + 4.0;
        svg.text([LABELS - 14.0, middle], "end", 12, label);
        for (value, colour) in values.iter().zip(OTHER_COLOURS) {
            if let Some(Spread { median, min, max }) = *value {
                let (from, to) = (x_of(median.min(1.0)), x_of(median.max(1.0)));
                svg.rectangle([from, svg.y], [to - from, BAR - 2.0], colour);
                let y = svg.y + BAR / 2.0 - 1.0;
                svg.line([x_of(min), y], [x_of(max), y], INK, 1.0);
                let beside = x_of(max.max(1.0)) + 6.0;
                svg.text([beside, svg.y + BAR - 2.0], "start", 10, &times(median));
            }
            svg.y += BAR;
        }
        svg.y += 12.0;
    }
    svg.y += 24.0;
    svg.finish()
}

/// A picture that grows downwards as parts are added.
struct Svg {
    body: String,
    y: f64,
}

impl Svg {
    /// A picture with a title and a legend of the series.
    fn new(title: &str, series: &[&str], colours: [&str; 3]) -> Self {
        let mut svg = Self {
            body: String::new(),
            y: 30.0,
        };
        svg.text([MARGIN, svg.y], "start", 18, title);
        svg.y += 26.0;
        let mut x = MARGIN;
        for (name, colour) in series.iter().zip(colours) {
            svg.rectangle([x, svg.y - 10.0], [12.0, 12.0], colour);
            svg.text([x + 18.0, svg.y], "start", 13, name);
            x += 46.0 + 7.2 * name.len() as f64;
        }
        svg.y += 18.0;
        svg
    }

    fn panel(&mut self, panel: &Panel, scale: Scale) {
        self.text([MARGIN, self.y + 16.0], "start", 14, &panel.title);
        let base = self.y + PANEL_TITLE + PANEL_BARS;
        let values = || {
            panel
                .groups
                .iter()
                .flat_map(|(_, values)| values.iter().flatten())
        };
        let max = values().copied().fold(f64::MIN_POSITIVE, f64::max);
        // The lowest bar must remain visible.
        let floor = values().copied().fold(max, f64::min) / 3.0;
        let height_of = |value: f64| match scale {
            Scale::Linear => value / max * PANEL_BARS,
            Scale::Logarithmic => (value / floor).ln() / (max / floor).ln() * PANEL_BARS,
        };
        let group_width = (WIDTH - 2.0 * MARGIN) / panel.groups.len() as f64;
        for (index, (labels, values)) in panel.groups.iter().enumerate() {
            let left = MARGIN + index as f64 * group_width;
            let bar_width = ((group_width - 9.0) / values.len() as f64).min(44.0);
            let first = left + (group_width - bar_width * values.len() as f64) / 2.0;
            for (place, (value, colour)) in values.iter().zip(COLOURS).enumerate() {
                let Some(value) = *value else { continue };
                let (x, height) = (first + place as f64 * bar_width, height_of(value));
                self.rectangle([x, base - height], [bar_width - 2.0, height], colour);
                let middle = x + bar_width / 2.0 - 1.0;
                self.text([middle, base - height - 4.0], "middle", 9, &short(value));
            }
            for (line, label) in labels.iter().enumerate() {
                let y = base + 16.0 + 15.0 * line as f64;
                self.text([left + group_width / 2.0, y], "middle", 12, label);
            }
        }
        self.line([MARGIN, base], [WIDTH - MARGIN, base], INK, 1.0);
        self.y = base + PANEL_LABELS;
    }

    fn text(&mut self, [x, y]: [f64; 2], anchor: &str, size: u32, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
             fill=\"{INK}\">{text}</text>"
        );
    }

    fn rectangle(&mut self, [x, y]: [f64; 2], [width, height]: [f64; 2], colour: &str) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             fill=\"{colour}\"/>"
        );
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str, width: f64) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" \
             stroke=\"{colour}\" stroke-width=\"{width}\"/>"
        );
    }

    fn finish(self) -> String {
        let height = self.y + MARGIN;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
             font-family=\"sans-serif\">\n\
             <rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"white\"/>\n{}</svg>\n",
            self.body
        )
    }
}
