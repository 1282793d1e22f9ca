//! The ops of [`blockwise`](super::blockwise) attention as sizes. A change there wants the same change here.

use super::{
    blocks::{Blocks, Shape},
    grouping::grouped,
    key_ranges::KeyLists,
};
use crate::ops::tape::{Id, Layers, Tape};

/// qkv (samples, positions, 3, heads, d) → (samples, positions, heads · d).
pub fn attention(
    layers: &Layers,
    tape: &mut Tape,
    qkv: Id,
    lists: &KeyLists,
    [samples, positions, heads]: [usize; 3],
) -> Id {
    let blocks = grouped(lists, positions);
    let all = tape.elements(qkv) / 3;
    let sizes = Sizes { rows: (samples * heads) as u64, d: all / (samples * heads * positions).max(1) as u64 };
    let qkv = tape.view(qkv);
    let [q, k, v] = [(); 3].map(|()| {
        let part = tape.narrow(qkv, all);
        let part = tape.view(part);
        tape.copy(part)
    });
    let q = tape.affine(q);
    let (before, behind) = (blocks.codes.start, positions - blocks.codes.end);
    let others = (before + behind > 0).then(|| sizes.others(layers, tape, [q, k, v], &blocks, [before, behind]));
    let mut parts = Vec::new();
    parts.extend(others.filter(|_| before > 0).map(|others| tape.narrow(others, sizes.of(before))));
    if !blocks.codes.is_empty() {
        parts.push(sizes.codes(layers, tape, [q, k, v], &blocks));
    }
    parts.extend(others.filter(|_| behind > 0).map(|others| tape.narrow(others, sizes.of(behind))));
    let joined = tape.cat(&parts);
    let turned = tape.view(joined);
    tape.copy(turned)
}

/// Heads of all samples, and their channels.
struct Sizes {
    rows: u64,
    d: u64,
}

impl Sizes {
    /// Elements of this many positions.
    fn of(&self, positions: usize) -> u64 {
        self.rows * self.d * positions as u64
    }

    /// The positions that are no codes.
    fn others(
        &self,
        layers: &Layers,
        tape: &mut Tape,
        [q, k, v]: [Id; 3],
        blocks: &Blocks,
        [before, behind]: [usize; 2],
    ) -> Id {
        let mut part = |x: Id, positions: usize| tape.narrow(x, self.of(positions));
        let q = match [before, behind] {
            [count, 0] | [0, count] => {
                let q = part(q, count);
                tape.copy(q)
            }
            [before, behind] => {
                let parts = [part(q, before), part(q, behind)];
                tape.cat(&parts)
            }
        };
        let [k, v] = [k, v].map(|x| self.copied(tape, x, blocks.reach));
        let k = tape.view(k);
        let scores = tape.matmul(q, k, self.rows * ((before + behind) * blocks.reach) as u64, self.d);
        let weights = softmax(layers, tape, scores, self.rows * (before + behind) as u64);
        tape.matmul(weights, v, self.of(before + behind), blocks.reach as u64)
    }

    /// Each group of codes against the positions around the image and the keys of its group.
    fn codes(&self, layers: &Layers, tape: &mut Tape, [q, k, v]: [Id; 3], blocks: &Blocks) -> Id {
        let (groups, size) = blocks.groups();
        let (width, around) = (blocks.width(), blocks.around_len());
        let scores_of = |keys: usize| self.rows * (groups * size * keys) as u64;
        let q = self.queries(tape, q, blocks);
        let [keys, values] = [k, v].map(|x| self.keys(tape, x, blocks));
        let (flat, turned) = (tape.view(q), tape.view(keys));
        let mut scores = tape.matmul(flat, turned, scores_of(width), self.d);
        scores = tape.view(scores);
        let ranges = blocks.around.iter().filter(|range| !range.is_empty()).count();
        let of_around = |tape: &mut Tape, x: Id| match ranges {
            1 => self.copied(tape, x, around),
            _ => {
                let parts: Vec<Id> = blocks
                    .around
                    .iter()
                    .filter(|range| !range.is_empty())
                    .map(|range| tape.narrow(x, self.of(range.len())))
                    .collect();
                tape.cat(&parts)
            }
        };
        let values_around = (around > 0).then(|| {
            let [keys, values] = [k, v].map(|x| of_around(tape, x));
            let (flat, keys) = (tape.view(q), tape.view(keys));
            let around = tape.matmul(flat, keys, scores_of(around), self.d);
            let around = tape.view(around);
            scores = tape.cat(&[around, scores]);
            values
        });
        let weights = softmax(layers, tape, scores, self.rows * (groups * size) as u64);
        let own = self.taken(tape, weights, scores_of(width));
        let values = tape.view(values);
        let mut out = tape.matmul(own, values, self.of(groups * size), width as u64);
        out = tape.view(out);
        if let Some(values) = values_around {
            let weights = self.taken(tape, weights, scores_of(around));
            let more = tape.matmul(weights, values, self.of(groups * size), around as u64);
            out = tape.add(out, more);
        }
        if blocks.shape == Shape::Columns {
            let turned = tape.view(out);
            out = tape.copy(turned);
        }
        tape.narrow(out, self.of(blocks.codes.len()))
    }

