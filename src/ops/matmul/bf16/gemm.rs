//! Matrix product in bf16: inputs and output in f32, factors rounded to bf16, sums in f32.
//!
//! The trick: B is packed once. C is split into blocks of rows, one task each; a task packs as many steps of its rows
//! of A as fit in the L2 cache of a core. A panel of 32 columns of B stays in the L1 cache while the rows of the block
//! are multiplied with it, 32 at a time. Each element of C is summed in the order of the steps, independent of how C is
//! split, so the result does not depend on the number of threads.

use super::{
    pack::{Factor, pack},
    tile::{LINES, Panel, SIDE, STEPS, Tile},
    unit::Bf16Unit,
};
use crate::ops::matmul::{
    epilogue::{Epilogue, Part, Rows, finish_part},
    matrix::{Beta, Matrix, SERIAL_WORK},
};
use rayon::prelude::*;
use std::ops::Range;

/// Number of packed blocks of 32 steps for which a panel of B fits in the L1 cache (32 KiB).
const NEAR: usize = 16;
/// Number of blocks of 32 steps for which rows of A are packed at once.
const DEPTH: usize = 64;

/// A right factor, rounded and packed once for many products.
pub struct PackedB {
    rows: usize,
    columns: usize,
    /// Number of blocks of 32 steps, at least one.
    blocks: usize,
    /// `blocks` blocks for each panel of 32 columns.
    tiles: Vec<[Tile; 2]>,
}

impl PackedB {
    pub fn new(_: Bf16Unit, b: Matrix<f32>) -> Self {
        let (blocks, panels) = (b.rows.div_ceil(STEPS).max(1), b.columns.div_ceil(SIDE));
        let tiles = packed(blocks * panels, |tiles| {
            tiles.par_chunks_mut(blocks).enumerate().for_each(|(i, panel)| {
                pack(panel, Factor::Right, b.t(), (i * SIDE, 0), 1.0);
            });
        });
        Self { rows: b.rows, columns: b.columns, blocks, tiles }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.tiles[..])
    }

    fn panels(&self) -> usize {
        self.tiles.len() / self.blocks
    }

    fn panel(&self, i: usize) -> &Panel {
        &self.tiles[i * self.blocks..][..self.blocks]
    }
}

/// A new vector of tiles written by `fill`.
fn packed<const N: usize>(len: usize, fill: impl FnOnce(&mut [[Tile; N]])) -> Vec<[Tile; N]> {
    let mut tiles = Vec::with_capacity(len);
    // SAFETY: allocated for `len`, any bits are a tile, and `pack`, the only filler, writes each tile as a whole.
    fill(unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr(), len) });
    // SAFETY: as above.
    unsafe { tiles.set_len(len) };
    tiles
}

/// C = alpha·A·B (+ C), then the epilogue. `c` is row-major `a.rows × b.columns`; alpha multiplies A before it is
/// rounded.
pub fn gemm_bf16(
    unit: Bf16Unit,
    c: &mut [f32],
    beta: Beta,
    alpha: f32,
    a: Matrix<f32>,
    b: Matrix<f32>,
    epilogue: Epilogue<f32>,
) {
    gemm_packed(unit, c, beta, alpha, a, &PackedB::new(unit, b), epilogue);
}

/// The same with a right factor that is already packed.
pub fn gemm_packed(
    unit: Bf16Unit,
    c: &mut [f32],
    beta: Beta,
    alpha: f32,
    a: Matrix<f32>,
    b: &PackedB,
    mut epilogue: Epilogue<f32>,
) {
    let (m, n) = (a.rows, b.columns);
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    assert!(c.len() == m * n, "the destination has another shape");
    epilogue.check(c.len(), n);
    if c.is_empty() {
        return;
    }
    let product = Product {
        unit,
        beta,
        alpha,
        a,
        b,
        c: c.as_mut_ptr(),
        gelu: epilogue.gelu.take().map(|gelu| gelu.as_mut_ptr()),
        bias: epilogue.bias,
        residual: epilogue.residual,
    };
    // Rows are split so that every thread gets some tasks; columns only if that is not enough, because each split of
    // the columns packs the same rows of A again.
    let tasks = 4 * rayon::current_num_threads();
    let height = if m <= LINES {
        LINES
    } else {
        let most = if b.blocks <= DEPTH / 2 { 8 } else { 4 };
        (m / tasks / SIDE).clamp(1, most) * SIDE
    };
    let (heights, panels) = (m.div_ceil(height), b.panels());
    let width = panels.div_ceil(tasks.div_ceil(heights));
    let cuts = panels.div_ceil(width);
    let run = |task: usize| {
        let (row, panel) = (task / cuts * height, task % cuts * width);
        // SAFETY: tasks have different rows or different panels.
        unsafe { product.block(row..(row + height).min(m), panel..(panel + width).min(panels)) }
    };
    if m * n * b.rows < SERIAL_WORK {
        (0..heights * cuts).for_each(run);
    } else {
        (0..heights * cuts).into_par_iter().for_each(run);
    }
}

