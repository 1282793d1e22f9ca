//! Decoding on the CPU: one pass over packed weights for each token, on plain slices without tensors.
//!
//! A step runs for each layer: LayerNorm, the projection to queries, keys and values, attention over the KV cache, the
//! output projection added to the residual stream, LayerNorm, and the MLP added to it; then the head. All buffers are
//! reused. The result of a sequence depends, bit for bit, neither on the other sequences nor on the number of threads.

use super::{
    Source,
    input::{Input, Next, place},
    packed::{PackedGenerator, PackedLayer, Table, Workspace},
};
use crate::{
    error::Result,
    model::sequence::{Layout, Modality, Slot},
    nn::{
        pattern::{Grid, Pattern},
        slot_cache::{Blocks, Lineage, Own, Row},
    },
    ops::cached_attention::{Part, attend},
};
use rayon::prelude::*;
use std::ops::Range;

/// Number of source positions that go through the layers together, unless a single source is longer.
const PREFILL_ROWS: usize = 256;

/// Maximum number of parts that attention is split into, and multiply-adds below which a part does not pay for a
/// thread.
const PARTS: usize = 16;
const PART_WORK: usize = 1 << 16;

/// The KV cache of one layer.
struct Cache {
    sources: Blocks,
    own: Blocks,
    slots: Own,
}

/// A batch of sequences that are being decoded. In the cache the codes of a source come first, in any order of its
/// spans, so that the slot of a code is its position in the grid.
pub struct Fused<'g> {
    weights: &'g PackedGenerator,
    grid: Grid,
    target: Modality,
    /// Number of codes of each source.
    codes: usize,
    caches: Vec<Cache>,
    lineage: Lineage,
    /// Number of tokens of each source, codes and text together.
    lengths: Vec<usize>,
    /// 0, 1, 2 … up to the length of the longest source.
    all: Vec<u32>,
    /// Slots that the newest position of each sequence attends to in the current layer.
    seen: Vec<u32>,
    /// Where those of each sequence are.
    lists: Vec<Range<usize>>,
    workspace: Workspace,
}

impl<'g> Fused<'g> {
    /// Prefill: runs the sources through all layers. They must match `layout`.
    pub fn new(weights: &'g PackedGenerator, layout: &Layout, source: &Source) -> Result<Self> {
        let (grid, target, longest) = (layout.grid(), layout.target().modality, layout.source_positions());
        let codes = if source.of(Modality::Image).is_empty() { 0 } else { grid.len() };
        let text = |row: usize| source.of(Modality::Text).get(row).map_or(0, Vec::len);
        let d = weights.hidden() / weights.heads;
        let cache = |layer: &PackedLayer| {
            let slots = match target {
                Modality::Image => Own { dense: 1, image: Some((layer.pattern, grid)) },
                Modality::Text => Own { dense: layout.target_positions(), image: None },
            };
            let blocks = |slots| Blocks::new(source.rows(), weights.heads, slots, d);
            Cache { sources: blocks(longest), own: blocks(slots.count()), slots }
        };
        let mut state = Self {
            weights,
            grid,
            target,
            codes,
            caches: weights.layers.iter().map(cache).collect(),
            lineage: Lineage::new(source.rows()),
            all: (0..longest as u32).collect(),
            lengths: (0..source.rows()).map(|row| codes + text(row)).collect(),
            seen: Vec::new(),
            lists: Vec::new(),
            workspace: Workspace::default(),
        };
        let together = (PREFILL_ROWS / longest.max(1)).max(1);
        for first in (0..source.rows()).step_by(together) {
            state.read(source, first..source.rows().min(first + together))?;
        }
        Ok(state)
    }

    /// Runs the sources `rows` through all layers.
    fn read(&mut self, source: &Source, rows: Range<usize>) -> Result<()> {
        let positions: Vec<(usize, usize)> =
            rows.clone().flat_map(|row| (0..self.lengths[row]).map(move |slot| (row, slot))).collect();
        let of_row =
            |row: usize| [Modality::Image, Modality::Text].into_iter().filter_map(move |m| source.of(m).get(row));
        self.read_tokens(&positions, rows.flat_map(of_row).flatten())
    }

