//! Finds where a message begins and ends in a stream of bytes. What is in it is for the JSON parser
//! to say.
//!
//! Messages need nothing between them, newlines mean nothing. After bytes that cannot be part of a
//! message the rest of their line is skipped: a client that lost its place finds it again with the
//! next line, or with a byte 0xFF, which is in no JSON text. Single quotes are taken for double
//! ones, as QEMU does.
//!
//! Invariant: holds at most [`QMP_MESSAGE_BYTES_MAX`] bytes.

use crate::limits::QMP_MESSAGE_BYTES_MAX;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A message, an object or array with matching ends.
    Message(Vec<u8>),
    /// What can be none, and why.
    Garbage(&'static str),
    /// A message longer than any is.
    TooLong,
}

#[derive(Debug, Default)]
pub(super) struct Splitter {
    text: Vec<u8>,
    place: Place,
    /// Brackets and braces that are open.
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
    /// Takes a byte in.
    pub(super) fn push(&mut self, byte: u8) -> Option<Found> {
        if byte == RESYNCHRONISE {
            let is_torn = matches!(self.place, Place::Inside | Place::String { .. });
            self.start_again(Place::Between);
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
            self.start_again(Place::Skipping);
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
            // There is one: what is inside began with it.
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
        self.start_again(Place::Between);
        Some(Found::Message(text))
    }

    fn in_string(&mut self, byte: u8, quote: u8, escaped: bool) -> Option<Found> {
        if byte < b' ' {
            self.start_again(if byte == b'\n' {
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

    fn start_again(&mut self, place: Place) {
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
    fn messages_need_nothing_between_them_and_may_have_lines() {
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
    fn single_quotes_are_double_ones() {
        assert_eq!(
            found(br#"{'a\'b"':"c'\"\\"}"#),
            [message(r#"{"a'b\"":"c'\"\\"}"#)]
        );
    }

    #[test]
    fn garbage_is_told_once_and_ends_with_its_line() {
        let all = found(b"} hello {}\n{}\n{\"a\n{}");
        assert!(garbage(&all[0]) && garbage(&all[2]), "{all:?}");
        assert_eq!(
            (&all[1], &all[3], all.len()),
            (&message("{}"), &message("{}"), 4)
        );
    }

    #[test]
    fn the_byte_that_is_in_no_text_begins_anew() {
        let all = found(b"\xff\xff{\"a\": \"\xff{}");
        assert!(garbage(&all[0]));
        assert_eq!(all[1..], [message("{}")]);
    }

    #[test]
    fn a_message_that_does_not_end_is_given_up() {
        let mut endless = b"{\"a\":\"".to_vec();
        endless.resize(3 * QMP_MESSAGE_BYTES_MAX, b'x');
        assert_eq!(found(&endless), [Found::TooLong]);
    }

    #[test]
    fn a_message_may_have_so_many_bytes_and_no_more() {
        let of = |bytes: usize| [b"{".as_slice(), &vec![b' '; bytes - 2], b"}"].concat();
        let longest = of(QMP_MESSAGE_BYTES_MAX);
        assert!(found(&longest) == [Found::Message(longest)]);
        let longer = of(QMP_MESSAGE_BYTES_MAX + 1);
        assert!(found(&longer) == [Found::TooLong]);
    }
}
