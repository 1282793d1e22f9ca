//! METEOR 1.5 (Denkowski and Lavie 2014, doi 10.3115/v1/W14-3348) with exact matches and the parameters of English, which
//! pycocoevalcap uses for all languages. Characters have no stems, synonyms or paraphrases, Latin letters and digits apart.

use super::{
    case::{Case, Scores},
    meteor_alignment::align,
};
use rayon::prelude::*;

/// Weight of recall in the mean of precision and recall.
const ALPHA: f64 = 0.85;
/// Exponent and factor of the penalty for fragments.
const BETA: f64 = 0.2;
const GAMMA: f64 = 0.6;
/// Weight of content words; function words have the rest.
const DELTA: f64 = 0.75;
/// The single characters among METEOR's English function words.
const FUNCTION_WORDS: &str = "ais,.:?$-—()'’\"“”";

/// Counts of tokens, of content words and of function words.
#[derive(Clone, Copy, Default, PartialEq)]
struct Count {
    content: usize,
    function: usize,
}

/// What adds up over images.
#[derive(Clone, Copy, Default)]
struct Statistics {
    caption: Count,
    reference: Count,
    /// Matches are exact, so that the matched tokens of caption and reference are the same.
    matches: Count,
    /// Runs of matches that are adjacent and in the same order in both.
    chunks: usize,
}

/// The scores of all images: of the reference with the best score, the first one of several.
pub fn meteor(cases: &[Case]) -> Scores {
    let best: Vec<Statistics> = cases.par_iter().map(best).collect();
    let corpus = best.iter().fold(Statistics::default(), |sum, statistics| sum.plus(statistics)).score();
    Scores { corpus, images: best.iter().map(Statistics::score).collect() }
}

fn best(case: &Case) -> Statistics {
    let each = case.references.iter().map(|reference| Statistics::of(&case.caption, reference));
    let better = |best: Statistics, other: Statistics| if other.score() > best.score() { other } else { best };
    each.reduce(better).unwrap_or_default()
}

impl Count {
    fn of(tokens: impl Iterator<Item = char>) -> Self {
        let mut count = Self::default();
        for token in tokens {
            match FUNCTION_WORDS.contains(token.to_ascii_lowercase()) {
                true => count.function += 1,
                false => count.content += 1,
            }
        }
        count
    }

    fn plus(self, other: Self) -> Self {
        Self { content: self.content + other.content, function: self.function + other.function }
    }

    fn total(self) -> usize {
        self.content + self.function
    }

    fn weighted(self) -> f64 {
        DELTA * self.content as f64 + (1.0 - DELTA) * self.function as f64
    }
}

impl Statistics {
    fn of(caption: &[char], reference: &[char]) -> Self {
        let links = align(caption, reference);
        let matched = reference.iter().zip(&links).filter_map(|(token, link)| link.map(|_| *token));
        Self {
            caption: Count::of(caption.iter().copied()),
            reference: Count::of(reference.iter().copied()),
            matches: Count::of(matched),
            chunks: chunks(&links),
        }
    }

    fn plus(self, other: &Self) -> Self {
        Self {
            caption: self.caption.plus(other.caption),
            reference: self.reference.plus(other.reference),
            matches: self.matches.plus(other.matches),
            // The one chunk of a perfect match is no fragment.
            chunks: self.chunks + if other.is_perfect() { 0 } else { other.chunks },
        }
    }

    fn is_perfect(&self) -> bool {
        self.matches == self.caption && self.matches == self.reference && self.chunks == 1
    }

    /// F · (1 − γ (chunks / matches)^β) with F = 1 / ((1 − α) / P + α / R).
    fn score(&self) -> f64 {
        if self.matches.total() == 0 {
            return 0.0;
        }
        let precision = self.matches.weighted() / self.caption.weighted();
        let recall = self.matches.weighted() / self.reference.weighted();
        let mean = 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall);
        let fragments = if self.is_perfect() { 0.0 } else { self.chunks as f64 / self.matches.total() as f64 };
        mean * (1.0 - GAMMA * fragments.powf(BETA))
    }
}

/// Number of chunks of an alignment.
fn chunks(links: &[Option<usize>]) -> usize {
    let begins = |(i, link): (usize, &Option<usize>)| {
        let before = i.checked_sub(1).and_then(|i| links[i]);
        link.is_some() && link.and_then(|at| at.checked_sub(1)).filter(|at| before == Some(*at)).is_none()
    };
    links.iter().enumerate().filter(|place| begins(*place)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_runs() {
        assert_eq!(chunks(&[Some(3), Some(4), None, Some(5), Some(0), Some(1)]), 3);
        assert_eq!((chunks(&[]), chunks(&[None]), chunks(&[Some(1), Some(0)])), (0, 0, 2));
    }

    #[test]
    fn the_best_reference_counts() {
        let case = |caption: &str, references: &[&str]| Case {
            caption: caption.chars().collect(),
            references: references.iter().map(|reference| reference.chars().collect()).collect(),
        };
        let score = |caption, references: &[&str]| meteor(&[case(caption, references)]).corpus;
        assert_eq!(score("红花", &["绿草", "红花"]), 1.0);
        // P = 1/2 and R = 1 with one chunk of one match.
        let one = 1.0 / (0.15 / 0.5 + 0.85) * 0.4;
        assert!((score("红花", &["草", "红"]) - one).abs() < 1e-12);
        assert_eq!((score("", &["红"]), score("", &[""])), (0.0, 0.0));
    }
}
