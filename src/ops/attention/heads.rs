//! One head of one sample, forward and backward: blocks of queries against chunks of keys. The largest buffers have one
//! row for each key; scores only exist for one chunk at a time.

use super::{
    kernel::{Element, LANES, Part},
    plan::Plan,
    products::{CHUNK, Chunks, Lanes, Piece, Shape},
    sizes::Sizes,
};
use crate::ops::{
    simd::{Real, dot, multiversion},
    slices::Scatter,
};
use std::ops::Range;

/// Inputs shared by all tasks of a call.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a, T> {
    pub qkv: &'a [T],
    pub plan: &'a Plan,
    pub sizes: Sizes,
    pub shape: Shape<T>,
}

/// The head of a task, and the padded places of its sample.
pub(super) struct Head {
    pub sample: usize,
    pub head: usize,
    pub padding: Range<usize>,
}

impl<T: Element> Inputs<'_, T> {
    /// The rows of one part of qkv, times `factor`.
    #[inline(always)]
    fn gather(&self, to: &mut [T], positions: &[usize], part: usize, head: &Head, factor: T) {
        for (to, &position) in to.chunks_exact_mut(self.shape.row).zip(positions) {
            let from = &self.qkv[self.sizes.row(head.sample, position, part, head.head)..][..self.sizes.d];
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * factor);
        }
    }

    fn scale(&self) -> T {
        T::ONE / T::from_f64(self.sizes.d as f64).sqrt()
    }

    fn chunks(&self, spans: &Range<usize>, head: &Head) -> Chunks<'_> {
        Chunks { spans: &self.plan.spans[spans.clone()], padding: head.padding.clone(), done: 0 }
    }
}

/// Buffers that tasks reuse. Columns beyond d are always zero.
pub(super) struct Scratch<T> {
    /// Of all places.
    keys: Vec<T>,
    values: Vec<T>,
    dkeys: Vec<T>,
    dvalues: Vec<T>,
    /// Of a block of queries.
    queries: Vec<T>,
    douts: Vec<T>,
    queries_t: Vec<Lanes<T>>,
    douts_t: Vec<Lanes<T>>,
    out: Vec<T>,
    /// Of a chunk of keys.
    scores: Vec<Lanes<T>>,
    dscores: Vec<Lanes<T>>,
    pieces: Vec<Piece>,
    parts: Vec<Part>,
}

impl<T: Element> Scratch<T> {
    pub fn forward(positions: usize, shape: Shape<T>) -> Self {
        let rows = |n: usize| vec![T::ZERO; n * shape.row];
        Self {
            keys: rows(positions),
            values: rows(positions),
            queries: rows(LANES),
            queries_t: vec![[T::ZERO; LANES]; shape.d],
            out: rows(LANES),
            scores: vec![[T::ZERO; LANES]; CHUNK],
            dkeys: vec![],
            dvalues: vec![],
            douts: vec![],
            douts_t: vec![],
            dscores: vec![],
            pieces: vec![],
            parts: vec![],
        }
    }

    pub fn backward(positions: usize, shape: Shape<T>) -> Self {
        let forward = Self::forward(positions, shape);
        Self {
            dkeys: forward.keys.clone(),
            dvalues: forward.keys.clone(),
            douts: forward.queries.clone(),
            douts_t: forward.queries_t.clone(),
            dscores: forward.scores.clone(),
            ..forward
        }
    }
}

#[inline(always)]
fn transpose<T: Real>(out: &mut [Lanes<T>], rows: &[T], row: usize) {
    for (i, out) in out.iter_mut().enumerate() {
        for lane in 0..LANES {
            out[lane] = rows[lane * row + i];
        }
    }
}

/// Masks the scores of queries that do not attend to a key.
#[inline(always)]
fn hide<T: Real>(scores: &mut [Lanes<T>], pieces: &[Piece], hidden: T) {
    for piece in pieces.iter().filter(|piece| piece.lanes != u16::MAX) {
        for s in &mut scores[piece.row..][..piece.len] {
            for (i, s) in s.iter_mut().enumerate() {
                *s = if piece.lanes >> i & 1 == 1 { *s } else { hidden };
            }
        }
    }
}

