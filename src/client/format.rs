//! Sizes, rates, times and names as people read and write them.
//!
//! Own code, because libraries round: a size is never shown larger than it is, a disk that is not
//! completely done is not at 100 %, and a size that is not a whole number of bytes is an error.

use std::fmt::Display;

use jiff::Timestamp;

use crate::common::message::is_obeyed;

const UNITS: [(u32, char); 6] = [
    (60, 'E'),
    (50, 'P'),
    (40, 'T'),
    (30, 'G'),
    (20, 'M'),
    (10, 'K'),
];

/// The new size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewSize {
    /// This size in bytes.
    Absolute(u64),
    /// Larger by this many bytes.
    Grow(u64),
}

/// Bytes in the largest unit that fits, rounded down: `10 GiB`, `1.5 MiB`, `512 B`.
pub(super) fn size(bytes: u64) -> String {
    let Some((shift, letter)) = UNITS.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    match (tenths / 10, tenths % 10) {
        (whole @ 0..10, tenth @ 1..) => format!("{whole}.{tenth} {letter}iB"),
        (whole, _) => format!("{whole} {letter}iB"),
    }
}

/// A latency in the largest unit that fits.
pub(super) fn latency(ns: u64, unicode: bool) -> String {
    let micro = if unicode { "µs" } else { "us" };
    let units = [(1_000_000_000, "s"), (1_000_000, "ms"), (1000, micro)];
    let Some((unit, name)) = units.into_iter().find(|(unit, _)| ns >= *unit) else {
        return format!("{ns} ns");
    };
    match (ns / unit, ns % unit * 10 / unit) {
        (whole @ 0..10, tenth @ 1..) => format!("{whole}.{tenth} {name}"),
        (whole, _) => format!("{whole} {name}"),
    }
}

/// A time to wait, in its two largest units.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    if hours > 0 {
        format!("{hours} h {} min", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes} min {} s", seconds % 60)
    } else {
        format!("{seconds} s")
    }
}

/// How long ago something was, in its largest unit.
pub(super) fn age(seconds: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(86400, "d"), (3600, "h"), (60, "min")];
    let unit = UNITS.into_iter().find(|(length, _)| seconds >= *length);
    let (length, name) = unit.unwrap_or((1, "s"));
    format!("{} {name}", seconds / length)
}

/// Percentage, rounded down; 100 if there is nothing to do.
pub(super) fn percent(done: u64, total: u64) -> u64 {
    let percent = (u128::from(done) * 100).checked_div(u128::from(total));
    percent
        .and_then(|percent| u64::try_from(percent.min(100)).ok())
        .unwrap_or(100)
}

/// `sector 7`, `sectors 7-9`.
pub(super) fn sectors(first: u64, count: u64) -> String {
    match count {
        0 => "no sector".to_owned(),
        1 => format!("sector {first}"),
        _ => format!("sectors {first}-{}", first.saturating_add(count - 1)),
    }
}

/// A point in time in UTC, in the format of RFC 3339.
pub(super) fn timestamp(seconds: u64, microseconds: u32) -> Option<String> {
    let nanoseconds = i32::try_from(microseconds).ok()?.checked_mul(1000)?;
    let moment = Timestamp::new(i64::try_from(seconds).ok()?, nanoseconds).ok()?;
    Some(format!("{moment:.6}"))
}

/// JSON on one line, in which characters that a terminal would obey are escaped.
pub(super) fn printable_json(json: impl Display) -> String {
    let mut printable = String::new();
    for character in json.to_string().chars() {
        if is_obeyed(character) {
            // They are in strings only, and none of them needs two units of UTF-16.
            printable.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            printable.push(character);
        }
    }
    printable
}

/// Text from outside, on one line: characters that a terminal would obey are escaped.
pub(super) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        if is_obeyed(character) {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

/// Slower jobs are mistakes: `--speed 1` was to be 1 MiB/s.
const RATE_MIN: u64 = 4 << 10;

/// Bytes, or K, M, G, T, P, E with powers of 1024 (KiB, ... too): `4096`, `10G`, `1.5T`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let invalid = || {
        format!(
            "'{}' is not a size; examples: 4096, 512M, 10G, 1.5T",
            printable(text)
        )
    };
    let end = text
        .find(|character: char| !character.is_ascii_digit() && character != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_uppercase();
    let letter = unit
        .strip_suffix("IB")
        .or(unit.strip_suffix('B'))
        .unwrap_or(&unit);
    let shift = match (letter, unit.as_str()) {
        ("", "" | "B") => 0,
        _ => UNITS
            .into_iter()
            .find(|(_, name)| letter.chars().eq([*name]))
            .map(|(shift, _)| shift)
            .ok_or_else(invalid)?,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let part = |digits: &str| digits.parse::<u128>().map_err(|_| invalid());
    if fraction.len() > 18 {
        return Err(invalid());
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| invalid())?);
    let scaled = part(whole)?
        .checked_mul(scale)
        .and_then(|whole| whole.checked_add(part(fraction).ok()?))
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(invalid)?;
    part(fraction)?;
    if scaled % scale != 0 {
        return Err(format!(
            "'{}' is not a whole number of bytes",
            printable(text)
        ));
    }
    u64::try_from(scaled / scale)
        .map_err(|_| format!("'{}' is larger than any disk", printable(text)))
}

