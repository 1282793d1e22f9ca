//! CIDEr (arXiv 1411.5726): cosine of n-gram counts weighted by their inverse document frequency in the references,
//! averaged over n-grams of 1 to 4 tokens and over references, times 10.

use super::case::{Case, LONGEST, Scores, ngrams};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Standard deviation of CIDEr-D's length penalty, in tokens.
const SIGMA: f64 = 6.0;

/// The two variants of the paper.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Equation 2.
    Plain,
    /// CIDEr-D (equation 3), robust against gaming: counts are clipped to those of the reference, and lengths that differ
    /// are penalised. pycocoevalcap calls it CIDEr.
    D,
}

/// The weighted counts of a text.
struct Vector<'a> {
    weights: BTreeMap<&'a [char], f64>,
    /// Of the n-grams of each length.
    norms: [f64; LONGEST],
    /// Number of pairs of tokens; the reference implementation takes it for the length.
    length: f64,
}

/// In how many images' references each n-gram occurs.
type Frequencies<'a> = BTreeMap<&'a [char], usize>;

/// The scores of all images. The inverse document frequencies are those of the references of `cases`, so that the score of
/// an image depends on the other images; the score of a single image is 0.
pub fn cider(cases: &[Case], variant: Variant) -> Scores {
    let mut frequencies = Frequencies::new();
    for case in cases {
        let of_references = case.references.iter().flat_map(|reference| ngrams(reference).into_keys());
        let distinct: std::collections::BTreeSet<&[char]> = of_references.collect();
        distinct.into_iter().for_each(|ngram| *frequencies.entry(ngram).or_insert(0) += 1);
    }
    let log_images = (cases.len() as f64).ln();
    let score = |case: &Case| {
        let caption = Vector::of(&case.caption, &frequencies, log_images);
        let similarity =
            |reference: &Vec<char>| caption.similarity(&Vector::of(reference, &frequencies, log_images), variant);
        10.0 * case.references.iter().map(similarity).sum::<f64>() / case.references.len() as f64
    };
    Scores::mean(cases.par_iter().map(score).collect())
}

impl<'a> Vector<'a> {
    fn of(tokens: &'a [char], frequencies: &Frequencies, log_images: f64) -> Self {
        let (mut weights, mut squares) = (BTreeMap::new(), [0.0; LONGEST]);
        for (ngram, count) in ngrams(tokens) {
            let frequency = frequencies.get(ngram).copied().unwrap_or(1);
            let weight = count as f64 * (log_images - (frequency as f64).ln());
            squares[ngram.len() - 1] += weight * weight;
            weights.insert(ngram, weight);
        }
        Self { weights, norms: squares.map(f64::sqrt), length: tokens.len().saturating_sub(1) as f64 }
    }

    /// The mean over n-gram lengths of the similarities with a reference.
    fn similarity(&self, reference: &Vector, variant: Variant) -> f64 {
        let mut sums = [0.0; LONGEST];
        for (ngram, weight) in &self.weights {
            let other = reference.weights.get(ngram).copied().unwrap_or_default();
            let weight = if variant == Variant::D { weight.min(other) } else { *weight };
            sums[ngram.len() - 1] += weight * other;
        }
        let norms = self.norms.iter().zip(&reference.norms).map(|(a, b)| a * b);
        let cosines = sums.iter().zip(norms).map(|(sum, norm)| if norm > 0.0 { sum / norm } else { 0.0 });
        let mean = cosines.sum::<f64>() / LONGEST as f64;
        let difference = self.length - reference.length;
        let penalty =
            if variant == Variant::D { (-difference * difference / (2.0 * SIGMA * SIGMA)).exp() } else { 1.0 };
        mean * penalty
    }
}
