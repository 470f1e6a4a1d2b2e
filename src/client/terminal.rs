//! The properties of standard output: whether it is a terminal, its width, colours and characters.
//!
//! `anstream` decides on colours (NO_COLOR, CLICOLOR, TERM) and `anstyle` writes them.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal as _};

use anstream::{AutoStream, ColorChoice};
use anstyle::AnsiColor;
use rustix::termios::tcgetwinsize;
use unicode_width::UnicodeWidthStr as _;

/// The width of pipes, and of terminals that do not report theirs.
const COLUMNS_DEFAULT: usize = 80;

/// Narrower output is unreadable.
const COLUMNS_MIN: usize = 40;

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal {
    /// Lines can be overwritten.
    pub(super) is_terminal: bool,
    pub(super) columns: usize,
    pub(super) colour: bool,
    pub(super) unicode: bool,
}

/// The meaning of a text, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Heading,
    Good,
    Warning,
    Bad,
}

impl Terminal {
    pub(super) fn of_stdout() -> Self {
        let stdout = io::stdout();
        let is_terminal = stdout.is_terminal();
        let is_dumb = env::var_os("TERM").is_none_or(|value| value == "dumb");
        let size = tcgetwinsize(&stdout).ok().filter(|_| is_terminal);
        let columns = size.map_or(0, |size| usize::from(size.ws_col));
        let columns = if columns == 0 {
            COLUMNS_DEFAULT
        } else {
            columns
        };
        Self {
            is_terminal: is_terminal && !is_dumb,
            columns: columns.max(COLUMNS_MIN),
            // On a dumb terminal, anstream allows colours if CI or CLICOLOR is set.
            colour: !(is_terminal && is_dumb) && AutoStream::choice(&stdout) != ColorChoice::Never,
            unicode: is_unicode(&|name| env::var(name).ok()),
        }
    }

    /// The text in lines that fit a terminal, the second and all later ones behind `indent` spaces
    /// more than the first, which is behind `before`. Elsewhere it is one line.
    pub(super) fn wrapped(self, before: usize, indent: usize, text: &str) -> Vec<String> {
        let mut lines = vec![" ".repeat(before)];
        let (mut columns, mut is_first) = (before, true);
        for word in text.split(' ') {
            let width = word.width();
            let wraps = columns + 1 + width > self.columns && self.is_terminal && !is_first;
            if wraps {
                lines.push(" ".repeat(before + indent));
                columns = before + indent;
            } else if !is_first {
                lines.last_mut().expect("never empty").push(' ');
                columns += 1;
            }
            lines.last_mut().expect("never empty").push_str(word);
            columns += width;
            is_first = false;
        }
        lines
    }

    pub(super) fn paint<T: fmt::Display>(self, style: Style, text: T) -> Painted<T> {
        let style = if self.colour { style } else { Style::Plain };
        Painted { style, text }
    }
}

/// Whether the locale, found as the C library does, uses UTF-8.
fn is_unicode(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let mut values = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(variable);
    let locale = values.find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// A text that displays in its colour.
pub(super) struct Painted<T> {
    style: Style,
    text: T,
}

impl<T: fmt::Display> fmt::Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let style = match self.style {
            Style::Plain => return self.text.fmt(f),
            Style::Heading => anstyle::Style::new().bold(),
            Style::Good => AnsiColor::Green.on_default(),
            Style::Warning => AnsiColor::Yellow.on_default(),
            Style::Bad => AnsiColor::Red.on_default().bold(),
        };
        write!(f, "{style}{}{style:#}", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_decides_the_locale() {
        let with = |all: Option<&str>, lang: Option<&str>| {
            is_unicode(&|name| match name {
                "LC_ALL" => all.map(str::to_owned),
                "LANG" => lang.map(str::to_owned),
                _ => None,
            })
        };
        assert!(with(None, Some("de_DE.UTF-8")) && with(Some(""), Some("C.utf8")));
        assert!(!with(Some("C"), Some("de_DE.UTF-8")) && !with(None, None));
    }
}
