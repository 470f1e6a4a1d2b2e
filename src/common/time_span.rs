//! Times as an operator types them.

/// Milliseconds of a number with a unit: `500ms`, `5s`, `0.5s`, `2min`, `1h`. A number without one
/// counts in `usual_ms` milliseconds. `None` if it is none of these, or no whole number of
/// milliseconds.
pub fn parse_ms(text: &str, usual_ms: u64) -> Option<u64> {
    let is_of_number = |character: char| character.is_ascii_digit() || character == '.';
    let end = text.find(|character| !is_of_number(character));
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit_ms = match unit.trim_start() {
        "" => usual_ms,
        "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let digits = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    let fraction = match fraction {
        "" => 0,
        digits => digits.parse::<u64>().ok()?,
    };
    let scaled = digits.checked_add(fraction)?.checked_mul(unit_ms)?;
    scaled.is_multiple_of(scale).then(|| scaled / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed() {
        for (text, ms) in [
            ("0", 0),
            ("250", 250),
            ("500ms", 500),
            ("5s", 5000),
            ("0.5s", 500),
            ("1.250 s", 1250),
            ("2min", 120_000),
            ("1.5h", 5_400_000),
        ] {
            assert_eq!(parse_ms(text, 1), Some(ms), "{text}");
        }
        assert_eq!(parse_ms("0.5", 1000), Some(500));
        for text in [
            "",
            "s",
            "-1",
            "+1",
            ".5s",
            "1.",
            "1.s",
            "1.2.3s",
            "0.5",
            "0.0001s",
            "5 minutes",
            "5S",
            "٣s",
            "99999999999999999999s",
            "18446744073709551615h",
            "0.00000000000000000000001s",
        ] {
            assert_eq!(parse_ms(text, 1), None, "{text}");
        }
    }
}
