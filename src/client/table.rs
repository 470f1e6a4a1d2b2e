//! Tables: aligned columns without borders.
//!
//! Own code, because comfy-table cuts a long cell at its end, where ours keeps the end of a path,
//! and cannot measure cells in our colours without a parser of escape sequences (eight crates).
//! `unicode-width` measures the cells.

use std::io::{self, Write};

use unicode_width::UnicodeWidthStr as _;

use super::terminal::{Style, Terminal};

/// Spaces between columns.
const GAP: usize = 2;

/// A cell is never cut to fewer columns.
const CUT_MIN: usize = 12;

/// A line of headings and the lines below it.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<Column>,
    /// The headings of columns that are left out, the first one first, until the rest fits.
    optional: &'static [&'static str],
    rows: Vec<Vec<(String, Style)>>,
}

#[derive(Debug)]
struct Column {
    heading: &'static str,
    is_number: bool,
}

impl Table {
    /// A table with these headings. A `>` before a heading aligns the column to the right.
    pub(super) fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| Column {
            heading: heading.trim_start_matches('>'),
            is_number: heading.starts_with('>'),
        };
        Self {
            columns: headings.iter().map(column).collect(),
            optional: &[],
            rows: Vec::new(),
        }
    }

    /// Leaves out columns that do not fit, in this order.
    pub(super) fn may_leave_out(&mut self, headings: &'static [&'static str]) {
        self.optional = headings;
    }

    /// Adds a line with one cell per column.
    pub(super) fn row(&mut self, cells: Vec<(String, Style)>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    /// Writes the table. On a terminal, the last column is cut on its left to fit.
    pub(super) fn write(mut self, out: &mut dyn Write, terminal: Terminal) -> io::Result<()> {
        let mut optional = self.optional.iter();
        let (widths, before) = loop {
            let widths: Vec<usize> = (0..self.columns.len())
                .map(|index| self.width(index))
                .collect();
            let before: usize = widths.iter().rev().skip(1).map(|width| width + GAP).sum();
            let last = widths.last().map_or(0, |width| *width.min(&CUT_MIN));
            if before + last <= terminal.columns {
                break (widths, before);
            }
            match optional.next() {
                Some(heading) => self.leave_out(heading),
                None => break (widths, before),
            }
        };
        let (widths, before) = self.shrink(widths, before, terminal);
        let room = terminal.columns.saturating_sub(before).max(CUT_MIN);
        let headings = self.columns.iter();
        let headings = headings.map(|column| (column.heading.to_owned(), Style::Heading));
        let headings: Vec<_> = headings.collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut pad = 0;
            for (index, (text, style)) in row.iter().enumerate() {
                let is_last = index + 1 == row.len();
                let text = if is_last && terminal.is_terminal {
                    end_of(text, room, terminal)
                } else {
                    text.clone()
                };
                let missing = widths[index].saturating_sub(text.width());
                let (before, after) = if self.columns[index].is_number {
                    (missing, 0)
                } else {
                    (0, missing)
                };
                pad += before;
                write!(out, "{:pad$}{}", "", terminal.paint(*style, text))?;
                pad = GAP + after;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    /// Cuts long cells of text on a terminal that nothing else has made fit.
    fn shrink(
        &mut self,
        mut widths: Vec<usize>,
        mut before: usize,
        terminal: Terminal,
    ) -> (Vec<usize>, usize) {
        let last = widths.last().map_or(0, |width| *width.min(&CUT_MIN));
        while terminal.is_terminal && before + last > terminal.columns {
            let columns = self.columns.iter().zip(&widths).enumerate();
            let columns = columns.take(widths.len() - 1);
            let texts = columns.filter(|(_, (column, _))| !column.is_number);
            let widest = texts.max_by_key(|(_, (_, width))| **width);
            let Some((index, width)) = widest.map(|(index, (_, width))| (index, *width)) else {
                break;
            };
            let cut = CUT_MIN.max(width.saturating_sub(before + last - terminal.columns));
            if cut >= width {
                break;
            }
            for row in &mut self.rows {
                row[index].0 = end_of(&row[index].0, cut, terminal);
            }
            widths[index] = cut;
            before -= width - cut;
        }
        (widths, before)
    }

    fn leave_out(&mut self, heading: &str) {
        let mut columns = self.columns.iter();
        if let Some(index) = columns.position(|column| column.heading == heading) {
            self.columns.remove(index);
            for row in &mut self.rows {
                row.remove(index);
            }
        }
    }

    fn width(&self, index: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[index].0.width());
        cells
            .chain([self.columns[index].heading.len()])
            .max()
            .unwrap_or(0)
    }
}

/// The end of a text that is too long: the end of a path identifies it best.
pub(super) fn end_of(text: &str, columns: usize, terminal: Terminal) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mark = if terminal.unicode { "…" } else { "..." };
    let kept = columns - mark.width();
    let mut starts = text.char_indices().map(|(start, _)| start);
    let end = starts.find(|start| text[*start..].width() <= kept);
    format!("{mark}{}", &text[end.unwrap_or(text.len())..])
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
    fn columns_are_aligned() {
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
        assert!(printed(terminal).contains("\x1b[1m\x1b[31mlonger\x1b[0m         -"));
    }

    #[test]
    fn wide_characters_take_two_columns() {
        let terminal = Terminal {
            is_terminal: true,
            columns: 24,
            colour: false,
            unicode: true,
        };
        let mut table = Table::new(&["name", "file"]);
        for (name, file) in [("日本", "/images/a"), ("a", "/日本日本日本/b.raw")] {
            table.row(vec![
                (name.into(), Style::Plain),
                (file.into(), Style::Plain),
            ]);
        }
        let mut out = Vec::new();
        table.write(&mut out, terminal).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "name  file\n日本  /images/a\na     …本日本日本/b.raw\n"
        );
    }
}