    /// Runs tokens of sources through all layers; `positions` has the source of each and its slot in there.
    fn read_tokens<'t>(&mut self, positions: &[(usize, usize)], tokens: impl Iterator<Item = &'t u32>) -> Result<()> {
        let hidden = self.weights.hidden();
        self.workspace.fit(positions.len(), hidden);
        for ((x, &token), &(_, slot)) in self.workspace.x.chunks_exact_mut(hidden).zip(tokens).zip(positions) {
            let slot = slot.checked_sub(self.codes).map_or(Slot::Image(slot), Slot::Text);
            embed(self.weights, x, self.grid, slot, token)?;
        }
        rayon::scope(|_| self.read_layers(positions));
        Ok(())
    }

    /// Prefill of one more sequence, whose only source is `text`.
    pub fn join(&mut self, text: &[u32]) -> Result<()> {
        let block = self.lineage.free_block();
        self.lengths.resize(self.lengths.len().max(block + 1), 0);
        self.lengths[block] = text.len();
        for cache in &mut self.caches {
            cache.sources.grow(block + 1);
            cache.own.grow(block + 1);
        }
        let positions: Vec<(usize, usize)> = (0..text.len()).map(|slot| (block, slot)).collect();
        self.read_tokens(&positions, text.iter())?;
        self.lineage.join(block);
        Ok(())
    }

    fn read_layers(&mut self, positions: &[(usize, usize)]) {
        let Self { weights, grid, codes, caches, lengths, all, workspace, .. } = self;
        let (hidden, heads) = (weights.hidden(), weights.heads);
        let d = hidden / heads;
        for (i, (layer, cache)) in weights.layers.iter().zip(caches).enumerate() {
            layer.qkv(workspace);
            for (&(source, position), qkv) in positions.iter().zip(workspace.qkv.chunks_exact(3 * hidden)) {
                cache.sources.write(source, position, &qkv[hidden..2 * hidden], &qkv[2 * hidden..]);
            }
            if i + 1 == weights.layers.len() {
                break; // the last layer's output at source positions is never used
            }
            let lists = if *codes > 0 { neighbours(layer.pattern, *grid) } else { Vec::new() };
            let sources = &cache.sources;
            for_each_head(workspace, all.len(), d, |unit, out, qkv, scores| {
                let ((source, slot), head) = (positions[unit / heads], unit % heads);
                // Codes attend to codes by the layer's pattern; all other attention is dense.
                let (listed, dense) = match lists.get(slot) {
                    Some(list) => (list.as_slice(), &all[*codes..lengths[source]]),
                    None => (&all[..lengths[source]], &[][..]),
                };
                let parts: [Part<f32>; 2] = [listed, dense].map(|slots| sources.part(source, head, slots));
                let q = &qkv[unit / heads * 3 * hidden + head * d..][..d];
                attend(out, q, parts, scores);
            });
            layer.finish(workspace);
        }
    }

    /// Decodes one more position of each sequence after `fed` positions; returns the logits (sequences, vocabulary).
    pub fn step(&mut self, input: Input, fed: usize) -> Result<&mut [f32]> {
        let next = |row| Ok(Next { slot: input.slot, fed, token: input.token(row)? });
        let next = (0..self.lineage.rows().len()).map(next).collect::<Result<Vec<_>>>()?;
        self.step_each(&next)
    }

    /// Decodes one more position of each sequence, each at a position of its own; returns the logits (sequences,
    /// vocabulary).
    pub fn step_each(&mut self, next: &[Next]) -> Result<&mut [f32]> {
        let weights = self.weights;
        self.workspace.fit(next.len(), weights.hidden());
        for (x, next) in self.workspace.x.chunks_exact_mut(weights.hidden()).zip(next) {
            embed(weights, x, self.grid, next.slot, next.token)?;
        }
        rayon::scope(|_| self.step_layers(next));
        Ok(&mut self.workspace.logits)
    }

    fn step_layers(&mut self, next: &[Next]) {
        let Self { weights, target, caches, lineage, lengths, all, seen, lists, workspace, .. } = self;
        let (hidden, heads, rows) = (weights.hidden(), weights.heads, lineage.rows());
        let d = hidden / heads;
        for (layer, cache) in weights.layers.iter().zip(caches) {
            layer.qkv(workspace);
            seen.clear();
            lists.clear();
            let (mut slot, mut before) = (0, None);
            for ((row, next), qkv) in rows.iter().zip(next).zip(workspace.qkv.chunks_exact(3 * hidden)) {
                // Neighbors at the same position share the list.
                if before != Some((next.slot, next.fed)) {
                    let start = seen.len();
                    slot = cache.slots.see(place(next.slot), next.fed, seen);
                    lists.push(start..seen.len());
                    before = Some((next.slot, next.fed));
                } else {
                    lists.extend(lists.last().cloned());
                }
                cache.own.write(row.block, slot, &qkv[hidden..2 * hidden], &qkv[2 * hidden..]);
            }
            let (cache, seen, lists) = (&*cache, &*seen, &*lists);
            let longest = lists.iter().map(Range::len).max().unwrap_or(0);
            for_each_head(workspace, all.len() + longest, d, |unit, out, qkv, scores| {
                let (Row { source, block }, head) = (rows[unit / heads], unit % heads);
                let before = cache.sources.part(source, head, &all[..lengths[source]]);
                let own = cache.own.part(block, head, &seen[lists[unit / heads].clone()]);
                attend(out, &qkv[unit / heads * 3 * hidden + head * d..][..d], [before, own], scores);
            });
            layer.finish(workspace);
        }
        weights.logits(workspace, *target);
    }

    /// Replaces sequence `i` by a copy of the old sequence `index[i]`, of which `fed` positions are decoded.
    pub fn reorder(&mut self, index: &[usize], fed: usize) {
        let copies = self.lineage.reorder(index);
        for cache in &mut self.caches {
            cache.own.grow(self.lineage.blocks());
            copies.iter().for_each(|&(from, to)| cache.own.copy(from, to, cache.slots.used(fed)));
        }
    }
}