/// A product that is being computed.
struct Product<'a> {
    unit: Bf16Unit,
    beta: Beta,
    alpha: f32,
    a: Matrix<'a, f32>,
    b: &'a PackedB,
    c: *mut f32,
    gelu: Option<*mut f32>,
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
}

// SAFETY: tasks write different blocks of `c` and `gelu`, by the contract of `block`.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes a block: some rows of some panels of C.
    ///
    /// # Safety
    /// The block is inside of C, and no other task writes it.
    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>) {
        if self.a.rows <= LINES {
            // SAFETY: passed on.
            unsafe { self.flat_block(panels) }
        } else {
            // SAFETY: passed on.
            unsafe { self.square_block(rows, panels) }
        }
    }

    /// For a left factor of at most 16 rows (decoding): all steps at once, so that B is read once.
    unsafe fn flat_block(&self, panels: Range<usize>) {
        let (m, a) = (self.a.rows, self.pack_left::<1>(0, LINES, 0..self.b.blocks));
        let unit = self.unit.ready(m);
        for panel in panels {
            let multiply = |c: *mut f32, stride| {
                // SAFETY: the unit is ready for the m rows of C.
                unsafe { unit.flat(&a, self.b.panel(panel), c, stride, self.beta) }
            };
            // SAFETY: passed on.
            unsafe { self.tile(0, panel, self.beta, true, multiply) }
        }
    }

    unsafe fn square_block(&self, rows: Range<usize>, panels: Range<usize>) {
        let unit = self.unit.ready(LINES);
        for start in (0..self.b.blocks).step_by(DEPTH) {
            let depth = DEPTH.min(self.b.blocks - start);
            let a = self.pack_left::<2>(rows.start, rows.len(), start..start + depth);
            for panel in panels.clone() {
                for near in (0..depth).step_by(NEAR) {
                    let end = (near + NEAR).min(depth);
                    let b = &self.b.panel(panel)[start + near..start + end];
                    let beta = if start + near == 0 { self.beta } else { Beta::One };
                    for (i, a) in a.chunks_exact(depth).enumerate() {
                        // SAFETY: the unit is ready for 16 rows, the rest is passed on.
                        unsafe {
                            let multiply = |c: *mut f32, stride| unit.square(&a[near..end], b, c, stride, beta);
                            self.tile(rows.start + i * SIDE, panel, beta, start + end == self.b.blocks, multiply);
                        }
                    }
                }
            }
        }
    }

    /// The packed rows of A from `row` on, `16·N` at a time, for some blocks of steps.
    fn pack_left<const N: usize>(&self, row: usize, rows: usize, blocks: Range<usize>) -> Vec<[Tile; N]> {
        packed(rows.div_ceil(LINES * N) * blocks.len(), |tiles| {
            for (i, panel) in tiles.chunks_exact_mut(blocks.len()).enumerate() {
                let corner = (row + i * LINES * N, blocks.start * STEPS);
                pack(panel, Factor::Left, self.a, corner, self.alpha);
            }
        })
    }

    /// Runs a kernel on the up to 32 × 32 elements of C starting at `row` and `panel`; `last`: the sums are then
    /// complete.
    unsafe fn tile(&self, row: usize, panel: usize, beta: Beta, last: bool, multiply: impl Fn(*mut f32, usize)) {
        let (column, n) = (panel * SIDE, self.b.columns);
        let (rows, columns) = (SIDE.min(self.a.rows - row), SIDE.min(n - column));
        let corner = row * n + column;
        // SAFETY: inside of C, which has `a.rows` rows of `n`; nobody else has it, as the caller promises.
        let mut c = unsafe { Part::new(self.c.add(corner), rows, columns, n) };
        if columns == SIDE && (rows == SIDE || self.a.rows <= LINES) {
            multiply(c.start(), n);
        } else {
            at_the_edge(&mut c, beta, multiply);
        }
        if last && (self.bias.is_some() || self.residual.is_some() || self.gelu.is_some()) {
            let residual = self.residual.map(|r| Rows { start: &r[corner..], stride: n });
            // SAFETY: as for C.
            let gelu = self.gelu.map(|gelu| unsafe { Part::new(gelu.add(corner), rows, columns, n) });
            finish_part(&mut c, self.bias.map(|b| &b[column..]), residual, gelu);
        }
    }
}

/// Runs a kernel on a whole square outside of C, and copies the part that belongs to C.
fn at_the_edge(c: &mut Part<f32>, beta: Beta, multiply: impl Fn(*mut f32, usize)) {
    let (rows, columns) = (c.rows, c.columns);
    let mut square = [[0f32; SIDE]; SIDE];
    if beta == Beta::One {
        for (i, row) in square[..rows].iter_mut().enumerate() {
            row[..columns].copy_from_slice(c.row(i));
        }
    }
    multiply(square.as_flattened_mut().as_mut_ptr(), SIDE);
    for (i, row) in square[..rows].iter().enumerate() {
        c.row(i).copy_from_slice(&row[..columns]);
    }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
#[path = "gemm_tests.rs"]
mod tests;