/// State of the online softmax for the queries of a block.
struct Softmax<T> {
    largest: Lanes<T>,
    sums: Lanes<T>,
}

impl<T: Real> Softmax<T> {
    /// Turns the scores of a chunk into weights relative to the largest score so far; returns the factors that rescale
    /// the earlier sums.
    #[inline(always)]
    fn add(&mut self, scores: &mut [Lanes<T>]) -> Lanes<T> {
        let old = self.largest;
        let mut largest = old;
        for s in &*scores {
            for i in 0..LANES {
                largest[i] = if s[i] > largest[i] { s[i] } else { largest[i] };
            }
        }
        self.largest = largest;
        let (mut base, mut factors) = (largest, [T::ZERO; LANES]);
        for i in 0..LANES {
            // ∞ − ∞ is NaN: a query that has not attended to any key yet gets weights of 0 from any other base.
            base[i] = if base[i] == T::NEG_INFINITY { T::ZERO } else { base[i] };
            factors[i] = Real::exp(old[i] - base[i]);
        }
        let mut sums = self.sums;
        for i in 0..LANES {
            sums[i] *= factors[i];
        }
        for s in scores {
            for i in 0..LANES {
                s[i] = Real::exp(s[i] - base[i]);
                sums[i] += s[i];
            }
        }
        self.sums = sums;
        factors
    }
}

multiversion! {
    /// Writes the rows of a head in `out` (samples, positions, heads, d) and in `lse` (samples, heads, positions).
    pub(super) fn forward_head<T: Element, const FMA: bool>(
        out: &Scatter<T>,
        lse: &Scatter<T>,
        inputs: Inputs<T>,
        head: Head,
        workspace: &mut Scratch<T>,
    ) {
        let Inputs { plan, sizes, shape, .. } = inputs;
        inputs.gather(&mut workspace.keys, &plan.order, 1, &head, T::ONE);
        inputs.gather(&mut workspace.values, &plan.order, 2, &head, T::ONE);
        // SAFETY: the rows of a head belong to its task alone, here and below.
        let lse = unsafe { lse.row((head.sample * sizes.heads + head.head) * sizes.positions, sizes.positions) };
        for block in &plan.blocks {
            let queries = &plan.order[block.queries.clone()];
            inputs.gather(&mut workspace.queries, queries, 0, &head, inputs.scale());
            transpose(&mut workspace.queries_t, &workspace.queries, shape.row);
            let mut chunks = inputs.chunks(&block.spans, &head);
            let mut softmax = Softmax { largest: [T::NEG_INFINITY; LANES], sums: [T::ZERO; LANES] };
            workspace.out.fill(T::ZERO);
            loop {
                let rows = chunks.next(&mut workspace.pieces);
                if rows == 0 {
                    break;
                }
                let scores = &mut workspace.scores[..rows];
                shape.score(scores, &workspace.pieces, &workspace.keys, &workspace.queries_t);
                hide(scores, &workspace.pieces, T::NEG_INFINITY);
                let factors = softmax.add(scores);
                for (out, factor) in workspace.out.chunks_exact_mut(shape.row).zip(factors) {
                    out.iter_mut().for_each(|out| *out *= factor);
                }
                shape.attend(&mut workspace.out, true, &workspace.pieces, scores, &workspace.values, &mut workspace.parts);
            }
            for (lane, &position) in queries.iter().enumerate() {
                let (sum, none) = (softmax.sums[lane], softmax.sums[lane] == T::ZERO);
                let factor = if none { T::ZERO } else { T::ONE / sum };
                let from = &workspace.out[lane * shape.row..][..sizes.d];
                // SAFETY: as above.
                let to = unsafe { out.row(sizes.output_row(head.sample, position, head.head), sizes.d) };
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * factor);
                let log = T::from_f64(sum.to_f64().ln());
                lse[position] = if none { T::ZERO } else { softmax.largest[lane] + log };
            }
        }
    }
}

