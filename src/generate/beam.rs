//! Beam search for one caption: bookkeeping only, the model's log-probabilities come from outside.

use super::sampling::likelier;

/// A caption, finished or on the way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Hypothesis {
    /// Without `[CLS]`; the last is `[SEP]` when finished.
    pub tokens: Vec<u32>,
    /// Σ ln p of the tokens.
    pub log_p: f64,
}

impl Hypothesis {
    /// ln p a token: without this normalisation by length the shortest caption would win.
    pub fn score(&self) -> f64 {
        self.log_p / self.tokens.len() as f64
    }
}

/// The search for one picture. It ends when `width` captions are finished.
#[derive(Debug)]
pub struct Beam {
    width: usize,
    sep: u32,
    live: Vec<Hypothesis>,
    finished: Vec<Hypothesis>,
}

impl Beam {
    pub fn new(width: usize, sep: u32) -> Self {
        Self { width, sep, live: vec![Hypothesis::default()], finished: Vec::new() }
    }

    /// Captions on the way; each wants its log-probabilities at the next [`Beam::step`].
    pub fn live(&self) -> &[Hypothesis] {
        &self.live
    }

    /// Goes on by a token. `rows` has the log-probabilities of each live hypothesis; −∞ is never taken.
    /// Returns which of the old live hypotheses each new one continues.
    pub fn step(&mut self, rows: &[Vec<f32>]) -> Vec<usize> {
        let mut candidates: Vec<(f64, usize, u32)> = Vec::new();
        for (parent, (hypothesis, row)) in self.live.iter().zip(rows).enumerate() {
            let tokens = best(row, self.width + 1); // one of them may be [SEP]
            candidates.extend(tokens.map(|token| (hypothesis.log_p + f64::from(row[token as usize]), parent, token)));
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));

        let (mut live, mut parents) = (Vec::new(), Vec::new());
        for (rank, (log_p, parent, token)) in candidates.into_iter().enumerate() {
            let mut tokens = self.live[parent].tokens.clone();
            tokens.push(token);
            let hypothesis = Hypothesis { tokens, log_p };
            if token != self.sep && live.len() < self.width {
                live.push(hypothesis);
                parents.push(parent);
            } else if token == self.sep && rank < self.width {
                self.finished.push(hypothesis);
            }
        }
        if self.finished.len() >= self.width {
            live.clear();
            parents.clear();
        }
        self.live = live;
        parents
    }

    /// The finished captions, the best first.
    pub fn into_finished(mut self) -> Vec<Hypothesis> {
        self.finished.sort_by(|a, b| b.score().total_cmp(&a.score()));
        self.finished
    }
}

/// The `count` likeliest tokens, in no particular order.
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

    /// A random language model: the distribution after a prefix; the `longest`-th token must be `[SEP]`.
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

    fn search(seed: u64, width: usize, longest: usize) -> Vec<Hypothesis> {
        let mut beam = Beam::new(width, SEP);
        while !beam.live().is_empty() {
            let old: Vec<Vec<u32>> = beam.live().iter().map(|h| h.tokens.clone()).collect();
            let rows: Vec<_> = old.iter().map(|tokens| model(seed, tokens, longest)).collect();
            let parents = beam.step(&rows);
            assert!(parents.len() == beam.live().len() && parents.len() <= width);
            for (hypothesis, parent) in beam.live().iter().zip(parents) {
                assert!(hypothesis.tokens.starts_with(&old[parent]));
            }
        }
        beam.into_finished()
    }

    fn all(seed: u64, prefix: &Hypothesis, longest: usize, found: &mut Vec<Hypothesis>) {
        for (token, &log_p) in model(seed, &prefix.tokens, longest).iter().enumerate() {
            let mut next = prefix.clone();
            next.tokens.push(token as u32);
            next.log_p += f64::from(log_p);
            match token as u32 {
                SEP => found.push(next),
                _ if log_p > f32::NEG_INFINITY => all(seed, &next, longest, found),
                _ => {}
            }
        }
    }

    #[test]
    fn a_wide_beam_finds_what_trying_everything_finds() {
        for seed in 0..20 {
            let mut everything = Vec::new();
            all(seed, &Hypothesis::default(), 5, &mut everything);
            everything.sort_by(|a, b| b.score().total_cmp(&a.score()));
            assert_eq!(everything.len(), 1 + 2 + 4 + 8 + 16);
            assert_eq!(search(seed, 1000, 5), everything, "seed {seed}");
        }
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
            let found = search(seed, 1, 7);
            assert_eq!((found.len(), &found[0].tokens), (1, &tokens), "seed {seed}");
        }
    }

    #[test]
    fn wider_is_seldom_worse() {
        let best = |seed, width| search(seed, width, 6)[0].score();
        let worse = (0..100).filter(|&seed| best(seed, 8) < best(seed, 1) - 1e-9).count();
        let better = (0..100).filter(|&seed| best(seed, 8) > best(seed, 1) + 1e-9).count();
        assert!(worse <= 10 && better >= 20, "{worse} worse, {better} better");
    }
}
