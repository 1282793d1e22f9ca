//! The matrix products of one block of queries with a chunk of its keys. Scores are stored by key, with one lane per
//! query.
//!
//! A key that only some queries of the block attend to costs only part of the work: see `width` and [`Shape::attend`].

use super::{
    kernel::{Element, Kernel, LANES, Part, Product},
    plan::Span,
};
use std::ops::Range;

/// Number of keys scored at a time.
pub(super) const CHUNK: usize = 128;

/// Number of queries whose values are combined at a time.
const GROUP: usize = 6;

/// For one key, a number for each query of the block.
pub(super) type Lanes<T> = [T; LANES];

/// Adjacent keys, and the row of the chunk where their scores start.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub key: usize,
    pub row: usize,
    pub len: usize,
    /// Mask of the queries that attend to them.
    pub lanes: u16,
}

/// Cuts the spans of a block, without padding, into chunks of at most [`CHUNK`] keys.
pub(super) struct Chunks<'a> {
    pub spans: &'a [Span],
    pub padding: Range<usize>,
    /// Number of keys of the first span that are done.
    pub done: usize,
}

impl Chunks<'_> {
    /// Writes the next chunk to `pieces` and returns its number of keys, 0 at the end.
    pub fn next(&mut self, pieces: &mut Vec<Piece>) -> usize {
        pieces.clear();
        let mut rows = 0;
        while rows < CHUNK
            && let Some(span) = self.spans.first()
        {
            let (mut start, mut end) = (span.start + self.done, span.start + span.len);
            if self.padding.contains(&start) {
                start = self.padding.end.min(end);
            }
            if start < self.padding.start {
                end = end.min(self.padding.start);
            }
            let len = (end - start).min(CHUNK - rows);
            if len > 0 {
                pieces.push(Piece { key: start, row: rows, len, lanes: span.lanes });
                rows += len;
            }
            self.done = start + len - span.start;
            if self.done == span.len {
                (self.spans, self.done) = (&self.spans[1..], 0);
            }
        }
        rows
    }
}

/// Calls `f(key, row, len, class)` with adjacent pieces of one class joined; pieces without a class are skipped.
#[inline(always)]
fn joined<C: PartialEq + Copy>(
    pieces: &[Piece],
    class: impl Fn(u16) -> Option<C>,
    mut f: impl FnMut(usize, usize, usize, C),
) {
    let mut open: Option<(usize, usize, usize, C)> = None;
    for piece in pieces {
        let Some(class) = class(piece.lanes) else { continue };
        match &mut open {
            Some((key, row, len, c)) if (*c, *key + *len, *row + *len) == (class, piece.key, piece.row) => {
                *len += piece.len;
            }
            _ => {
                if let Some((key, row, len, c)) = open.replace((piece.key, piece.row, piece.len, class)) {
                    f(key, row, len, c);
                }
            }
        }
    }
    if let Some((key, row, len, c)) = open {
        f(key, row, len, c);
    }
}

/// The lanes to compute: all, or the half that attends to a key.
#[inline(always)]
fn width(lanes: u16) -> Option<(usize, usize)> {
    const HALF: usize = LANES / 2;
    Some(match (lanes & 0xff, lanes >> 8) {
        (0, _) => (HALF, HALF),
        (_, 0) => (0, HALF),
        _ => (0, LANES),
    })
}

/// Sizes shared by the products of a head. Rows are padded with zeros to whole panels.
#[derive(Clone, Copy)]
pub(super) struct Shape<T> {
    kernel: Kernel<T>,
    /// Number of elements of a key.
    pub d: usize,
    /// Distance between rows.
    pub row: usize,
}

impl<T: Element> Shape<T> {
    pub fn new(d: usize) -> Self {
        Self { kernel: T::kernel(), d, row: d.next_multiple_of(LANES) }
    }

    /// `scores[key][lane] = keys[key] · query[lane]`, of transposed queries (d, lanes).
    #[inline(always)]
    pub fn score(&self, scores: &mut [Lanes<T>], pieces: &[Piece], keys: &[T], queries: &[Lanes<T>]) {
        assert_eq!(queries.len(), self.d);
        joined(pieces, width, |key, row, len, (lane, lanes)| {
            let (keys, scores) = (&keys[key * self.row..][..len * self.row], &mut scores[row..][..len]);
            let run = if lanes == LANES { self.kernel.full } else { self.kernel.half };
            // SAFETY: `len` rows of keys and scores, d rows of queries, `lanes` from `lane` on: in bounds as sliced.
            unsafe {
                run(Product {
                    rows: len,
                    a: keys.as_ptr(),
                    a_row: self.row,
                    a_step: 1,
                    b: queries.as_ptr().cast::<T>().add(lane),
                    b_step: LANES,
                    c: scores.as_mut_ptr().cast::<T>().add(lane),
                    c_row: LANES,
                    beta: false,
                    parts: &[Part { a: 0, b: 0, len: self.d }],
                });
            }
        });
    }

    /// `out[lane] = Σ weights[key][lane] · values[key]`, plus the old value if `onto`. Each group of queries skips keys
    /// that none of them attends to. `parts` is a reusable buffer.
    #[inline(always)]
    pub fn attend(
        &self,
        out: &mut [T],
        beta: bool,
        pieces: &[Piece],
        weights: &[Lanes<T>],
        values: &[T],
        parts: &mut Vec<Part>,
    ) {
        assert_eq!(out.len(), LANES * self.row);
        for group in (0..LANES).step_by(GROUP) {
            let lanes = GROUP.min(LANES - group);
            let seen = |seen: u16| (seen >> group & ((1 << lanes) - 1) != 0).then_some(());
            parts.clear();
            joined(pieces, seen, |key, row, len, ()| {
                assert!((key + len) * self.row <= values.len() && row + len <= weights.len());
                parts.push(Part { a: row * LANES, b: key * self.row, len });
            });
            for panel in (0..self.row).step_by(LANES) {
                // SAFETY: the parts are in bounds by the assertion, lanes and panels of `out` by the one above.
                unsafe {
                    (self.kernel.full)(Product {
                        rows: lanes,
                        a: weights.as_ptr().cast::<T>().add(group),
                        a_row: 1,
                        a_step: LANES,
                        b: values.as_ptr().add(panel),
                        b_step: self.row,
                        c: out.as_mut_ptr().add(group * self.row + panel),
                        c_row: self.row,
                        beta,
                        parts,
                    });
                }
            }
        }
    }

    /// `sums[key] += Σ weights[key][lane] · rows[lane]`.
    #[inline(always)]
    pub fn spread(&self, sums: &mut [T], pieces: &[Piece], weights: &[Lanes<T>], rows: &[T]) {
        assert_eq!(rows.len(), LANES * self.row);
        joined(pieces, width, |key, row, len, (lane, lanes)| {
            let (sums, weights) = (&mut sums[key * self.row..][..len * self.row], &weights[row..][..len]);
            for panel in (0..self.row).step_by(LANES) {
                // SAFETY: `len` rows of sums and weights as sliced, whole panels, `lanes` rows from `lane` on.
                unsafe {
                    (self.kernel.full)(Product {
                        rows: len,
                        a: weights.as_ptr().cast(),
                        a_row: LANES,
                        a_step: 1,
                        b: rows.as_ptr().add(panel),
                        b_step: self.row,
                        c: sums.as_mut_ptr().add(panel),
                        c_row: self.row,
                        beta: true,
                        parts: &[Part { a: lane, b: lane * self.row, len: lanes }],
                    });
                }
            }
        });
    }
}
