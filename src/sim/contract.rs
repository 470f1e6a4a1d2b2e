//! The rules of docs/contract.md, so that a failure quotes the one that is broken.
//!
//! The page has a heading `### TAG First sentence.` for each rule.

const PAGE: &str = include_str!("../../docs/contract.md");

/// The first sentence of the rule with this tag, without its full stop.
pub fn first_sentence(tag: &str) -> Option<&'static str> {
    rules(PAGE).find(|rule| rule.0 == tag).map(|rule| rule.1)
}

/// The tag and the first sentence of each rule of a page.
fn rules(page: &str) -> impl Iterator<Item = (&str, &str)> {
    page.lines().filter_map(|line| {
        let (tag, sentence) = line.strip_prefix("### ")?.split_once(' ')?;
        let (kind, number) = tag.split_at_checked(1)?;
        let is_tag = kind.chars().all(|c| c.is_ascii_uppercase())
            && !number.is_empty()
            && number.chars().all(|c| c.is_ascii_digit());
        is_tag.then(|| (tag, sentence.trim_end().trim_end_matches('.')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_a_heading_with_a_tag() {
        let page = "# Contract\n\n## Reads\n### R1 Every replica is asked.\n### Notes on R1\n\
                    ### W10 A write is copied once  \n#### R2 Not a rule\n";
        let found: Vec<_> = rules(page).collect();
        assert_eq!(
            found,
            [
                ("R1", "Every replica is asked"),
                ("W10", "A write is copied once")
            ]
        );
    }

    #[test]
    fn the_page_defines_the_rules_that_the_simulator_checks() {
        let sources = [
            include_str!("checks.rs"),
            include_str!("faults.rs"),
            include_str!("finale.rs"),
            include_str!("inputs.rs"),
            include_str!("jobs.rs"),
            include_str!("operations.rs"),
            include_str!("operator.rs"),
            include_str!("schedule.rs"),
            include_str!("state.rs"),
            include_str!("crash_states/mod.rs"),
            include_str!("crash_states/votes.rs"),
            include_str!("restart.rs"),
            include_str!("missing.rs"),
        ];
        let mut checked = 0;
        for source in sources {
            for call in source.split("Violation::new(").skip(1) {
                let Some(rule) = call.split('"').nth(1) else {
                    panic!("a violation names no rule: {call:.60}");
                };
                if rule.ends_with(|c: char| c.is_ascii_digit()) {
                    assert!(first_sentence(rule).is_some(), "no rule {rule} in the page");
                    checked += 1;
                }
            }
        }
        assert!(checked > 20, "{checked} rules are checked");
    }
}