/// A size, or after a `+` the size to add.
pub(super) fn parse_size_change(text: &str) -> Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::Grow),
        None => parse_size(text).map(NewSize::Absolute),
    }
}

/// Bytes per second, with or without `/s`; 0 for no limit.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    let rate = parse_size(text.strip_suffix("/s").unwrap_or(text))?;
    match rate {
        1..RATE_MIN => Err(format!(
            "a job would hardly go on with {rate} bytes per second; expected 0 for no limit, or at \
             least 4K, such as 100M"
        )),
        rate => Ok(rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_character_reaches_a_terminal_that_it_obeys() {
        let name = "a\u{9b}31m\u{7f}\u{202e}b\u{2066}\u{61c}\u{200f}\u{1b}";
        let text = printable(name);
        assert_eq!(
            text,
            "a\\u{9b}31m\\u{7f}\\u{202e}b\\u{2066}\\u{61c}\\u{200f}\\u{1b}"
        );
        let json = printable_json(serde_json::json!({ "node-name": name, "ä": "😀" }));
        assert!(!json.contains(is_obeyed), "{json:?}");
        assert!(
            json.contains("\\u009b31m\\u007f\\u202eb") && json.contains("😀"),
            "{json}"
        );
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["node-name"], name, "it is the same text");
    }

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10 << 30),
            ("1.5T", 3 << 39),
            ("0.5K", 512),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.2.3G",
            ".5G",
            "1.",
            "10X",
            "10GG",
            "0x10",
            "1.0001K",
            "16E",
            "1e9",
            "10iB",
            "٣",
            "99999999999999999999999999999999999999999G",
            "\x1b[2J",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(!error.contains('\x1b'), "{text}");
        }
        assert_eq!(parse_size_change("+1G"), Ok(NewSize::Grow(1 << 30)));
        assert_eq!(parse_size_change("1G"), Ok(NewSize::Absolute(1 << 30)));
        assert!(parse_size_change("++1G").is_err());
        assert_eq!(parse_rate("100M/s"), Ok(100 << 20));
        assert_eq!(parse_rate("0"), Ok(0));
        assert_eq!(parse_rate("4K"), Ok(RATE_MIN));
        assert!(parse_rate("1").unwrap_err().contains("1 bytes per second"));
    }

    #[test]
    fn sizes_are_formatted() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((10 << 20) + 1, "10 MiB"),
            ((10 << 30) - 1, "9.9 GiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_are_formatted() {
        assert_eq!(latency(999, true), "999 ns");
        assert_eq!(latency(108_000, false), "108 us");
        assert_eq!(latency(1_200_000, true), "1.2 ms");
        assert_eq!(latency(61_000_000_000, true), "61 s");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(200), "3 min 20 s");
        assert_eq!(duration(7500), "2 h 5 min");
        assert_eq!(
            timestamp(1_344_522_075, 745_528).unwrap(),
            "2012-08-09T14:21:15.745528Z"
        );
        assert_eq!(timestamp(u64::MAX, 0), None);
        assert_eq!(timestamp(0, u32::MAX), None);
    }

    #[test]
    fn percentages_sectors_and_texts_are_formatted() {
        assert_eq!(
            (percent(1, 3), percent(0, 0), percent(5, 4)),
            (33, 100, 100)
        );
        assert_eq!(sectors(7, 1), "sector 7");
        assert_eq!(sectors(7, 3), "sectors 7-9");
        assert_eq!(printable("a\x1b[31m\nb\u{9b}ä"), "a\\u{1b}[31m\\nb\\u{9b}ä");
    }

    proptest! {
        #[test]
        fn formatted_sizes_are_parsed_again(number in 0_u64..1024, unit in 0_usize..6) {
            let (shift, letter) = UNITS[unit];
            prop_assume!(u128::from(number) << shift <= u128::from(u64::MAX));
            prop_assert_eq!(parse_size(&size(number << shift)), Ok(number << shift));
            prop_assert_eq!(parse_size(&format!("{number}{letter}")), Ok(number << shift));
        }

        #[test]
        fn any_text_is_a_size_or_an_error(text in ".*") {
            let _ = parse_size_change(&text);
        }
    }
}
