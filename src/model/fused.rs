//! Decoding on the CPU: one pass over packed weights and plain slices a token, without tensors.
//!
//! A step is, layer by layer: LayerNorm, queries with keys and values, attention over the cache, projection onto the
//! residual stream, LayerNorm, the MLP onto it; then the head. All buffers are kept. A sequence's bits depend neither on the
//! sequences beside it nor on the number of threads.

use super::{
    decode::{Input, Source},
    packed::{PackedGenerator, PackedLayer, Room, Table},
    sequence::{Direction, Layout},
};
use crate::{
    error::{Result, ensure},
    nn::{
        pattern::{Grid, Pattern},
        slot_cache::{Blocks, Lineage, Own, Row},
    },
    ops::cached_attention::{Part, attend},
};
use rayon::prelude::*;

/// Source positions that go through the layers together, if one source is no longer.
const PREFILL_ROWS: usize = 256;

/// Parts that attention is cut into at most, and multiply-adds below which a part is not worth a thread.
const PARTS: usize = 16;
const PART_WORK: usize = 1 << 16;

/// What a layer remembers.
struct Cache {
    sources: Blocks,
    own: Blocks,
    slots: Own,
}

/// Sequences on the way.
pub struct Fused<'g> {
    weights: &'g PackedGenerator,
    layout: Layout,
    caches: Vec<Cache>,
    lineage: Lineage,
    /// Positions of each source.
    lengths: Vec<usize>,
    /// 0, 1, 2 … as long as the longest source.
    all: Vec<u32>,
    /// Slots that the newest position sees in the layer at hand.
    seen: Vec<u32>,
    room: Room,
}

impl<'g> Fused<'g> {
    /// Reads the sources.
    pub fn new(weights: &'g PackedGenerator, layout: Layout, source: Source) -> Result<Self> {
        let (sources, longest) = match source {
            Source::Text(rows) => (rows, layout.text),
            Source::Image { codes, .. } => (codes, layout.grid.len()),
        };
        let lengths: Vec<usize> = sources.iter().map(Vec::len).collect();
        let fits = |&length: &usize| match layout.direction {
            Direction::TextToImage => (1..=longest).contains(&length),
            Direction::ImageToText => length == longest,
        };
        ensure!(lengths.iter().all(fits), "a source of {longest} positions cannot have {lengths:?}");
        let d = weights.hidden() / weights.heads;
        let cache = |layer: &PackedLayer| {
            let slots = match layout.direction {
                Direction::TextToImage => Own { dense: 1, image: Some((layer.pattern, layout.grid)) },
                Direction::ImageToText => Own { dense: layout.target(), image: None },
            };
            let blocks = |slots| Blocks::new(sources.len(), weights.heads, slots, d);
            Cache { sources: blocks(longest), own: blocks(slots.count()), slots }
        };
        let mut state = Self {
            weights,
            layout,
            caches: weights.layers.iter().map(cache).collect(),
            lineage: Lineage::new(sources.len()),
            all: (0..longest as u32).collect(),
            lengths,
            seen: Vec::new(),
            room: Room::default(),
        };
        let together = (PREFILL_ROWS / longest.max(1)).max(1);
        for first in (0..sources.len()).step_by(together) {
            let last = (first + together).min(sources.len());
            state.read(first, &sources[first..last])?;
        }
        Ok(state)
    }

    /// Reads a few sources, of which the first is source `first`.
    fn read(&mut self, first: usize, sources: &[Vec<u32>]) -> Result<()> {
        let (weights, layout) = (self.weights, self.layout);
        let hidden = weights.hidden();
        let positions = sources.iter().enumerate().flat_map(|(i, s)| (0..s.len()).map(move |p| (first + i, p)));
        let positions: Vec<(usize, usize)> = positions.collect();
        self.room.fit(positions.len(), hidden);
        let tokens = sources.iter().flatten().zip(&positions);
        for (x, (&token, &(_, position))) in self.room.x.chunks_exact_mut(hidden).zip(tokens) {
            match layout.direction {
                Direction::TextToImage => embed_text(weights, x, token, position)?,
                Direction::ImageToText => embed_code(weights, x, layout.grid, token, position)?,
            }
        }
        rayon::scope(|_| self.read_layers(&positions));
        Ok(())
    }

