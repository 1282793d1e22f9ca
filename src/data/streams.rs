//! The order for reading shards sequentially. Like the random order, it is a pure function of the position, so that a run
//! can be resumed anywhere and does not depend on the number of ranks and workers.
//!
//! An epoch is laid out as one sequence: the shards of each source in a random order, their samples in the order of
//! storage, and the sources evenly interleaved. The sequence is cut into `streams` parts of equal length, and the samples of
//! a batch come from one part each. A rank therefore reads few shards at a time, each from its start to its end, while a
//! batch has samples of many shards.

use super::order::{Draw, Permutation, Share};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Shard orders that are kept: those of two passes over each of 16 sources.
const KEPT_ORDERS: usize = 32;

/// The streams of all epochs.
#[derive(Debug, Clone)]
pub struct Streams {
    seed: u64,
    purpose: String,
    streams: u64,
    buffer: u64,
    shards: Arc<[Vec<u64>]>,
    orders: Arc<Mutex<Orders>>,
}

/// Shard orders by source and pass.
type Orders = HashMap<(usize, u64), Arc<ShardOrder>>;

/// The shards of a source in the order of one pass.
#[derive(Debug)]
struct ShardOrder {
    /// Number of samples of the pass up to and including each shard.
    ends: Vec<u64>,
    /// Number of the first sample of each shard in its source.
    firsts: Vec<u64>,
}

impl ShardOrder {
    /// `shards` are the numbers of samples of the shards in the order of storage.
    fn new(shards: &[u64], order: &Permutation) -> Self {
        let mut stored = Vec::with_capacity(shards.len());
        let mut first = 0;
        for samples in shards {
            stored.push((first, *samples));
            first += samples;
        }
        let (mut ends, mut firsts, mut end) = (Vec::with_capacity(shards.len()), Vec::with_capacity(shards.len()), 0);
        for index in 0..shards.len() as u64 {
            let (first, samples) = stored.get(order.at(index) as usize).copied().unwrap_or_default();
            end += samples;
            ends.push(end);
            firsts.push(first);
        }
        Self { ends, firsts }
    }

    /// The sample of the source at `index` of the pass.
    fn sample(&self, index: u64) -> Option<u64> {
        let shard = self.ends.partition_point(|end| *end <= index);
        let before = if shard == 0 { 0 } else { *self.ends.get(shard - 1)? };
        Some(self.firsts.get(shard)? + (index - before))
    }
}

impl Streams {
    pub fn new(seed: u64, purpose: &str, streams: u64, buffer: u64, shards: Vec<Vec<u64>>) -> Self {
        let (purpose, streams, buffer) = (purpose.to_owned(), streams.max(1), buffer.max(1));
        Self { seed, purpose, streams, buffer, shards: shards.into(), orders: Arc::default() }
    }

    /// The sample at `position` of an epoch of `length` samples.
    pub fn at(&self, epoch: u64, position: u64, length: u64, shares: &[Share]) -> Option<Draw> {
        let (stream, step) = (position % self.streams, position / self.streams);
        let slot = self.slot(epoch, stream, step, length);
        let (source, index) = interleave(slot, shares)?;
        let share = shares.get(source)?;
        let visit = epoch * share.shown + index;
        let turn = visit.checked_div(share.samples)?;
        let sample = self.order(source, turn)?.sample(visit % share.samples)?;
        Some(Draw { epoch, turn, source, sample })
    }

    /// The slot in the epoch's sequence of the sample `step` of a stream, after shuffling.
    fn slot(&self, epoch: u64, stream: u64, step: u64, length: u64) -> u64 {
        let (each, longer) = (length / self.streams, length % self.streams);
        let first = stream * each + stream.min(longer);
        let in_stream = each + u64::from(stream < longer);
        let window = step / self.buffer * self.buffer;
        let size = self.buffer.min(in_stream - window);
        let purpose = format!("{} stream {epoch} {stream}", self.purpose);
        first + window + Permutation::new(size, self.seed, &purpose, window).at(step - window)
    }

    fn order(&self, source: usize, turn: u64) -> Option<Arc<ShardOrder>> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = orders.get(&(source, turn)) {
            return Some(order.clone());
        }
        let shards = self.shards.get(source)?;
        let purpose = format!("{} shards {source}", self.purpose);
        let order = Permutation::new(shards.len() as u64, self.seed, &purpose, turn);
        let order = Arc::new(ShardOrder::new(shards, &order));
        if orders.len() >= KEPT_ORDERS {
            orders.clear();
        }
        orders.insert((source, turn), order.clone());
        Some(order)
    }
}

