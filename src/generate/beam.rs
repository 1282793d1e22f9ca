//! Beam search for the caption of one image. It only keeps the hypotheses; the caller computes the log probabilities.

use super::sampling::likelier;

/// A caption, finished or not yet.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Hypothesis {
    /// Token ids without `[CLS]`; the last one is `[SEP]` when finished.
    pub tokens: Vec<u32>,
    /// Sum of the log probabilities of the tokens, at most 0.
    pub log_p: f64,
}

impl Hypothesis {
    /// Mean log probability per token.
    pub fn score(&self) -> f64 {
        self.log_p / self.tokens.len() as f64
    }
}

/// Settings of a beam search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Beam width: unfinished hypotheses that are extended at each step, and finished captions that are kept.
    pub width: usize,
    /// Exponent α of the length in the score Σ ln p / lengthᵅ (`length_penalty` of Hugging Face): 0 is the plain sum
    /// and prefers short captions, 1 is the mean per token, larger values prefer long captions.
    pub length_penalty: f64,
    /// The token `[SEP]` that ends a caption.
    pub sep: u32,
    /// Maximum number of tokens of a caption, `[SEP]` included.
    pub longest: usize,
}

/// The search for the caption of one image.
///
/// It keeps the `width` best finished captions and ends as soon as no unfinished hypothesis can still replace the worst
/// of them (`early_stopping="never"` of Hugging Face's `BeamSearchScorer`).
#[derive(Debug)]
pub struct Beam {
    settings: Settings,
    live: Vec<Hypothesis>,
    /// The best finished captions, best first; at most `width` captions.
    finished: Vec<Hypothesis>,
}

impl Beam {
    /// Starts a search with the empty caption.
    pub fn new(settings: Settings) -> Self {
        Self { settings, live: vec![Hypothesis::default()], finished: Vec::new() }
    }

    /// Unfinished hypotheses, for which the next [`Beam::step`] needs log probabilities. Empty when the search is over.
    pub fn live(&self) -> &[Hypothesis] {
        &self.live
    }

    /// Extends every live hypothesis by one token. `rows[i]` holds the log probabilities of the next token of live
    /// hypothesis
    /// `i`; tokens at −∞ are never taken. Returns, for each new live hypothesis, the index of the hypothesis that it
    /// extends.
    pub fn step(&mut self, rows: &[Vec<f32>]) -> Vec<usize> {
        let Settings { width, sep, .. } = self.settings;
        let mut candidates: Vec<(f64, usize, u32)> = Vec::new();
        for (parent, (hypothesis, row)) in self.live.iter().zip(rows).enumerate() {
            let tokens = best(row, width + 1); // one of them may be [SEP]
            candidates.extend(tokens.map(|token| (hypothesis.log_p + f64::from(row[token as usize]), parent, token)));
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));

        let (mut live, mut parents) = (Vec::new(), Vec::new());
        for (rank, (log_p, parent, token)) in candidates.into_iter().enumerate() {
            let mut tokens = self.live[parent].tokens.clone();
            tokens.push(token);
            let hypothesis = Hypothesis { tokens, log_p };
            if token != sep && live.len() < width {
                live.push(hypothesis);
                parents.push(parent);
            } else if token == sep && rank < width {
                self.finished.push(hypothesis);
            }
        }
        self.finished.sort_by(|a, b| self.settings.penalized(b).total_cmp(&self.settings.penalized(a)));
        self.finished.truncate(width);
        if self.is_done(&live) {
            live.clear();
            parents.clear();
        }
        self.live = live;
        parents
    }

    /// Whether none of the hypotheses `live` can overtake the worst kept caption. A beam of width 1 is greedy search
    /// and ends with the first finished caption.
    fn is_done(&self, live: &[Hypothesis]) -> bool {
        let Settings { width, .. } = self.settings;
        let Some(worst) = self.finished.get(width.saturating_sub(1)) else { return false };
        let worst = self.settings.penalized(worst);
        width == 1 || live.iter().all(|hypothesis| self.settings.attainable(hypothesis) <= worst)
    }

    /// The finished captions, best first.
    pub fn into_finished(self) -> Vec<Hypothesis> {
        self.finished
    }
}

