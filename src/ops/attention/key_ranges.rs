//! The keys that each query of a batch attends to, as a few runs per query.

use super::blocks::{Biases, Blocks};
use crate::error::{Result, ensure};
use candle_core::DeviceLocation;
use std::{
    ops::Range,
    sync::{Arc, Mutex, OnceLock},
};

/// The key positions `start`, `start + stride`, …; `len` positions in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub start: usize,
    pub len: usize,
    pub stride: usize,
}

/// The image codes among the positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Codes {
    /// Their positions, in raster order from the start of the grid; the last codes may be missing.
    pub positions: Range<usize>,
    /// Width of the grid.
    pub width: usize,
}

/// The keys that each query attends to, the same for all samples but for the padding of their source texts.
#[derive(Debug)]
pub struct KeyLists {
    /// The runs of query q are `runs[offsets[q]..offsets[q + 1]]`; no key may be listed twice.
    pub offsets: Vec<usize>,
    pub runs: Vec<Run>,
    /// Positions of the source text with its padding.
    pub text: Range<usize>,
    /// The image codes, for [`blockwise`](super::blockwise).
    pub codes: Option<Codes>,
    /// Of each device that has used the lists: ranks of one process share them.
    pub(super) blocks: Mutex<Vec<(DeviceLocation, Arc<Blocks>)>>,
}

/// The keys that each query of a batch attends to.
#[derive(Debug)]
pub struct KeyRanges {
    pub lists: Arc<KeyLists>,
    /// Number of used positions of the source text for each sample; no query attends to the rest. `None`: all are used.
    pub text_lengths: Option<Vec<usize>>,
    pub(super) biases: OnceLock<Biases>,
}

impl KeyLists {
    pub fn new(offsets: Vec<usize>, runs: Vec<Run>, text: Range<usize>, codes: Option<Codes>) -> Self {
        Self { offsets, runs, text, codes, blocks: Mutex::default() }
    }

    /// All keys for each of `positions` queries; all positions are of one source text.
    pub fn dense(positions: usize) -> Self {
        let runs = vec![Run { start: 0, len: positions, stride: 1 }; positions];
        Self::new((0..=positions).collect(), runs, 0..positions, None)
    }

    /// The runs of a query.
    pub fn runs_of(&self, query: usize) -> &[Run] {
        &self.runs[self.offsets[query]..self.offsets[query + 1]]
    }

    /// The keys of a query, those in padding included.
    pub(super) fn keys_of(&self, query: usize) -> impl Iterator<Item = usize> + '_ {
        self.runs_of(query).iter().flat_map(|run| (0..run.len).map(|i| run.start + i * run.stride))
    }
}

impl KeyRanges {
    pub fn new(lists: Arc<KeyLists>, text_lengths: Option<Vec<usize>>) -> Self {
        Self { lists, text_lengths, biases: OnceLock::new() }
    }

    /// Positions of padding in a sample.
    pub(super) fn padding(&self, sample: usize) -> Range<usize> {
        match &self.text_lengths {
            Some(lengths) => {
                let text = &self.lists.text;
                (text.start + lengths[sample]).min(text.end)..text.end
            }
            None => 0..0,
        }
    }

    /// Writes the positions that a query of a sample attends to to `keys`.
    #[inline(always)]
    pub(super) fn list(&self, padding: &Range<usize>, query: usize, keys: &mut Vec<usize>) {
        keys.clear();
        for run in self.lists.runs_of(query) {
            let mut key = run.start;
            for _ in 0..run.len {
                if key < padding.start || key >= padding.end {
                    keys.push(key);
                }
                key += run.stride;
            }
        }
    }

    /// Checks that the lists match a batch of `samples` with `positions` each.
    ///
    /// # Errors
    /// They do not match.
    pub fn check(&self, samples: usize, positions: usize) -> Result<()> {
        let lists = &self.lists;
        let last = lists.runs.iter().filter(|run| run.len > 0).map(|run| run.start + (run.len - 1) * run.stride).max();
        ensure!(
            lists.offsets.len() == positions + 1
                && lists.offsets.is_sorted()
                && lists.offsets[positions] <= lists.runs.len()
                && last.is_none_or(|last| last < positions),
            "attention: the key ranges are not for {positions} positions"
        );
        let lengths = self.text_lengths.as_ref().map_or(samples, Vec::len);
        ensure!(lengths == samples, "attention: {lengths} text lengths for {samples} samples");
        Ok(())
    }

    /// Mask (samples, queries, keys) u8: 1 where a query attends to a key. Only for the reference implementation.
    pub(super) fn mask(&self, samples: usize, positions: usize) -> Vec<u8> {
        let mut mask = vec![0; samples * positions * positions];
        let mut keys = Vec::new();
        for (row, mask) in mask.chunks_exact_mut(positions.max(1)).enumerate() {
            self.list(&self.padding(row / positions), row % positions, &mut keys);
            keys.iter().for_each(|&key| mask[key] = 1);
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, because fused and composed attention both read these lists and cannot check each other here.
    #[test]
    fn padding_ends_where_the_text_ends() {
        let runs = vec![Run { start: 0, len: 6, stride: 1 }, Run { start: 0, len: 3, stride: 2 }];
        let text_lengths = Some(vec![1, 3, 9]);
        let keys = KeyRanges::new(Arc::new(KeyLists::new(vec![0, 1, 2, 2], runs, 1..4, None)), text_lengths);
        let list = |sample, query| {
            let mut list = vec![99];
            keys.list(&keys.padding(sample), query, &mut list);
            list
        };
        assert_eq!(list(0, 0), [0, 1, 4, 5]);
        assert_eq!(list(0, 1), [0, 4]);
        assert_eq!(list(1, 0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(list(2, 1), [0, 2, 4], "a length behind the text hides nothing else");
        assert!(list(0, 2).is_empty());
    }
}
