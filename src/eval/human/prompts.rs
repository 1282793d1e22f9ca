//! Prompts for a human evaluation, a template of our own over the nine aspects of the paper's 500 prompts (Appendix A).

/// A table with the columns `aspect` and `prompt`, separated by tabs.
pub const TABLE: &str = include_str!("prompts.tsv");

/// (aspect, prompt), in the order of the table.
pub fn prompts() -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLE.lines().skip(1).filter_map(|line| line.split_once('\t'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn every_aspect_has_at_least_ten_different_prompts() {
        let mut aspects: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (aspect, prompt) in prompts() {
            assert!(aspects.entry(aspect).or_default().insert(prompt), "{prompt} occurs twice");
            assert!((4..60).contains(&prompt.chars().count()) && prompt.trim() == prompt, "{prompt}");
            assert!(!prompt.contains(['\t', '"']) && !prompt.chars().any(|c| c.is_ascii_alphabetic()), "{prompt}");
        }
        assert_eq!(aspects.len(), 9, "{:?}", aspects.keys());
        assert!(aspects.values().all(|prompts| prompts.len() >= 10), "{aspects:?}");
        let all: BTreeSet<&str> = aspects.values().flatten().copied().collect();
        assert!(all.len() >= 100 && all.len() == TABLE.lines().count() - 1, "{}", all.len());
    }
}
