//! The order of samples as a pure function of (seed, purpose, position). Only the position is stored, so any point of a
//! run can be reached again directly.

use super::streams::Streams;
use crate::random::Random;

/// Rounds of the Feistel network.
const ROUNDS: u64 = 6;

/// A keyed permutation of `0..n` that is computed, not stored: a balanced Feistel network over the smallest even number
/// of bits that holds `n`, applied repeatedly until the result is below `n` (cycle walking).
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS as usize],
}

impl Permutation {
    pub(super) fn new(n: u64, seed: u64, purpose: &str, step: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| Random::keyed(seed, purpose, step, round as u64).bits());
        Self { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Maps `index` (below `n`) to its place in the permutation.
    pub(super) fn at(&self, index: u64) -> u64 {
        let mut value = index;
        loop {
            value = self.feistel(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            let noise = Random::keyed(key, "", 0, right).bits();
            (left, right) = (right, left ^ (noise & mask));
        }
        left << self.half_bits | right
    }
}

/// The sample at one position of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Epoch over the mixed sources.
    pub epoch: u64,
    /// Number of earlier visits of this sample.
    pub turn: u64,
    /// Index of the source.
    pub source: usize,
    /// Index of the sample in its source.
    pub sample: u64,
}

/// The order in which samples are shown.
///
/// An epoch contains `round(weight · n)` samples of each source, mixed. Each source has its own permutations, which
/// continue across epochs: with any weight, every sample is visited once before any is visited again.
#[derive(Debug, Clone)]
pub struct Sampler {
    seed: u64,
    purpose: String,
    sources: Vec<Share>,
    epoch_length: u64,
    streams: Option<Streams>,
}

/// What an epoch shows of one source.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// Number of samples of the source.
    pub samples: u64,
    /// Number of samples that an epoch shows.
    pub shown: u64,
}

impl Sampler {
    /// The order for sources given as (samples, weight). `purpose` distinguishes the streams of one run.
    pub fn new(seed: u64, purpose: &str, sources: &[(u64, f64)]) -> Self {
        let share = |&(samples, weight): &(u64, f64)| {
            // The bound keeps the sum over all sources in range for any weights.
            let wanted = ((samples as f64 * weight).round() as u64).min(1 << 48);
            Share { samples, shown: if samples == 0 || weight <= 0.0 { 0 } else { wanted.max(1) } }
        };
        let sources: Vec<Share> = sources.iter().map(share).collect();
        let epoch_length = sources.iter().map(|share| share.shown).sum();
        Self { seed, purpose: purpose.to_owned(), sources, epoch_length, streams: None }
    }

    /// The order for reading shards from their start to their end ([`Streams`]): position p belongs to stream `p % streams`,
    /// and `buffer` consecutive samples of a stream are shuffled. `shards` are the numbers of samples of the shards of
    /// each source.
    pub fn streamed(mut self, streams: u64, buffer: u64, shards: Vec<Vec<u64>>) -> Self {
        self.streams = Some(Streams::new(self.seed, &self.purpose, streams, buffer, shards));
        self
    }

    /// Number of samples in an epoch.
    pub fn epoch_length(&self) -> u64 {
        self.epoch_length
    }

    /// The sample at `position`; `None` if there are no samples.
    pub fn at(&self, position: u64) -> Option<Draw> {
        let epoch = position.checked_div(self.epoch_length)?;
        if let Some(streams) = &self.streams {
            return streams.at(epoch, position % self.epoch_length, self.epoch_length, &self.sources);
        }
        let mix = Permutation::new(self.epoch_length, self.seed, &format!("{} mix", self.purpose), epoch);
        let mut slot = mix.at(position % self.epoch_length);
        for (source, share) in self.sources.iter().enumerate() {
            if slot < share.shown {
                let nth = epoch * share.shown + slot;
                let turn = nth / share.samples;
                let order = format!("{} source {source}", self.purpose);
                let sample = Permutation::new(share.samples, self.seed, &order, turn).at(nth % share.samples);
                return Some(Draw { epoch, turn, source, sample });
            }
            slot -= share.shown;
        }
        None
    }

    /// The replacement of a bad sample: a keyed choice from the same source.
    pub fn replacement(&self, position: u64, attempt: u64, bad: Draw) -> Draw {
        let mut random = Random::keyed(self.seed, &format!("{} replacement", self.purpose), position, attempt);
        let samples = self.sources.get(bad.source).map_or(1, |share| share.samples);
        Draw { sample: random.below(samples.max(1)), ..bad }
    }

    /// The index of the caption to use, of `count` captions.
    pub fn caption(&self, draw: Draw, count: usize) -> usize {
        let purpose = format!("{} caption {}", self.purpose, draw.source);
        Random::keyed(self.seed, &purpose, draw.turn, draw.sample).below(count.max(1) as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn a_permutation_is_a_bijection() {
        for n in (1..70).chain([1000, 4097]) {
            let order = Permutation::new(n, 3, "test", 0);
            let hit: BTreeSet<u64> = (0..n).map(|i| order.at(i)).collect();
            assert!(hit.len() as u64 == n && hit.last() == Some(&(n - 1)), "{n}");
        }
    }

    #[test]
    fn a_permutation_shuffles() {
        let n = 10_000;
        let of = |step| Permutation::new(n, 3, "test", step);
        let fixed = (0..n).filter(|i| of(0).at(*i) == *i).count();
        let same = (0..n).filter(|i| of(0).at(*i) == of(1).at(*i)).count();
        let neighbours = (1..n).filter(|i| of(0).at(*i).abs_diff(of(0).at(i - 1)) < 10).count();
        // All three are about Poisson with means 1, 1 and 19.
        assert!(fixed < 8 && same < 8 && neighbours < 50, "{fixed} {same} {neighbours}");
    }

    #[test]
    fn an_epoch_visits_each_sample_once() {
        let sampler = Sampler::new(1, "train", &[(100, 1.0), (7, 1.0)]);
        for epoch in 0..3 {
            let draws: Vec<Draw> = (0..107).map(|i| sampler.at(epoch * 107 + i).unwrap()).collect();
            let shown: BTreeSet<_> = draws.iter().map(|d| (d.source, d.sample)).collect();
            assert_eq!(shown.len(), 107);
            assert!(draws.iter().all(|d| d.epoch == epoch && d.turn == epoch));
        }
    }

    #[test]
    fn weights_hold_and_every_sample_is_visited() {
        let sampler = Sampler::new(1, "train", &[(100, 0.25), (10, 2.0), (9, 0.0)]);
        assert_eq!(sampler.epoch_length(), 45);
        let mut count = BTreeMap::<(usize, u64), u64>::new();
        for position in 0..4 * 45 {
            let draw = sampler.at(position).unwrap();
            *count.entry((draw.source, draw.sample)).or_default() += 1;
        }
        assert!((0..100).all(|sample| count[&(0, sample)] == 1));
        assert!((0..10).all(|sample| count[&(1, sample)] == 8));
        assert_eq!(count.len(), 110);
    }

    #[test]
    fn streams_are_independent() {
        let of = |seed, purpose| Sampler::new(seed, purpose, &[(1000, 1.0)]).at(5).unwrap().sample;
        assert_eq!(of(1, "a"), of(1, "a"));
        assert!(of(1, "a") != of(1, "b") && of(1, "a") != of(2, "a"));
    }

    #[test]
    fn no_samples_give_no_draw() {
        assert_eq!(Sampler::new(1, "train", &[(0, 1.0)]).at(0), None);
    }
}
