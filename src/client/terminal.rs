//! What standard output is: a terminal, how wide, with colours, with what characters.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal as _};

/// Columns of a terminal that does not say, and of what is no terminal.
const COLUMNS_USUAL: usize = 80;

/// Fewer would be of no use.
const COLUMNS_MIN: usize = 40;

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal {
    /// Lines can be drawn over.
    pub(super) is_terminal: bool,
    pub(super) columns: usize,
    pub(super) colour: bool,
    pub(super) unicode: bool,
}

/// What a text is to look like.
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
        let is_terminal = io::stdout().is_terminal();
        // https://no-color.org
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_none_or(|value| value == "dumb");
        let size = terminal_size::terminal_size().filter(|_| is_terminal);
        let columns = size.map_or(COLUMNS_USUAL, |(width, _)| usize::from(width.0));
        Self {
            is_terminal: is_terminal && !is_dumb,
            columns: columns.max(COLUMNS_MIN),
            colour: is_terminal && !is_dumb && !unwanted,
            unicode: is_unicode(&|name| env::var(name).ok()),
        }
    }

    pub(super) fn paint<T: fmt::Display>(self, style: Style, text: T) -> Painted<T> {
        let style = if self.colour { style } else { Style::Plain };
        Painted { style, text }
    }
}

/// Whether the locale's characters are Unicode's, as the C library finds out what the locale is.
fn is_unicode(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let mut values = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(variable);
    let locale = values.find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// A text in its colour.
pub(super) struct Painted<T> {
    style: Style,
    text: T,
}

impl<T: fmt::Display> fmt::Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = match self.style {
            Style::Plain => return self.text.fmt(f),
            Style::Heading => "1",
            Style::Good => "32",
            Style::Warning => "33",
            Style::Bad => "1;31",
        };
        write!(f, "\x1b[{code}m{}\x1b[0m", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_tells_the_locale() {
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
