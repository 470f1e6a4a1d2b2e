//! Text in columns.

use std::io::{self, Write};

use super::terminal::{Style, Terminal};

/// What stands between columns.
const GAP: usize = 2;

/// A table: a line of headings and lines below it.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<(String, Style)>>,
}

#[derive(Debug)]
struct Column {
    heading: &'static str,
    is_number: bool,
}

impl Table {
    /// With these headings; a `>` before one has the column written to the right, as numbers are.
    pub(super) fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| Column {
            heading: heading.trim_start_matches('>'),
            is_number: heading.starts_with('>'),
        };
        Self {
            columns: headings.iter().map(column).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a line of as many cells.
    pub(super) fn row(&mut self, cells: Vec<(String, Style)>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    /// Writes it. On a terminal the last column is cut to its width, from the left.
    pub(super) fn write(&self, out: &mut dyn Write, terminal: Terminal) -> io::Result<()> {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| self.width(index))
            .collect();
        let before: usize = widths.iter().rev().skip(1).map(|width| width + GAP).sum();
        let room = terminal.columns.saturating_sub(before);
        let headings = self.columns.iter();
        let headings = headings.map(|column| (column.heading.to_owned(), Style::Heading));
        let headings: Vec<_> = headings.collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut pad = 0;
            for (index, (text, style)) in row.iter().enumerate() {
                let mut text = text.clone();
                if index + 1 == row.len() && terminal.is_terminal {
                    text = end_of(&text, room.max(MIN_CUT), terminal);
                }
                let missing = widths[index].saturating_sub(text.chars().count());
                if self.columns[index].is_number {
                    pad += missing;
                }
                write!(out, "{:pad$}{}", "", terminal.paint(*style, text))?;
                pad = GAP
                    + if self.columns[index].is_number {
                        0
                    } else {
                        missing
                    };
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn width(&self, index: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[index].0.chars().count());
        cells
            .chain([self.columns[index].heading.len()])
            .max()
            .unwrap_or(0)
    }
}

/// A cell is not cut below this.
const MIN_CUT: usize = 12;

/// The end of a text that is too long: of a path that tells most.
fn end_of(text: &str, columns: usize, terminal: Terminal) -> String {
    let length = text.chars().count();
    if length <= columns {
        return text.to_owned();
    }
    let mark = if terminal.unicode { "…" } else { "..." };
    let kept = columns - mark.chars().count();
    mark.chars()
        .chain(text.chars().skip(length - kept))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(terminal: Terminal) -> String {
        let mut table = Table::new(&["name", ">count", "file"]);
        let plain = |text: &str| (text.to_owned(), Style::Plain);
        table.row(vec![plain("a"), plain("12345678"), plain("/images/a.raw")]);
        table.row(vec![
            ("longer".into(), Style::Bad),
            plain("-"),
            plain("/a/very/long/path/to/an/image.raw"),
        ]);
        let mut out = Vec::new();
        table.write(&mut out, terminal).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_stand_below_one_another() {
        let mut terminal = Terminal {
            is_terminal: false,
            columns: 40,
            colour: false,
            unicode: false,
        };
        assert_eq!(
            printed(terminal),
            "name       count  file\n\
             a       12345678  /images/a.raw\n\
             longer         -  /a/very/long/path/to/an/image.raw\n"
        );
        terminal.is_terminal = true;
        assert!(
            printed(terminal).ends_with("...ath/to/an/image.raw\n"),
            "{}",
            printed(terminal)
        );
        terminal.colour = true;
        assert!(printed(terminal).contains("\x1b[1;31mlonger\x1b[0m         -"));
    }
}