multiversion! {
    /// With p the probabilities and dp = dout·v: ds = p (dp − dout·out), dq = ds·k / √d, dk += ds q / √d, dv += p dout.
    pub(super) fn backward_head<T: Element, const FMA: bool>(
        dqkv: &Scatter<T>,
        inputs: Inputs<T>,
        out: &[T],
        lse: &[T],
        dout: &[T],
        head: Head,
        workspace: &mut Scratch<T>,
    ) {
        let Inputs { plan, sizes, shape, .. } = inputs;
        inputs.gather(&mut workspace.keys, &plan.order, 1, &head, T::ONE);
        inputs.gather(&mut workspace.values, &plan.order, 2, &head, T::ONE);
        workspace.dkeys.fill(T::ZERO);
        workspace.dvalues.fill(T::ZERO);
        let lse = &lse[(head.sample * sizes.heads + head.head) * sizes.positions..][..sizes.positions];
        for block in &plan.blocks {
            let queries = &plan.order[block.queries.clone()];
            inputs.gather(&mut workspace.queries, queries, 0, &head, inputs.scale());
            let (mut base, mut means) = ([T::ZERO; LANES], [T::ZERO; LANES]);
            for (lane, &position) in queries.iter().enumerate() {
                let row = sizes.output_row(head.sample, position, head.head);
                let (out, dout) = (&out[row..][..sizes.d], &dout[row..][..sizes.d]);
                workspace.douts[lane * shape.row..][..sizes.d].copy_from_slice(dout);
                (base[lane], means[lane]) = (lse[position], dot::<T, FMA>(dout, out));
            }
            transpose(&mut workspace.queries_t, &workspace.queries, shape.row);
            transpose(&mut workspace.douts_t, &workspace.douts, shape.row);
            workspace.out.fill(T::ZERO);
            let mut chunks = inputs.chunks(&block.spans, &head);
            loop {
                let rows = chunks.next(&mut workspace.pieces);
                if rows == 0 {
                    break;
                }
                let (p, ds) = (&mut workspace.scores[..rows], &mut workspace.dscores[..rows]);
                shape.score(p, &workspace.pieces, &workspace.keys, &workspace.queries_t);
                shape.score(ds, &workspace.pieces, &workspace.values, &workspace.douts_t);
                hide(p, &workspace.pieces, T::NEG_INFINITY);
                hide(ds, &workspace.pieces, T::ZERO);
                for (p, ds) in p.iter_mut().zip(&mut *ds) {
                    for i in 0..LANES {
                        p[i] = Real::exp(p[i] - base[i]);
                        ds[i] = p[i] * (ds[i] - means[i]);
                    }
                }
                shape.attend(&mut workspace.out, true, &workspace.pieces, ds, &workspace.keys, &mut workspace.parts);
                shape.spread(&mut workspace.dkeys, &workspace.pieces, ds, &workspace.queries);
                shape.spread(&mut workspace.dvalues, &workspace.pieces, p, &workspace.douts);
            }
            for (lane, &position) in queries.iter().enumerate() {
                let from = &workspace.out[lane * shape.row..][..sizes.d];
                // SAFETY: the rows of a head belong to its task alone, here and below.
                let to = unsafe { dqkv.row(sizes.row(head.sample, position, 0, head.head), sizes.d) };
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * inputs.scale());
            }
        }
        for (part, sums) in [(1, &workspace.dkeys), (2, &workspace.dvalues)] {
            for (from, &position) in sums.chunks_exact(shape.row).zip(&plan.order) {
                // SAFETY: as above.
                let to = unsafe { dqkv.row(sizes.row(head.sample, position, part, head.head), sizes.d) };
                to.copy_from_slice(&from[..sizes.d]);
            }
        }
    }
}
