//! KV cache for a batch of sequences, on plain slices.
//!
//! A source is cached once for all sequences that continue from it. Only target positions are cached per sequence, in
//! the slots defined by [`cache`](super::cache).

use super::{
    cache::{Place, slot_of, slots},
    pattern::{Grid, Pattern},
};
use crate::ops::cached_attention::Part;

/// Keys and values (blocks, heads, slots, d). A block belongs to a source or a sequence.
pub struct Blocks {
    keys: Vec<f32>,
    values: Vec<f32>,
    heads: usize,
    slots: usize,
    d: usize,
}

impl Blocks {
    /// A cache filled with zeros.
    pub fn new(blocks: usize, heads: usize, slots: usize, d: usize) -> Self {
        let len = blocks * heads * slots * d;
        Self { keys: vec![0.0; len], values: vec![0.0; len], heads, slots, d }
    }

    fn start(&self, block: usize, head: usize, slot: usize) -> usize {
        ((block * self.heads + head) * self.slots + slot) * self.d
    }

    /// Writes the key and the value (heads, d) of a position to a slot.
    pub fn write(&mut self, block: usize, slot: usize, key: &[f32], value: &[f32]) {
        for head in 0..self.heads {
            let (start, of_head) = (self.start(block, head, slot), head * self.d..(head + 1) * self.d);
            self.keys[start..start + self.d].copy_from_slice(&key[of_head.clone()]);
            self.values[start..start + self.d].copy_from_slice(&value[of_head]);
        }
    }

    /// The keys, values and slots of a block that a head attends to.
    pub fn part<'a>(&'a self, block: usize, head: usize, slots: &'a [u32]) -> Part<'a, f32> {
        let range = self.start(block, head, 0)..self.start(block, head, self.slots);
        Part { keys: &self.keys[range.clone()], values: &self.values[range], slots }
    }

    /// Copies the first `used` slots of block `from` to block `to`.
    pub fn copy(&mut self, from: usize, to: usize, used: usize) {
        for head in 0..self.heads {
            let (to, from) = (self.start(to, head, 0), self.start(from, head, 0));
            self.keys.copy_within(from..from + used * self.d, to);
            self.values.copy_within(from..from + used * self.d, to);
        }
    }

    /// Grows the cache to at least this number of blocks.
    pub fn grow(&mut self, blocks: usize) {
        let len = self.keys.len().max(blocks * self.heads * self.slots * self.d);
        self.keys.resize(len, 0.0);
        self.values.resize(len, 0.0);
    }
}

/// The slots of a sequence's target positions: first those visible to all later positions, then those of image codes.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    pub dense: usize,
    pub image: Option<(Pattern, Grid)>,
}

impl Own {
    /// Number of slots.
    pub fn count(&self) -> usize {
        self.dense + self.image.map_or(0, |(pattern, grid)| slots(pattern, grid))
    }

    /// Number of slots that the first `fed` positions may have written.
    pub fn used(&self, fed: usize) -> usize {
        if fed > self.dense { self.count() } else { fed }
    }

    /// Appends the slots that the newest position of a sequence attends to (its own included) to `seen`, and returns its
    /// own slot. `fed` positions precede it.
    pub fn see(&self, place: Place, fed: usize, seen: &mut Vec<u32>) -> usize {
        match (place, self.image) {
            (Place::Image(code), Some((pattern, grid))) => {
                let slot = |code| self.dense + slot_of(pattern, grid, code);
                seen.extend(0..self.dense as u32);
                pattern.runs(grid, true, code, |start, len, stride| {
                    seen.extend((0..len).map(|i| slot(start + i * stride) as u32));
                });
                slot(code)
            }
            _ => {
                seen.extend(0..=fed as u32);
                fed
            }
        }
    }
}

/// The blocks of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub source: usize,
    /// The block of its target positions.
    pub block: usize,
}

/// The blocks owned by each sequence. Continuing from another sequence needs a copy only if several sequences continue
/// from it.
#[derive(Debug)]
pub struct Lineage {
    rows: Vec<Row>,
    blocks: usize,
}

impl Lineage {
    /// Starts with one sequence per source.
    pub fn new(sources: usize) -> Self {
        Self { rows: (0..sources).map(|i| Row { source: i, block: i }).collect(), blocks: sources }
    }

