//! What the metrics compare: a caption and its references as tokens, and the scores of a metric.

use std::collections::BTreeMap;
use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

/// Length of the longest n-grams of BLEU and CIDEr.
pub const LONGEST: usize = 4;

/// A caption and its references, as tokens.
pub struct Case {
    pub caption: Vec<char>,
    /// At least one.
    pub references: Vec<Vec<char>>,
}

/// The scores of one metric.
pub struct Scores {
    /// Of all images together. Not the mean over images for BLEU and METEOR, which add up the counts.
    pub corpus: f64,
    /// Of each image.
    pub images: Vec<f64>,
}

impl Scores {
    /// The scores of a metric whose value for all images is the mean over images.
    pub fn mean(images: Vec<f64>) -> Self {
        Self { corpus: images.iter().sum::<f64>() / images.len() as f64, images }
    }
}

/// The tokens of a text: its code points without white space, and without punctuation (Unicode category P) if
/// `drop_punctuation`. Letters keep their case.
pub fn tokens(text: &str, drop_punctuation: bool) -> Vec<char> {
    let punctuation = |c: &char| c.general_category_group() == GeneralCategoryGroup::Punctuation;
    text.chars().filter(|c| !(c.is_whitespace() || drop_punctuation && punctuation(c))).collect()
}

/// How often each n-gram of one to [`LONGEST`] tokens occurs, in a fixed order: sums of floats depend on it.
pub fn ngrams(tokens: &[char]) -> BTreeMap<&[char], usize> {
    let mut counts = BTreeMap::new();
    for ngram in (1..=LONGEST).flat_map(|n| tokens.windows(n)) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_characters() {
        let text = |drop| tokens(" 一只Cat，\t50％\u{3000}“好”…— ￥＋\n", drop).into_iter().collect::<String>();
        assert_eq!(text(false), "一只Cat，50％“好”…—￥＋");
        assert_eq!(text(true), "一只Cat50好￥＋");
    }

    #[test]
    fn ngrams_are_counted() {
        let tokens = tokens("的的的", false);
        let counts: Vec<(usize, usize)> =
            ngrams(&tokens).into_iter().map(|(ngram, count)| (ngram.len(), count)).collect();
        assert_eq!(counts, [(1, 3), (2, 2), (3, 1)]);
        assert!(ngrams(&[]).is_empty());
    }
}