    fn read_layers(&mut self, positions: &[(usize, usize)]) {
        let Self { weights, layout, caches, lengths, all, room, .. } = self;
        let (hidden, heads) = (weights.hidden(), weights.heads);
        let d = hidden / heads;
        for (i, (layer, cache)) in weights.layers.iter().zip(caches).enumerate() {
            layer.qkv(room);
            for (&(source, position), qkv) in positions.iter().zip(room.qkv.chunks_exact(3 * hidden)) {
                cache.sources.write(source, position, &qkv[hidden..2 * hidden], &qkv[2 * hidden..]);
            }
            if i + 1 == weights.layers.len() {
                break; // nobody sees what the last layer makes of a source
            }
            let lists = match layout.direction {
                Direction::TextToImage => Vec::new(),
                Direction::ImageToText => neighbours(layer.pattern, layout.grid),
            };
            let sources = &cache.sources;
            mix(room, all.len(), d, |unit, out, qkv, scores| {
                let (source, position) = positions[unit / heads];
                let slots = lists.get(position).map_or(&all[..lengths[source]], Vec::as_slice);
                let nothing = Part { keys: &[], values: &[], slots: &[] };
                let q = &qkv[unit / heads * 3 * hidden + unit % heads * d..][..d];
                attend(out, q, [sources.part(source, unit % heads, slots), nothing], scores);
            });
            layer.finish(room);
        }
    }

    /// One more position of each sequence, of which `fed` came before; returns the logits (sequences, vocabulary).
    pub fn step(&mut self, input: Input, fed: usize) -> Result<&mut [f32]> {
        let weights = self.weights;
        self.room.fit(self.lineage.rows().len(), weights.hidden());
        for (i, x) in self.room.x.chunks_exact_mut(weights.hidden()).enumerate() {
            match input {
                Input::Start => x.copy_from_slice(&weights.image_start),
                Input::Code(codes, place) => embed_code(weights, x, self.layout.grid, codes[i], place)?,
                Input::Token(tokens, position) => embed_text(weights, x, tokens[i], position)?,
            }
        }
        rayon::scope(|_| self.step_layers(input, fed));
        Ok(&mut self.room.logits)
    }

    fn step_layers(&mut self, input: Input, fed: usize) {
        let Self { weights, layout, caches, lineage, lengths, all, seen, room } = self;
        let (hidden, heads, rows) = (weights.hidden(), weights.heads, lineage.rows());
        let d = hidden / heads;
        for (layer, cache) in weights.layers.iter().zip(caches) {
            layer.qkv(room);
            let slot = cache.slots.see(input.place(), fed, seen);
            for (row, qkv) in rows.iter().zip(room.qkv.chunks_exact(3 * hidden)) {
                cache.own.write(row.block, slot, &qkv[hidden..2 * hidden], &qkv[2 * hidden..]);
            }
            let (cache, seen) = (&*cache, &*seen);
            mix(room, all.len() + seen.len(), d, |unit, out, qkv, scores| {
                let (Row { source, block }, head) = (rows[unit / heads], unit % heads);
                let before = cache.sources.part(source, head, &all[..lengths[source]]);
                let q = &qkv[unit / heads * 3 * hidden + head * d..][..d];
                attend(out, q, [before, cache.own.part(block, head, seen)], scores);
            });
            layer.finish(room);
        }
        weights.logits(room, layout.direction);
    }

    /// Sequence `i` goes on as a copy of what was sequence `index[i]`, of which `fed` positions are there.
    pub fn reorder(&mut self, index: &[usize], fed: usize) {
        let copies = self.lineage.reorder(index);
        for cache in &mut self.caches {
            cache.own.grow(self.lineage.blocks());
            copies.iter().for_each(|&(from, to)| cache.own.copy(from, to, cache.slots.used(fed)));
        }
    }
}

/// `room.mixed`, one head of one row at a time: `one(unit, out, qkv, scores)` with room for the scores of `keys` keys.
fn mix(room: &mut Room, keys: usize, d: usize, one: impl Fn(usize, &mut [f32], &[f32], &mut [f32]) + Sync) {
    let Room { mixed, qkv, scores, .. } = room;
    let units = mixed.len() / d;
    let part = units.div_ceil(PARTS).max(PART_WORK.div_ceil(2 * keys * d));
    scores.resize(scores.len().max(units.div_ceil(part) * keys), 0.0);
    let parts = mixed.par_chunks_mut(part * d).zip(scores.par_chunks_mut(keys)).enumerate();
    parts.for_each(|(i, (out, scores))| {
        for (n, out) in out.chunks_exact_mut(d).enumerate() {
            one(i * part + n, out, qkv, scores);
        }
    });
}

/// Of each code, the codes that it sees within a whole image.
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

/// `x` = the token at a position of the text.
fn embed_text(weights: &PackedGenerator, x: &mut [f32], token: u32, position: usize) -> Result<()> {
    sum(x, [(&weights.text, token as usize), (&weights.text_position, position)])
}

/// `x` = the code at a place of the grid.
fn embed_code(weights: &PackedGenerator, x: &mut [f32], grid: Grid, code: u32, place: usize) -> Result<()> {
    let (row, column) = (place / grid.width, place % grid.width);
    sum(x, [(&weights.image, code as usize), (&weights.image_row, row), (&weights.image_column, column)])
}

fn sum<const N: usize>(x: &mut [f32], rows: [(&Table, usize); N]) -> Result<()> {
    x.fill(0.0);
    for (table, row) in rows {
        x.iter_mut().zip(table.row(row)?).for_each(|(x, value)| *x += value);
    }
    Ok(())
}