/// Computes `workspace.attended`, one head of one row at a time: `one(unit, out, qkv, scores)`, where `scores` is a
/// buffer for the scores of `keys` keys.
fn for_each_head(
    workspace: &mut Workspace,
    keys: usize,
    d: usize,
    one: impl Fn(usize, &mut [f32], &[f32], &mut [f32]) + Sync,
) {
    let Workspace { attended, qkv, scores, .. } = workspace;
    let vectors = attended.len() / d;
    let part = vectors.div_ceil(PARTS).max(PART_WORK.div_ceil(2 * keys * d));
    scores.resize(scores.len().max(vectors.div_ceil(part) * keys), 0.0);
    let parts = attended.par_chunks_mut(part * d).zip(scores.par_chunks_mut(keys)).enumerate();
    parts.for_each(|(i, (out, scores))| {
        for (n, out) in out.chunks_exact_mut(d).enumerate() {
            one(i * part + n, out, qkv, scores);
        }
    });
}

/// For each code of a full image, the codes that it attends to.
fn neighbours(pattern: Pattern, grid: Grid) -> Vec<Vec<u32>> {
    let list = |query| {
        let mut list = Vec::new();
        pattern.runs(grid, false, query, |start, len, stride| {
            list.extend((0..len).map(|i| (start + i * stride) as u32));
        });
        list
    };
    (0..grid.len()).map(list).collect()
}

/// `x` (hidden) = the sum of token embedding and position embedding.
fn embed(weights: &PackedGenerator, x: &mut [f32], grid: Grid, slot: Slot, token: u32) -> Result<()> {
    let token = token as usize;
    match slot {
        Slot::Start => x.copy_from_slice(&weights.image_start),
        Slot::Text(position) => sum(x, [(&weights.text, token), (&weights.text_position, position)])?,
        Slot::Image(place) => {
            let (row, column) = (place / grid.width, place % grid.width);
            sum(x, [(&weights.image, token), (&weights.image_row, row), (&weights.image_column, column)])?;
        }
    }
    Ok(())
}

fn sum<const N: usize>(x: &mut [f32], rows: [(&Table, usize); N]) -> Result<()> {
    x.fill(0.0);
    for (table, row) in rows {
        x.iter_mut().zip(table.row(row)?).for_each(|(x, value)| *x += value);
    }
    Ok(())
}