impl Settings {
    /// The score that ranks finished captions: Σ ln p / lengthᵅ.
    fn penalized(&self, hypothesis: &Hypothesis) -> f64 {
        hypothesis.log_p / (hypothesis.tokens.len() as f64).powf(self.length_penalty)
    }

    /// Upper bound of the score that a live hypothesis can reach: Σ ln p can only decrease, and dividing a negative sum
    /// by the largest length gives the largest score.
    fn attainable(&self, hypothesis: &Hypothesis) -> f64 {
        hypothesis.log_p / (self.longest as f64).powf(self.length_penalty)
    }
}

/// The `count` most likely tokens, in no particular order.
fn best(row: &[f32], count: usize) -> impl Iterator<Item = u32> {
    let mut tokens: Vec<u32> = (0..row.len() as u32).filter(|&t| row[t as usize] > f32::NEG_INFINITY).collect();
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, likelier(row));
        tokens.truncate(count);
    }
    tokens.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{generate::sampling::log_softmax, random::Random};

    const SEP: u32 = 0;
    const VOCABULARY: usize = 3;

    /// A random language model: the next-token distribution after a prefix. The token at position `longest` is always
    /// `[SEP]`.
    fn model(seed: u64, prefix: &[u32], longest: usize) -> Vec<f32> {
        let key = prefix.iter().fold(1, |key, &token| key * VOCABULARY as u64 + u64::from(token));
        let mut random = Random::keyed(seed, "language", 0, key);
        let logits: Vec<f32> = (0..VOCABULARY).map(|_| random.normal() as f32).collect();
        let mut log_p = log_softmax(&logits);
        if prefix.len() + 1 == longest {
            log_p.iter_mut().enumerate().for_each(|(t, l)| {
                if t as u32 != SEP {
                    *l = f32::NEG_INFINITY
                }
            });
        }
        log_p
    }

    fn settings(width: usize, length_penalty: f64, longest: usize) -> Settings {
        Settings { width, length_penalty, sep: SEP, longest }
    }

    /// The captions that the search finds in the language `seed`, and its number of steps.
    fn search(seed: u64, settings: Settings) -> (Vec<Hypothesis>, usize) {
        let (mut beam, mut steps) = (Beam::new(settings), 0);
        while !beam.live().is_empty() {
            let old: Vec<Vec<u32>> = beam.live().iter().map(|h| h.tokens.clone()).collect();
            let rows: Vec<_> = old.iter().map(|tokens| model(seed, tokens, settings.longest)).collect();
            let parents = beam.step(&rows);
            assert!(parents.len() == beam.live().len() && parents.len() <= settings.width);
            for (hypothesis, parent) in beam.live().iter().zip(parents) {
                assert!(hypothesis.tokens.starts_with(&old[parent]));
            }
            steps += 1;
        }
        (beam.into_finished(), steps)
    }

    /// The same search without early stopping, or stopped at the first `width` finished captions.
    fn plain_search(seed: u64, settings: Settings, first_finished: bool) -> (Vec<Hypothesis>, usize) {
        let Settings { width, longest, .. } = settings;
        let (mut live, mut finished, mut steps) = (vec![Hypothesis::default()], Vec::new(), 0);
        while !(live.is_empty() || first_finished && finished.len() >= width) {
            let mut candidates: Vec<Hypothesis> = live.iter().flat_map(|h| next(seed, h, longest)).collect();
            candidates.sort_by(|a, b| b.log_p.total_cmp(&a.log_p));
            let is_finished = |h: &Hypothesis| h.tokens.last() == Some(&SEP);
            finished.extend(candidates.iter().take(width).filter(|h| is_finished(h)).cloned());
            live = candidates.into_iter().filter(|h| !is_finished(h)).take(width).collect();
            steps += 1;
        }
        finished.sort_by(|a, b| score(b, settings.length_penalty).total_cmp(&score(a, settings.length_penalty)));
        finished.truncate(width);
        (finished, steps)
    }

    fn score(hypothesis: &Hypothesis, length_penalty: f64) -> f64 {
        hypothesis.log_p / (hypothesis.tokens.len() as f64).powf(length_penalty)
    }

    /// All extensions of `prefix` by one token.
    fn next(seed: u64, prefix: &Hypothesis, longest: usize) -> Vec<Hypothesis> {
        let row = model(seed, &prefix.tokens, longest);
        let possible = row.iter().enumerate().filter(|(_, log_p)| **log_p > f32::NEG_INFINITY);
        let longer = possible.map(|(token, &log_p)| Hypothesis {
            tokens: prefix.tokens.iter().copied().chain([token as u32]).collect(),
            log_p: prefix.log_p + f64::from(log_p),
        });
        longer.collect()
    }

    fn all(seed: u64, prefix: &Hypothesis, longest: usize, found: &mut Vec<Hypothesis>) {
        for longer in next(seed, prefix, longest) {
            match longer.tokens.last() {
                Some(&SEP) => found.push(longer),
                _ => all(seed, &longer, longest, found),
            }
        }
    }

    const PENALTIES: [f64; 4] = [0.0, 0.6, 1.0, 2.0];

    /// There are 31 captions. No step has more than 24 candidates, so a beam of width 24 prunes nothing.
    #[test]
    fn a_wide_beam_equals_exhaustive_search() {
        for (seed, penalty) in (0..20).flat_map(|seed| PENALTIES.map(|penalty| (seed, penalty))) {
            let mut everything = Vec::new();
            all(seed, &Hypothesis::default(), 5, &mut everything);
            everything.sort_by(|a, b| score(b, penalty).total_cmp(&score(a, penalty)));
            assert_eq!(everything.len(), 1 + 2 + 4 + 8 + 16);
            for width in [24, 1000] {
                let (found, _) = search(seed, settings(width, penalty, 5));
                assert_eq!(found, everything[..width.min(31)], "seed {seed}, width {width}, penalty {penalty}");
            }
        }
    }

    #[test]
    fn early_stopping_never_changes_the_result() {
        let (mut saved, mut better) = (0, 0);
        for (seed, penalty) in (0..50).flat_map(|seed| PENALTIES.map(|penalty| (seed, penalty))) {
            for settings in (2..6).map(|width| settings(width, penalty, 9)) {
                let (found, steps) = search(seed, settings);
                let (expected, all_steps) = plain_search(seed, settings, false);
                assert_eq!(found, expected, "seed {seed}, {settings:?}");
                assert!(steps <= all_steps);
                saved += all_steps - steps;
                let first = plain_search(seed, settings, true).0;
                better += usize::from(score(&found[0], penalty) > score(&first[0], penalty));
            }
        }
        assert!(saved > 500 && better > 50, "{saved} steps saved, {better} better than the first finished captions");
    }

    #[test]
    fn a_beam_of_one_is_greedy() {
        for seed in 0..20 {
            let mut tokens = Vec::new();
            while tokens.last() != Some(&SEP) {
                let row = model(seed, &tokens, 7);
                let order = likelier(&row);
                tokens.push((0..VOCABULARY as u32).min_by(|a, b| order(a, b)).unwrap());
            }
            let (found, _) = search(seed, settings(1, 1.0, 7));
            assert_eq!((found.len(), &found[0].tokens), (1, &tokens), "seed {seed}");
        }
    }

    #[test]
    fn a_wider_beam_is_seldom_worse() {
        let best = |seed, width| search(seed, settings(width, 1.0, 6)).0[0].score();
        let worse = (0..100).filter(|&seed| best(seed, 8) < best(seed, 1) - 1e-9).count();
        let better = (0..100).filter(|&seed| best(seed, 8) > best(seed, 1) + 1e-9).count();
        assert!(worse <= 10 && better >= 20, "{worse} worse, {better} better");
    }
}
