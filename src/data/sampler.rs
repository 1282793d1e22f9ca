//! The order of samples as a pure function of (seed, purpose, position). Only the position is stored, so any point of a
//! run can be reached again directly.

use super::{
    order::{Draw, Permutation, Share},
    streams::Streams,
};
use crate::random::Random;

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
        let order = Permutation::new(self.epoch_length, self.seed, &format!("{} mix", self.purpose), epoch);
        let mut slot = order.at(position % self.epoch_length);
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
