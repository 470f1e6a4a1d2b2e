//! Looks for definitions and words in source text, without understanding the language.

/// The words of `text`: runs of letters, digits and underscores.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|character: char| !is_of_word(character))
        .filter(|word| !word.is_empty())
}

fn is_of_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// An item of the code: `Type`, `function`, `Type::function` or `Enum::Variant`.
pub(crate) struct Item<'a> {
    owner: Option<&'a str>,
    name: &'a str,
}

impl<'a> Item<'a> {
    pub(crate) fn new(path: &'a str) -> Self {
        match path.split_once("::") {
            None => Self {
                owner: None,
                name: path,
            },
            Some((owner, name)) => Self {
                owner: Some(owner),
                name,
            },
        }
    }

    pub(crate) fn is_defined_in(&self, source: &str) -> bool {
        const KEYWORDS: [&str; 7] = ["fn", "struct", "enum", "trait", "type", "const", "static"];
        let name = self.name;
        let Some(owner) = self.owner else {
            return KEYWORDS
                .iter()
                .any(|keyword| defines(source, keyword, name));
        };
        let is_of_owner = |line: &str| {
            let begins = ["impl", "trait ", "pub trait "];
            begins.iter().any(|begin| line.starts_with(begin))
                && words(line).any(|word| word == owner)
        };
        let is_function = defines(source, "fn", name) && source.lines().any(is_of_owner);
        let is_variant = defines(source, "enum", owner)
            && source
                .lines()
                .any(|line| line.starts_with(' ') && line.trim_start().starts_with(name));
        is_function || is_variant
    }
}

/// Whether `keyword name` is somewhere in `source`, followed by no further letter.
fn defines(source: &str, keyword: &str, name: &str) -> bool {
    let definition = format!("{keyword} {name}");
    source
        .match_indices(&definition)
        .any(|(at, _)| !source[at + definition.len()..].starts_with(is_of_word))
}

/// Whether `source` has a test function of this name.
pub(crate) fn has_test(source: &str, name: &str) -> bool {
    /// Between `#[test]` and the function there may be other attributes and a comment.
    const LINES_BETWEEN_MAX: usize = 8;
    let function = format!("fn {name}(");
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    lines.iter().enumerate().any(|(index, line)| {
        let before = &lines[index.saturating_sub(LINES_BETWEEN_MAX)..index];
        let attributes = before
            .iter()
            .rev()
            .take_while(|line| line.starts_with("#[") || line.starts_with("///"));
        line.starts_with(&function) && attributes.into_iter().any(|line| *line == "#[test]")
    })
}