/// The source of a slot, and how many earlier slots are of that source. Any part of the sequence has each source in
/// proportion to its share, up to one sample a source.
fn interleave(slot: u64, shares: &[Share]) -> Option<(usize, u64)> {
    let mut total: u64 = shares.iter().map(|share| share.shown).sum();
    // Slots before this one, and before the next one, that belong to the sources looked at so far or to earlier ones.
    let (mut before, mut after) = (slot, slot + 1);
    for (source, share) in shares.iter().enumerate().rev() {
        let rest = total - share.shown;
        let scale = |slots: u64| u128::from(slots) * u128::from(rest) / u128::from(total.max(1));
        let (rest_before, rest_after) = (scale(before) as u64, scale(after) as u64);
        if rest_before == rest_after {
            return Some((source, before - rest_before));
        }
        (before, after, total) = (rest_before, rest_after, rest);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sampler;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn shards(counts: &[&[u64]]) -> Vec<Vec<u64>> {
        counts.iter().map(|counts| counts.to_vec()).collect()
    }

    fn sampler(shards: &[Vec<u64>], weights: &[f64], streams: u64, buffer: u64) -> Sampler {
        let sources: Vec<(u64, f64)> = shards.iter().zip(weights).map(|(s, w)| (s.iter().sum(), *w)).collect();
        Sampler::new(1, "train", &sources).streamed(streams, buffer, shards.to_vec())
    }

    proptest! {
        #[test]
        fn an_epoch_visits_each_sample_once(
            counts in prop::collection::vec(prop::collection::vec(0_u64..20, 1..6), 1..4),
            streams in 1_u64..9,
            buffer in 1_u64..12,
        ) {
            let sampler = sampler(&counts, &[1.0; 4][..counts.len()], streams, buffer);
            let total: u64 = counts.iter().flatten().sum();
            prop_assert_eq!(sampler.epoch_length(), total);
            for epoch in 0..2 {
                let mut seen: Vec<(usize, u64)> = (0..total)
                    .map(|i| sampler.at(epoch * total + i).map(|draw| (draw.source, draw.sample)).unwrap())
                    .collect();
                seen.sort_unstable();
                let all = counts.iter().enumerate();
                let all: Vec<_> = all.flat_map(|(s, c)| (0..c.iter().sum()).map(move |n| (s, n))).collect();
                prop_assert_eq!(seen, all);
            }
        }
    }

    #[test]
    fn weights_hold_over_epochs() {
        let sampler = sampler(&shards(&[&[40, 60], &[10]]), &[0.25, 2.0], 4, 5);
        assert_eq!(sampler.epoch_length(), 45);
        let mut count = BTreeMap::<(usize, u64), u64>::new();
        for position in 0..4 * 45 {
            let draw = sampler.at(position).unwrap();
            *count.entry((draw.source, draw.sample)).or_default() += 1;
        }
        assert!((0..100).all(|sample| count[&(0, sample)] == 1) && (0..10).all(|sample| count[&(1, sample)] == 8));
    }

    #[test]
    fn any_part_of_an_epoch_has_all_sources_in_proportion() {
        let shares: Vec<Share> = [70, 20, 10].map(|shown| Share { samples: shown, shown }).into();
        let sources: Vec<usize> = (0..100).map(|slot| interleave(slot, &shares).unwrap().0).collect();
        for part in sources.chunks(20) {
            let count = |source| part.iter().filter(|other| **other == source).count();
            assert!(count(0).abs_diff(14) <= 1 && count(1).abs_diff(4) <= 1 && count(2).abs_diff(2) <= 1, "{part:?}");
        }
    }

    #[test]
    fn a_stream_reads_shards_from_start_to_end() {
        let sampler = sampler(&shards(&[&[100; 12]]), &[1.0], 4, 1);
        for stream in 0..4 {
            let samples: Vec<u64> = (0..300).map(|step| sampler.at(4 * step + stream).unwrap().sample).collect();
            let jumps = samples.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
            assert!(jumps <= 3, "{jumps}");
        }
        let of = |turn: u64| (0..1200).map(|n| sampler.at(1200 * turn + n).unwrap().sample).collect::<Vec<_>>();
        assert_ne!(of(0), of(1));
    }

    #[test]
    fn a_buffer_shuffles_within_its_length() {
        let sampler = sampler(&shards(&[&[1000]]), &[1.0], 1, 50);
        let samples: Vec<u64> = (0..1000).map(|n| sampler.at(n).unwrap().sample).collect();
        assert!(samples.iter().enumerate().all(|(n, sample)| n as u64 / 50 == sample / 50));
        let in_place = samples.iter().enumerate().filter(|(n, sample)| *n as u64 == **sample).count();
        // Poisson with mean 20.
        assert!(in_place < 50, "{in_place}");
    }
}