    /// A part of the weights as a tensor of its own.
    fn taken(&self, tape: &mut Tape, weights: Id, elements: u64) -> Id {
        let part = tape.narrow(weights, elements);
        let part = if part == weights { part } else { tape.copy(part) };
        tape.view(part)
    }

    /// The first positions of x; all of them are x itself.
    fn copied(&self, tape: &mut Tape, x: Id, positions: usize) -> Id {
        let part = tape.narrow(x, self.of(positions));
        if part == x { x } else { tape.copy(part) }
    }

    fn cells(&self, tape: &mut Tape, x: Id, blocks: &Blocks) -> Id {
        let (codes, cells) = (blocks.codes.len(), blocks.grid.0 * blocks.grid.1);
        let part = tape.narrow(x, self.of(codes));
        match cells - codes {
            0 if part == x => x,
            0 => tape.copy(part),
            missing => tape.pad(part, [0, self.of(missing)]),
        }
    }

    fn queries(&self, tape: &mut Tape, x: Id, blocks: &Blocks) -> Id {
        let cells = self.cells(tape, x, blocks);
        let cells = tape.view(cells);
        match blocks.shape {
            Shape::Columns => tape.copy(cells),
            Shape::Band { .. } | Shape::All => cells,
        }
    }

    fn keys(&self, tape: &mut Tape, x: Id, blocks: &Blocks) -> Id {
        let Shape::Band { before, after } = blocks.shape else { return self.queries(tape, x, blocks) };
        let cells = self.cells(tape, x, blocks);
        let cells = tape.view(cells);
        if before + after == 0 {
            return cells;
        }
        let padded = tape.pad(cells, [before, after].map(|rows| self.of(rows * blocks.grid.1)));
        let one = self.of(blocks.grid.0 * blocks.grid.1);
        let shifted: Vec<Id> = (0..=before + after).map(|_| tape.narrow(padded, one)).collect();
        // The parts are no contiguous tensors: candle joins them in another order of dimensions, and the product wants a copy.
        let joined = tape.cat(&shifted);
        tape.copy(joined)
    }
}

/// Of scores with a bias; `rows` queries.
fn softmax(layers: &Layers, tape: &mut Tape, scores: Id, rows: u64) -> Id {
    if layers.fused() {
        return tape.kernel(tape.elements(scores), layers.stream, &[scores]);
    }
    let elements = tape.elements(scores);
    let input = |tape: &mut Tape| {
        let x = tape.leaf(elements, layers.stream);
        tape.cast(x, 4)
    };
    let mut forward = Tape::default();
    let wide = input(&mut forward);
    let biased = forward.add_constant(wide);
    let largest = forward.sums(biased, rows);
    let shifted = forward.add(biased, largest);
    let exponentials = forward.affine(shifted);
    let sums = forward.sums(exponentials, rows);
    let weights = forward.div(exponentials, sums);
    forward.cast(weights, layers.stream);

    let mut backward = Tape::default();
    let (weights, dy) = (input(&mut backward), input(&mut backward));
    let products = backward.mul(weights, dy);
    let sums = backward.sums(products, rows);
    let centred = backward.add(dy, sums);
    let dx = backward.mul(weights, centred);
    backward.cast(dx, layers.stream);
    // Weights and their gradients where they are cast, and one or two others.
    let held = if layers.stream == 4 { 2 } else { 3 };
    tape.composed(&[scores], &forward, &backward, held * 4 * elements)
}
