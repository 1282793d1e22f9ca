//! The parts of blockwise attention as sizes: [`blockwise_parts`](super::blockwise_parts), line by line. A change there wants the
//! same change here.

use super::blocks::{Blocks, Shape};
use crate::ops::tape::{Id, Layers, Tape};

/// Heads of all samples, and their channels.
pub(super) struct Sizes<'a> {
    pub layers: &'a Layers,
    pub blocks: &'a Blocks,
    pub rows: u64,
    pub d: u64,
    pub positions: usize,
}

/// The positions that are no codes: queries and, if they see any, keys, values and weights.
pub(super) struct Others {
    pub q: Id,
    pub seen: Option<[Id; 3]>,
}

pub(super) struct Codes {
    q: Id,
    keys: Id,
    values: Id,
    around: Option<[Id; 2]>,
    weights: Id,
}

impl Sizes<'_> {
    /// Elements of this many positions.
    pub(super) fn of(&self, positions: usize) -> u64 {
        self.rows * self.d * positions as u64
    }

    pub(super) fn others_len(&self) -> usize {
        self.positions - self.blocks.codes.len()
    }

    pub(super) fn split(&self, tape: &mut Tape) -> [Id; 3] {
        let all = self.of(self.positions);
        let qkv = tape.leaf(3 * all, self.layers.stream);
        let part = |tape: &mut Tape| {
            let part = tape.narrow(qkv, all);
            tape.copy(part)
        };
        let q = part(tape);
        let scaled = tape.affine(q);
        tape.free(&[q]);
        [scaled, part(tape), part(tape)]
    }

    pub(super) fn others(&self, tape: &mut Tape, [q, k, v]: [Id; 3]) -> Others {
        let (others, reach) = (self.others_len(), self.blocks.reach);
        let q = self.outside(tape, q);
        if reach == 0 {
            return Others { q, seen: None };
        }
        let [k, v] = [k, v].map(|x| self.copied(tape, x, reach));
        let scores = tape.matmul(q, k, self.rows * (others * reach) as u64, self.d);
        let weights = self.softmax(tape, scores, self.rows * others as u64);
        Others { q, seen: Some([k, v, weights]) }
    }

    pub(super) fn others_backward(
        &self,
        tape: &mut Tape,
        qkv: [Id; 3],
        dy: Id,
        dk: &mut Option<Id>,
        dv: &mut Option<Id>,
    ) -> Id {
        let given = dy;
        let Others { q, seen } = self.others(tape, qkv);
        let Some([k, v, weights]) = seen else { return q };
        let (others, reach) = (self.others_len(), self.blocks.reach);
        let dy = self.outside(tape, dy);
        let product = tape.matmul(weights, dy, self.of(reach), others as u64);
        self.place(tape, dv, product, 0);
        tape.free(&[product]);
        let dweights = tape.matmul(dy, v, self.rows * (others * reach) as u64, self.d);
        let dscores = self.softmax_backward(tape, weights, dweights, self.rows * others as u64);
        let product = tape.matmul(dscores, q, self.of(reach), others as u64);
        self.place(tape, dk, product, 0);
        tape.free(&[product]);
        let dq = tape.matmul(dscores, k, self.of(others), reach as u64);
        // What is no copy belongs to the caller.
        let ended = [q, k, v, weights, dy, dscores].map(|id| tape.owner(id)).into_iter();
        tape.free(&ended.filter(|id| !qkv.contains(id) && *id != given).collect::<Vec<_>>());
        dq
    }

    pub(super) fn codes(&self, tape: &mut Tape, [q, k, v]: [Id; 3]) -> Codes {
        let (groups, size) = self.blocks.groups();
        let (width, around_len) = (self.blocks.width(), self.blocks.around_len());
        let scores_of = |keys: usize| self.rows * (groups * size * keys) as u64;
        let q = self.queries(tape, q);
        let [keys, values] = [k, v].map(|x| tape.function_of(|tape| self.keys(tape, x)));
        let mut scores = tape.matmul(q, keys, scores_of(width), self.d);
        let around = (around_len > 0).then(|| [k, v].map(|x| self.around(tape, x)));
        if let Some([k, _]) = around {
            let more = tape.matmul(q, k, scores_of(around_len), self.d);
            let joined = tape.cat(&[more, scores]);
            tape.free(&[more, scores]);
            scores = joined;
        }
        let weights = self.softmax(tape, scores, self.rows * (groups * size) as u64);
        Codes { q, keys, values, around, weights }
    }

    /// Weights of the positions around and of the keys of groups, as tensors of their own.
    fn parts(&self, tape: &mut Tape, weights: Id) -> (Option<Id>, Id) {
        let (groups, size) = self.blocks.groups();
        let mut part = |keys: usize| {
            let part = tape.narrow(weights, self.rows * (groups * size * keys) as u64);
            if part == weights { part } else { tape.copy(part) }
        };
        let around = self.blocks.around_len();
        ((around > 0).then(|| part(around)), part(self.blocks.width()))
    }

    pub(super) fn output(&self, tape: &mut Tape, codes: &Codes) -> Id {
        let (groups, size) = self.blocks.groups();
        let (of_around, own) = self.parts(tape, codes.weights);
        let mut out = tape.matmul(own, codes.values, self.of(groups * size), self.blocks.width() as u64);
        if let (Some(weights), Some([_, v])) = (of_around, codes.around) {
            let more = tape.matmul(weights, v, self.of(groups * size), self.blocks.around_len() as u64);
            out = tape.add(out, more);
        }
        self.raster(tape, out)
    }

    pub(super) fn codes_backward(
        &self,
        tape: &mut Tape,
        codes: Codes,
        dy: Id,
        dk: &mut Option<Id>,
        dv: &mut Option<Id>,
    ) -> Id {
        let Codes { q, keys, values, around, weights } = codes;
        let (groups, size) = self.blocks.groups();
        let (width, around_len, start) = (self.blocks.width(), self.blocks.around_len(), self.blocks.codes.start);
        let scores_of = |keys: usize| self.rows * (groups * size * keys) as u64;
        let queries = self.rows * (groups * size) as u64;
        let dy = self.queries(tape, dy);
        let (of_around, own) = self.parts(tape, weights);
        let add = |tape: &mut Tape, sum: &mut Option<Id>, own: Id, of: Id| {
            let product = tape.matmul(own, of, self.of(groups * width), size as u64);
            let cells = tape.function_of(|tape| self.codes_of_keys(tape, product));
            self.place(tape, sum, cells, start);
            tape.free(&[product, tape.owner(cells)]);
        };
        let add_around = |tape: &mut Tape, sum: &mut Option<Id>, weights: Id, of: Id| {
            let product = tape.matmul(weights, of, self.of(around_len), (groups * size) as u64);
            for range in self.blocks.around.iter().filter(|range| !range.is_empty()) {
                let part = tape.narrow(product, self.of(range.len()));
                self.place(tape, sum, part, range.start);
            }
            tape.free(&[product]);
        };
        add(tape, dv, own, dy);
        if tape.owner(own) != weights {
            tape.free(&[own]);
        }
        let mut dweights = tape.matmul(dy, values, scores_of(width), self.d);
        if let (Some(of_around), Some([_, v])) = (of_around, around) {
            add_around(tape, dv, of_around, dy);
            let more = tape.matmul(dy, v, scores_of(around_len), self.d);
            let joined = tape.cat(&[more, dweights]);
            tape.free(&[more, dweights, of_around]);
            dweights = joined;
        }
        let dscores = self.softmax_backward(tape, weights, dweights, queries);
        let (of_around, own) = self.parts(tape, dscores);
        if tape.owner(own) != dscores {
            tape.free(&[dscores]);
        }
        let mut dq = tape.matmul(own, keys, self.of(groups * size), width as u64);
        add(tape, dk, own, q);
        if let (Some(of_around), Some([k, _])) = (of_around, around) {
            add_around(tape, dk, of_around, q);
            let more = tape.matmul(of_around, k, self.of(groups * size), around_len as u64);
            let sum = tape.add(dq, more);
            tape.free(&[dq, more, of_around]);
            dq = sum;
        }
        let result = self.raster(tape, dq);
        let kept = tape.owner(result);
        let ended = [q, keys, values, weights, dy, own, dq].into_iter().chain(around.into_iter().flatten());
        let ended: Vec<Id> = ended.map(|id| tape.owner(id)).filter(|id| *id != kept).collect();
        tape.free(&ended);
        result
    }

    /// Adds the gradient of some positions to that of all.
    fn place(&self, tape: &mut Tape, sum: &mut Option<Id>, part: Id, start: usize) {
        let behind = self.of(self.positions) - self.of(start) - tape.elements(part);
        let part = tape.function_of(|tape| {
            let padded = tape.pad(part, [self.of(start), behind]);
            match *sum {
                Some(sum) => {
                    let added = tape.add(sum, padded);
                    tape.free(&[sum]);
                    added
                }
                None => padded,
            }
        });
        *sum = Some(part);
    }

    /// The positions that are no codes.
    fn outside(&self, tape: &mut Tape, x: Id) -> Id {
        let (before, behind) = (self.blocks.codes.start, self.positions - self.blocks.codes.end);
        match [before, behind] {
            [count, 0] | [0, count] => self.copied(tape, x, count),
            [before, behind] => {
                let parts = [before, behind].map(|count| tape.narrow(x, self.of(count)));
                tape.cat(&parts)
            }
        }
    }

    /// The first positions of x; all of them are x itself.
    fn copied(&self, tape: &mut Tape, x: Id, positions: usize) -> Id {
        let part = tape.narrow(x, self.of(positions));
        if part == x { x } else { tape.copy(part) }
    }

    fn cells(&self, tape: &mut Tape, x: Id) -> Id {
        let (codes, cells) = (self.blocks.codes.len(), self.blocks.grid.0 * self.blocks.grid.1);
        let part = tape.narrow(x, self.of(codes));
        match cells - codes {
            0 if part == x => x,
            0 => tape.copy(part),
            missing => tape.function_of(|tape| tape.pad(part, [0, self.of(missing)])),
        }
    }

    fn queries(&self, tape: &mut Tape, x: Id) -> Id {
        tape.function_of(|tape| {
            let cells = self.cells(tape, x);
            match self.blocks.shape {
                Shape::Columns => tape.copy(cells),
                Shape::Band { .. } | Shape::All => cells,
            }
        })
    }

    fn keys(&self, tape: &mut Tape, x: Id) -> Id {
        let Shape::Band { before, after } = self.blocks.shape else { return self.queries(tape, x) };
        let cells = self.cells(tape, x);
        if before + after == 0 {
            return cells;
        }
        let rows = |rows: usize| self.of(rows * self.blocks.grid.1);
        let joined = tape.function_of(|tape| {
            let padded = tape.pad(cells, [rows(before), rows(after)]);
            let shifted: Vec<Id> =
                (0..=before + after).map(|_| tape.narrow(padded, rows(self.blocks.grid.0))).collect();
            tape.cat(&shifted)
        });
        if tape.owner(cells) != tape.owner(x) {
            tape.free(&[cells]);
        }
        // The parts are no contiguous tensors: candle joins them in another order of dimensions, and the product wants a copy.
        tape.copy(joined)
    }

    fn around(&self, tape: &mut Tape, x: Id) -> Id {
        let ranges: Vec<usize> = self.blocks.around.iter().map(ExactSizeIterator::len).filter(|len| *len > 0).collect();
        match ranges[..] {
            [one] => self.copied(tape, x, one),
            _ => {
                let parts: Vec<Id> = ranges.iter().map(|len| tape.narrow(x, self.of(*len))).collect();
                tape.cat(&parts)
            }
        }
    }

    fn codes_of_keys(&self, tape: &mut Tape, x: Id) -> Id {
        let Shape::Band { before, after } = self.blocks.shape else { return self.raster(tape, x) };
        let height = self.blocks.grid.0;
        let rows = |rows: usize| self.of(rows * self.blocks.grid.1);
        let mut sum: Option<Id> = None;
        for shift in 0..=before + after {
            let (skipped, first) = (before.saturating_sub(shift), shift.saturating_sub(before));
            let count = height - skipped.max(first);
            let part = tape.narrow(x, rows(count));
            let part = tape.function_of(|tape| tape.pad(part, [rows(first), rows(height - first - count)]));
            sum = Some(match sum {
                Some(sum) => {
                    let added = tape.add(sum, part);
                    tape.free(&[sum, part]);
                    added
                }
                None => part,
            });
        }
        let sum = sum.unwrap_or(x);
        tape.narrow(sum, self.of(self.blocks.codes.len()))
    }

    fn raster(&self, tape: &mut Tape, x: Id) -> Id {
        let x = if self.blocks.shape == Shape::Columns { tape.copy(x) } else { x };
        tape.narrow(x, self.of(self.blocks.codes.len()))
    }

    /// Of scores with a bias, which it frees; `rows` queries.
    fn softmax(&self, tape: &mut Tape, scores: Id, rows: u64) -> Id {
        let (elements, stream) = (tape.elements(scores), self.layers.stream);
        let weights = tape.function_of(|tape| {
            if self.layers.fused() {
                return tape.kernel(elements, stream, &[scores]);
            }
            let wide = tape.cast(scores, 4);
            let biased = tape.add_constant(wide);
            if wide != scores {
                tape.free(&[wide]);
            }
            let largest = tape.sums(biased, rows);
            let shifted = tape.add(biased, largest);
            tape.free(&[biased]);
            let exponentials = tape.affine(shifted);
            tape.free(&[shifted]);
            let sums = tape.sums(exponentials, rows);
            let weights = tape.div(exponentials, sums);
            tape.free(&[exponentials]);
            tape.cast(weights, stream)
        });
        tape.free(&[scores]);
        weights
    }

    /// The gradient of the scores; it frees that of the weights.
    fn softmax_backward(&self, tape: &mut Tape, weights: Id, dy: Id, rows: u64) -> Id {
        let (elements, stream) = (tape.elements(weights), self.layers.stream);
        let dscores = tape.function_of(|tape| {
            if self.layers.fused() {
                return tape.kernel(elements, stream, &[weights, dy]);
            }
            let (weights, wide) = (tape.cast(weights, 4), tape.cast(dy, 4));
            if wide != dy {
                tape.free(&[dy]);
            }
            let products = tape.mul(weights, wide);
            let sums = tape.sums(products, rows);
            tape.free(&[products]);
            let centred = tape.add(wide, sums);
            tape.free(&[wide]);
            let dx = tape.mul(weights, centred);
            tape.free(&[centred]);
            if stream != 4 {
                tape.free(&[weights]);
            }
            tape.cast(dx, stream)
        });
        tape.free(&[dy]);
        dscores
    }
}
