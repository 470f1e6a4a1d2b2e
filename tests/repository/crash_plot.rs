//! The plot of docs/crash.md shows the figures of its table. `make crash-plot` draws it anew.

use std::fmt::Write;
use std::{env, fs};

use crate::files::root;

const PAGE: &str = "docs/crash.md";
const PLOT: &str = "docs/crash.svg";
const REPLICAS_MAX: usize = 5;
const LEFT: f64 = 190.0;
const WIDTH: f64 = 520.0;
const TOP: f64 = 74.0;
const BAR: f64 = 16.0;
const GROUP: f64 = 46.0;
const TEXT: &str = "#1f2328";

/// A row of the table: starts of a class that were not refused, and after how many of them sectors
/// were unreadable.
struct Row {
    served: u32,
    unreadable: u32,
}

/// The row of a class.
fn row(page: &str, class: &str) -> Row {
    let start = format!("| `{class}` |");
    let mut lines = page.lines().filter_map(|line| line.strip_prefix(&start));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("{PAGE} has no row of {class}"));
    let number = |text: &str| text.trim().parse::<u32>().expect("a number");
    let numbers: Vec<u32> = line.trim_end_matches('|').split('|').map(number).collect();
    let [_, starts, refused, _, unreadable, _] = numbers[..] else {
        panic!("the row of {class} in {PAGE} has other columns");
    };
    Row {
        served: starts - refused,
        unreadable,
    }
}

/// A bar for each number of replicas, without records and with them.
fn plot(page: &str) -> String {
    let height = TOP + GROUP * REPLICAS_MAX as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 {height}\" \
         font-family=\"sans-serif\">\n<rect width=\"860\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut add = |element: &str| writeln!(svg, "{element}").expect("a string takes all");
    let text = |x: f64, y: f64, anchor: &str, size: u32, text: &str| {
        format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
             fill=\"{TEXT}\">{text}</text>"
        )
    };
    let bar = |x: f64, y: f64, width: f64, colour: &str| {
        format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
             fill=\"{colour}\"/>",
            BAR - 2.0
        )
    };
    let title = "Starts after a power cut that leave some sector unreadable, without a fault";
    add(&text(16.0, 30.0, "start", 18, title));
    let series = [
        ("none", "--state none", "#e07a5f"),
        ("records", "with records", "#0d9488"),
    ];
    for (place, (_, label, colour)) in series.iter().enumerate() {
        let x = LEFT + 130.0 * place as f64;
        add(&bar(x, 44.0, 12.0, colour));
        add(&text(x + 18.0, 56.0, "start", 13, label));
    }
    let bottom = TOP + GROUP * REPLICAS_MAX as f64;
    for percent in [0.0, 25.0, 50.0, 75.0, 100.0] {
        let x = LEFT + WIDTH * percent / 100.0;
        add(&format!(
            "<line x1=\"{x:.1}\" y1=\"{TOP:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" \
             stroke=\"#d8dce2\"/>"
        ));
        add(&text(
            x,
            bottom + 18.0,
            "middle",
            12,
            &format!("{percent} %"),
        ));
    }
    for replicas in 1..=REPLICAS_MAX {
        let y = TOP + GROUP * (replicas - 1) as f64 + 6.0;
        let label = match replicas {
            1 => "1 replica".to_string(),
            _ => format!("{replicas} replicas"),
        };
        add(&text(LEFT - 14.0, y + BAR + 3.0, "end", 13, &label));
        for (place, (state, _, colour)) in series.iter().enumerate() {
            let Row { served, unreadable } = row(page, &format!("blocks-{replicas}-{state}"));
            let y = y + BAR * place as f64;
            let width = WIDTH * f64::from(unreadable) / f64::from(served.max(1));
            add(&bar(LEFT, y, width, colour));
            let count = format!("{unreadable} of {served}");
            add(&text(
                LEFT + width + 6.0,
                y + BAR - 4.0,
                "start",
                12,
                &count,
            ));
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[test]
fn the_plot_of_power_cuts_shows_the_figures_of_its_page() {
    let page = fs::read_to_string(root().join(PAGE)).expect("reading the page");
    let wanted = plot(&page);
    let path = root().join(PLOT);
    if env::var_os("QUORUM_BLK_DRAW").is_some_and(|draw| draw == "1") {
        fs::write(&path, &wanted).expect("writing the plot");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "{PLOT} is not that of {PAGE}: make crash-plot"
    );
}

#[test]
fn a_bar_is_as_long_as_its_share() {
    let page: String = (1..=REPLICAS_MAX)
        .flat_map(|replicas| ["none", "records"].map(|state| (replicas, state)))
        .map(|(replicas, state)| {
            format!("| `blocks-{replicas}-{state}` | 4 | 4 | 0 | 0 | 1 | 0 |\n")
        })
        .collect();
    let svg = plot(&page);
    let share = format!("width=\"{:.1}\" height=\"{:.1}\"", WIDTH / 4.0, BAR - 2.0);
    assert_eq!(svg.matches(&share).count(), 2 * REPLICAS_MAX);
    assert_eq!(svg.matches(">1 of 4<").count(), 2 * REPLICAS_MAX);
}
