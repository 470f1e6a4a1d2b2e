//! Parts of one-line messages to an operator.

use std::fmt::{self, Write as _};
use std::io;
use std::path::Path;

/// Whether a terminal obeys a character instead of showing it: control characters, and those that
/// change the direction of the text that follows (Unicode's Bidi_Control).
pub(crate) fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// A path or a name in a message: quoted, with what a terminal obeys escaped, so on one line.
pub(crate) struct Quoted<'a, T: AsRef<Path> + ?Sized>(pub(crate) &'a T);

impl<T: AsRef<Path> + ?Sized> fmt::Display for Quoted<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('\'')?;
        for character in self.0.as_ref().to_string_lossy().chars() {
            if is_obeyed(character) {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        f.write_char('\'')
    }
}

/// Names in a message, each of them [`Quoted`].
pub(crate) struct QuotedList<'a>(pub(crate) &'a [String]);

impl fmt::Display for QuotedList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            let separator = if index > 0 { ", " } else { "" };
            write!(f, "{separator}{}", Quoted(name))?;
        }
        Ok(())
    }
}

/// `1 sector`, `2 sectors`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// The text of an I/O error without the " (os error N)" that the library appends.
pub(crate) struct Reason<'a>(pub(crate) &'a io::Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}
