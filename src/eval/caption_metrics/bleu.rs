//! BLEU-1 to BLEU-4 (Papineni et al. 2002, doi 10.3115/1073083.1073135) as in pycocoevalcap: the brevity penalty compares
//! with the closest reference length, and counts of zero are smoothed by tiny constants.

use super::case::{Case, LONGEST, Scores, ngrams};

/// Keep quotients finite where nothing was counted; pycocoevalcap's values.
const SMALL: f64 = 1e-9;
const TINY: f64 = 1e-15;

#[derive(Clone, Copy, Default)]
struct Counts {
    length: usize,
    /// Of the reference whose length is closest, the shorter one of two.
    reference_length: usize,
    /// Number of n-grams of each length in captions.
    ngrams: [usize; LONGEST],
    /// How many of them are in a reference, each as often as in the reference that has most of it.
    matches: [usize; LONGEST],
}

/// BLEU with n-grams of at most 1, 2, 3 and 4 tokens.
pub fn bleu(cases: &[Case]) -> [Scores; LONGEST] {
    let counts: Vec<Counts> = cases.iter().map(Counts::of).collect();
    let corpus = counts.iter().fold(Counts::default(), |sum, counts| sum.plus(counts)).scores();
    let images: Vec<[f64; LONGEST]> = counts.iter().map(Counts::scores).collect();
    std::array::from_fn(|n| Scores { corpus: corpus[n], images: images.iter().map(|scores| scores[n]).collect() })
}

impl Counts {
    fn of(case: &Case) -> Self {
        let length = case.caption.len();
        let lengths = case.references.iter().map(Vec::len);
        let reference_length = lengths.min_by_key(|other| (other.abs_diff(length), *other)).unwrap_or_default();
        let references: Vec<_> = case.references.iter().map(|reference| ngrams(reference)).collect();
        let mut matches = [0; LONGEST];
        for (ngram, count) in ngrams(&case.caption) {
            let most = references.iter().filter_map(|reference| reference.get(ngram)).max();
            matches[ngram.len() - 1] += count.min(most.copied().unwrap_or_default());
        }
        let ngrams = std::array::from_fn(|n| length.saturating_sub(n));
        Self { length, reference_length, ngrams, matches }
    }

    fn plus(mut self, other: &Self) -> Self {
        self.length += other.length;
        self.reference_length += other.reference_length;
        self.ngrams.iter_mut().zip(other.ngrams).for_each(|(sum, count)| *sum += count);
        self.matches.iter_mut().zip(other.matches).for_each(|(sum, count)| *sum += count);
        self
    }

    /// (∏ pₙ)^(1/N) · exp(min(0, 1 − r/c)) for N from 1 to 4.
    fn scores(&self) -> [f64; LONGEST] {
        let ratio = (self.length as f64 + TINY) / (self.reference_length as f64 + SMALL);
        let penalty = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
        let mut product = 1.0;
        std::array::from_fn(|n| {
            product *= (self.matches[n] as f64 + TINY) / (self.ngrams[n] as f64 + SMALL);
            product.powf(1.0 / (n + 1) as f64) * penalty
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_are_clipped_and_short_captions_are_penalised() {
        let case = |caption: &str, reference: &str| Case {
            caption: caption.chars().collect(),
            references: vec![reference.chars().collect()],
        };
        let score = |caption, reference| bleu(&[case(caption, reference)]).map(|scores| scores.corpus);
        // One of four characters counts, no pair.
        let [one, two, ..] = score("的的的的", "目的");
        assert!((one - 0.25).abs() < 1e-6 && two < 1e-6, "{one} {two}");
        let [one, two, ..] = score("红花", "红花绿草");
        assert!((one - (-1f64).exp()).abs() < 1e-6 && (two - one).abs() < 1e-6, "{one} {two}");
    }
}
