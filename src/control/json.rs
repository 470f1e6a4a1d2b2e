//! JSON in pure ASCII, whatever characters names contain, as QMP promises its clients.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};

/// Compact JSON in which every character outside of printable ASCII is escaped. One line, without
/// its end.
pub(super) fn to_ascii<T: Serialize>(value: &T) -> Vec<u8> {
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, Ascii(CompactFormatter));
    value
        .serialize(&mut serializer)
        .expect("structs of numbers and text serialise");
    text
}

struct Ascii(CompactFormatter);

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) =
            rest.find(|character: char| !character.is_ascii() || character.is_ascii_control())
        {
            let (plain, special) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut characters = special.chars();
            for unit in characters
                .next()
                .into_iter()
                .collect::<String>()
                .encode_utf16()
            {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = characters.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        self.0.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn characters_outside_ascii_are_escaped() {
        assert_eq!(
            to_ascii(&serde_json::json!({ "ä": "x\n\"€😀\u{7f}" })),
            br#"{"\u00e4":"x\n\"\u20ac\ud83d\ude00\u007f"}"#
        );
    }

    proptest! {
        #[test]
        fn parses_to_the_same_text(text in any::<String>()) {
            let bytes = to_ascii(&text);
            prop_assert!(bytes.is_ascii() && !bytes.contains(&b'\n'));
            prop_assert_eq!(serde_json::from_slice::<String>(&bytes).unwrap(), text);
        }
    }
}
