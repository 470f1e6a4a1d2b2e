//! No line of code or text is longer than 100 columns, so that two fit side by side on a screen.

use crate::files::all_texts;

const COLUMNS_MAX: usize = 100;

/// In pages, table rows, what is between fences, and lines of one word cannot be wrapped; neither
/// can addresses.
#[test]
fn no_line_is_longer_than_100_columns() {
    let mut long = Vec::new();
    for text in all_texts() {
        let is_page = text.path.ends_with(".md");
        let mut fenced = false;
        for (index, line) in text.content.lines().enumerate() {
            if is_page && line.trim_start().starts_with("```") {
                fenced = !fenced;
            }
            let is_row = line.trim_start().starts_with('|');
            let is_word = line.split_whitespace().count() == 1;
            let cannot_be_wrapped = is_page && (fenced || is_row || is_word);
            let is_address = line.contains("https://") || line.contains("http://");
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !cannot_be_wrapped && !is_address {
                long.push(format!("{}:{}: {columns} columns", text.path, index + 1));
            }
        }
    }
    assert!(
        long.is_empty(),
        "wrap these lines at {COLUMNS_MAX} columns: {long:#?}"
    );
}
