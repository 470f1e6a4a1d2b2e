//! Finds the messages in a stream of bytes; the JSON parser reads them.
//!
//! The code is our own because QMP requires it: messages need no separator, so no reader of lines
//! finds them, and after an error a client resynchronises within the stream, which no streaming
//! JSON parser supports. Bytes that cannot be part of a message are skipped up to the end of their
//! line, or to a byte 0xFF, which is in no JSON text. Strings may be in single quotes, as in QEMU.
//!
//! Invariant: holds at most [`QMP_MESSAGE_BYTES_MAX`] bytes.

use crate::limits::QMP_MESSAGE_BYTES_MAX;

/// What was found in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A message, an object or array with matching ends.
    Message(Vec<u8>),
    /// Bytes that are not a message, and why.
    Garbage(&'static str),
    /// A message longer than [`QMP_MESSAGE_BYTES_MAX`].
    TooLong,
}

#[derive(Debug, Default)]
pub(super) struct Splitter {
    text: Vec<u8>,
    place: Place,
    /// Open brackets and braces.
    depth: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Between,
    /// After garbage, until the line ends.
    Skipping,
    Inside,
    /// In a string that ends with this quote.
    String {
        quote: u8,
        escaped: bool,
    },
}

const RESYNCHRONISE: u8 = 0xff;

impl Splitter {
    /// Processes a byte.
    pub(super) fn push(&mut self, byte: u8) -> Option<Found> {
        if byte == RESYNCHRONISE {
            let is_torn = matches!(self.place, Place::Inside | Place::String { .. });
            self.reset(Place::Between);
            return is_torn.then_some(Found::Garbage("the message is cut off"));
        }
        let found = match (self.place, byte) {
            (Place::Between | Place::Skipping, b'\n') => {
                self.place = Place::Between;
                None
            }
            (Place::Skipping, _) | (Place::Between, b' ' | b'\t' | b'\r') => None,
            (Place::Between, b'{' | b'[') | (Place::Inside, _) => self.inside(byte),
            (Place::Between, _) => {
                self.place = Place::Skipping;
                Some(Found::Garbage("expected an object"))
            }
            (Place::String { quote, escaped }, _) => self.in_string(byte, quote, escaped),
        };
        if self.text.len() > QMP_MESSAGE_BYTES_MAX {
            self.reset(Place::Skipping);
            return Some(Found::TooLong);
        }
        found
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.text.capacity()
    }

    fn inside(&mut self, byte: u8) -> Option<Found> {
        self.place = Place::Inside;
        match byte {
            b'{' | b'[' => self.depth += 1,
            // Cannot underflow: a message starts with an open bracket.
            b'}' | b']' => self.depth -= 1,
            b'"' | b'\'' => {
                let (quote, escaped) = (byte, false);
                self.place = Place::String { quote, escaped };
            }
            _ => {}
        }
        self.text.push(if byte == b'\'' { b'"' } else { byte });
        if self.depth > 0 || self.text.len() > QMP_MESSAGE_BYTES_MAX {
            return None;
        }
        let text = std::mem::take(&mut self.text);
        self.reset(Place::Between);
        Some(Found::Message(text))
    }

    fn in_string(&mut self, byte: u8, quote: u8, escaped: bool) -> Option<Found> {
        if byte < b' ' {
            self.reset(if byte == b'\n' {
                Place::Between
            } else {
                Place::Skipping
            });
            return Some(Found::Garbage("a string does not end"));
        }
        let mut next = Place::String {
            quote,
            escaped: byte == b'\\' && !escaped,
        };
        match byte {
            // JSON does not know this escape.
            b'\'' if escaped => *self.text.last_mut().expect("the backslash") = byte,
            _ if escaped => self.text.push(byte),
            _ if byte == quote => {
                self.text.push(b'"');
                next = Place::Inside;
            }
            b'"' => self.text.extend(b"\\\""),
            _ => self.text.push(byte),
        }
        self.place = next;
        None
    }

    fn reset(&mut self, place: Place) {
        self.text.clear();
        self.depth = 0;
        self.place = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(bytes: &[u8]) -> Vec<Found> {
        let mut splitter = Splitter::default();
        bytes
            .iter()
            .filter_map(|byte| splitter.push(*byte))
            .collect()
    }

    fn message(text: &str) -> Found {
        Found::Message(text.as_bytes().to_vec())
    }

    fn garbage(found: &Found) -> bool {
        matches!(found, Found::Garbage(_))
    }

    #[test]
    fn messages_need_no_separator_and_may_span_lines() {
        assert_eq!(
            found(b"{}{\"a\":[1,\"]}\"]}\r\n\t[\n1]\n{"),
            [
                message("{}"),
                message("{\"a\":[1,\"]}\"]}"),
                message("[\n1]")
            ]
        );
    }

    #[test]
    fn single_quotes_become_double_quotes() {
        assert_eq!(
            found(br#"{'a\'b"':"c'\"\\"}"#),
            [message(r#"{"a'b\"":"c'\"\\"}"#)]
        );
    }

    #[test]
    fn garbage_is_reported_once_and_ends_with_its_line() {
        let all = found(b"} hello {}\n{}\n{\"a\n{}");
        assert!(garbage(&all[0]) && garbage(&all[2]), "{all:?}");
        assert_eq!(
            (&all[1], &all[3], all.len()),
            (&message("{}"), &message("{}"), 4)
        );
    }

    #[test]
    fn byte_0xff_resynchronises() {
        let all = found(b"\xff\xff{\"a\": \"\xff{}");
        assert!(garbage(&all[0]));
        assert_eq!(all[1..], [message("{}")]);
    }

    #[test]
    fn a_message_that_does_not_end_is_too_long() {
        let mut endless = b"{\"a\":\"".to_vec();
        endless.resize(3 * QMP_MESSAGE_BYTES_MAX, b'x');
        assert_eq!(found(&endless), [Found::TooLong]);
    }

    #[test]
    fn the_longest_message_is_found_and_a_longer_one_rejected() {
        let of = |bytes: usize| [b"{".as_slice(), &vec![b' '; bytes - 2], b"}"].concat();
        let longest = of(QMP_MESSAGE_BYTES_MAX);
        assert!(found(&longest) == [Found::Message(longest)]);
        let longer = of(QMP_MESSAGE_BYTES_MAX + 1);
        assert!(found(&longer) == [Found::TooLong]);
    }
}