    /// The blocks of each sequence.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Number of blocks used by any sequence so far.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// A block that no sequence has, neither for its source nor for its target.
    pub fn free_block(&self) -> usize {
        let is_free = |block: &usize| self.rows.iter().all(|row| row.block != *block && row.source != *block);
        (0..).find(is_free).unwrap_or_default()
    }

    /// Appends a sequence that has `block` for its source and for its target.
    pub fn join(&mut self, block: usize) {
        self.rows.push(Row { source: block, block });
        self.blocks = self.blocks.max(block + 1);
    }

    /// Replaces sequence `i` by a copy of the old sequence `index[i]`. Returns the blocks to copy as (from, to); no
    /// block is both source and destination.
    pub fn reorder(&mut self, index: &[usize]) -> Vec<(usize, usize)> {
        let parents: Vec<Row> = index.iter().map(|&i| self.rows[i]).collect();
        let mut taken = vec![false; self.blocks];
        let first: Vec<bool> = parents.iter().map(|p| !std::mem::replace(&mut taken[p.block], true)).collect();
        let mut free = (0..).filter(|&block| !taken.get(block).copied().unwrap_or(false));
        let mut copies = Vec::new();
        self.rows.clear();
        for (parent, first) in parents.into_iter().zip(first) {
            let block = if first { parent.block } else { free.next().unwrap_or(0) };
            if !first {
                copies.push((parent.block, block));
            }
            self.rows.push(Row { block, ..parent });
        }
        self.blocks = self.rows.iter().map(|row| row.block + 1).fold(self.blocks, usize::max);
        copies
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// A random search, compared with one that copies everything.
    #[test]
    fn lineages_follow_their_sequences() {
        let mut random = Random::keyed(1, "lineage", 0, 0);
        let (mut lineage, mut blocks) = (Lineage::new(3), vec![vec![0], vec![1], vec![2]]);
        let mut expected = blocks.clone();
        for step in 0..200 {
            let count = 1 + random.below(6) as usize;
            let index: Vec<usize> = (0..count).map(|_| random.below(expected.len() as u64) as usize).collect();
            let copies = lineage.reorder(&index);
            blocks.resize(lineage.blocks(), Vec::new());
            copies.iter().for_each(|&(from, to)| blocks[to] = blocks[from].clone());
            expected = index.iter().map(|&i| expected[i].clone()).collect();
            for (i, (row, expected)) in lineage.rows().iter().zip(&mut expected).enumerate() {
                blocks[row.block].push(10 * step + i);
                expected.push(10 * step + i);
                assert!(row.source == expected[0] && blocks[row.block] == *expected);
            }
        }
        assert!(lineage.blocks() <= 6 + 3, "{} blocks for at most 6 sequences", lineage.blocks());
        assert!(Lineage::new(4).reorder(&[3, 1, 0]).is_empty(), "nothing to copy");
    }

    #[test]
    fn a_sequence_that_joins_takes_a_block_that_is_free() {
        let mut lineage = Lineage::new(0);
        for block in 0..3 {
            assert_eq!(lineage.free_block(), block);
            lineage.join(block);
        }
        assert!(lineage.reorder(&[0, 2]).is_empty(), "leaving copies nothing");
        assert_eq!(lineage.free_block(), 1);
        lineage.join(1);
        assert_eq!(lineage.rows().iter().map(|row| row.block).collect::<Vec<_>>(), [0, 2, 1]);
        assert!(lineage.reorder(&[]).is_empty() && lineage.free_block() == 0 && lineage.blocks() == 3);
    }

    #[test]
    fn only_used_slots_are_copied() {
        let mut blocks = Blocks::new(1, 2, 3, 1);
        for slot in 0..3 {
            blocks.write(0, slot, &[slot as f32, 10.0 + slot as f32], &[20.0, 30.0 + slot as f32]);
        }
        blocks.grow(2);
        blocks.copy(0, 1, 2);
        let part = blocks.part(1, 1, &[]);
        assert_eq!((part.keys, part.values), (&[10.0, 11.0, 0.0][..], &[30.0, 31.0, 0.0][..]));
    }
}
