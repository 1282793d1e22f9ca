//! The loops of a convolution over tiles, panels of weights and kernel rows.

use super::{
    conv_kernel::{Element, Kernel, Product},
    conv_tiles::{Geometry, Tile},
    slices::fresh,
};
use rayon::prelude::*;

/// Output pixels whose gradients stay in L1 while all rows of the weights' gradient pass over them.
const WEIGHT_PIXELS: usize = 128;

/// Tasks that add up the weights' gradient, each over its share of the tiles: fixed, so that the result does
/// not depend on the number of threads.
const WEIGHT_TASKS: usize = 8;

/// Weights in panels of the kernel's width: (panel, kernel row, kernel column, input, lane), zeros beyond the
/// last output.
fn pack<T: Element>(w: &[T], g: Geometry, flipped: bool, width: usize) -> Vec<T> {
    let (kh, kw, panels) = (g.kernel_height, g.kernel_width, g.outputs.div_ceil(width));
    let at = |output: usize, ky: usize, kx: usize, input: usize| {
        if flipped {
            w[((input * g.outputs + output) * kh + kh - 1 - ky) * kw + kw - 1 - kx]
        } else {
            w[((output * g.inputs + input) * kh + ky) * kw + kx]
        }
    };
    let mut packed = vec![T::ZERO; panels * kh * g.taps() * width];
    packed.par_chunks_mut(g.inputs * width).enumerate().for_each(|(i, chunk)| {
        let (panel, ky, kx) = (i / (kh * kw), i / kw % kh, i % kw);
        for (input, lanes) in chunk.chunks_exact_mut(width).enumerate() {
            for (output, lane) in (panel * width..g.outputs).zip(lanes) {
                *lane = at(output, ky, kx, input);
            }
        }
    });
    packed
}

/// `y (b, h', w', out)`; `flipped` for the input's gradient.
pub(super) fn convolve<T: Element>(x: &[T], w: &[T], b: Option<&[T]>, g: Geometry, flipped: bool) -> Vec<T> {
    let kernel = T::kernel(g.outputs);
    let packed = pack(w, g, flipped, kernel.width);
    let image = g.out_height * g.out_row();
    let fill = |y: &mut [T]| {
        let tiles = y.par_chunks_mut(image.max(1)).enumerate().flat_map(|(i, y)| {
            y.par_chunks_mut(g.tile_rows() * g.out_row()).enumerate().map(move |(j, y)| (g.tile(i, j), y))
        });
        tiles.for_each_init(Vec::new, |buffer, (tile, y)| {
            match b {
                Some(b) => y.chunks_exact_mut(g.outputs).for_each(|y| y.copy_from_slice(b)),
                None => y.fill(T::ZERO),
            }
            convolve_tile(g.padded(x, &tile, buffer), &packed, y, g, kernel);
        });
    };
    // SAFETY: every tile is filled before it is added to, and the tiles cover the output.
    unsafe { fresh(g.images * image, fill) }
}

/// Adds the convolution of one padded tile to its rows of the output.
fn convolve_tile<T: Element>(padded: &[T], packed: &[T], y: &mut [T], g: Geometry, kernel: Kernel<T>) {
    let width = kernel.width;
    let mut partial = vec![T::ZERO; if g.outputs.is_multiple_of(width) { 0 } else { g.out_width * width }];
    for (panel, weights) in packed.chunks_exact(g.kernel_height * g.taps() * width).enumerate() {
        let lanes = width.min(g.outputs - panel * width);
        for (row, y) in y.chunks_exact_mut(g.out_row()).enumerate() {
            let whole = lanes == width;
            let (c, c_m) = if whole { (&mut y[panel * width..], g.outputs) } else { (&mut partial[..], width) };
            let a = &padded[row * g.stride * g.padded_row()..];
            assert!(
                a.len() >= (g.kernel_height - 1) * g.padded_row() + (g.out_width - 1) * g.stride * g.inputs + g.taps()
            );
            assert!(c.len() >= (g.out_width - 1) * c_m + width);
            let product = Product {
                m: g.out_width,
                outer: g.kernel_height,
                inner: g.taps(),
                a: a.as_ptr(),
                a_m: g.stride * g.inputs,
                a_outer: g.padded_row(),
                a_inner: 1,
                b: weights.as_ptr(),
                b_outer: g.taps() * width,
                b_inner: width,
                c: c.as_mut_ptr(),
                c_m,
            };
            // SAFETY: the assertions above for A and C; a panel of weights has kernel_height · taps · width elements.
            unsafe { (kernel.run)(product) };
            if !whole {
                for (y, partial) in y.chunks_exact_mut(g.outputs).zip(partial.chunks_exact_mut(width)) {
                    y[panel * width..].iter_mut().zip(&*partial).for_each(|(y, p)| *y += *p);
                    partial.fill(T::ZERO);
                }
            }
        }
    }
}

/// The weights' gradient `(out, in, kh, kw)`.
pub(super) fn weight_gradient<T: Element>(x: &[T], dy: &[T], g: Geometry) -> Vec<T> {
    let kernel = T::kernel(g.outputs);
    let columns = g.outputs.next_multiple_of(kernel.width);
    let size = g.kernel_height * g.taps() * columns;
    let tiles = g.tiles();
    let partial = |tiles: &[Tile]| {
        let (mut sum, mut padded, mut widened) = (vec![T::ZERO; size], Vec::new(), Vec::new());
        for tile in tiles {
            let first = (tile.image * g.out_height + tile.rows.start) * g.out_row();
            let dy = widen(&dy[first..][..tile.rows.len() * g.out_row()], g.outputs, columns, &mut widened);
            weight_gradient_tile(g.padded(x, tile, &mut padded), dy, &mut sum, g, kernel);
        }
        sum
    };
    let share = tiles.len().div_ceil(WEIGHT_TASKS).max(1);
    let partials: Vec<Vec<T>> = tiles.par_chunks(share).map(partial).collect();
    let mut gradient = vec![T::ZERO; g.outputs * g.kernel_height * g.taps()];
    let area = g.kernel_height * g.kernel_width;
    gradient.par_chunks_mut((g.inputs * area).max(1)).enumerate().for_each(|(output, gradient)| {
        for (i, value) in gradient.iter_mut().enumerate() {
            let at = (i % area * g.inputs + i / area) * columns + output;
            partials.iter().for_each(|partial| *value += partial[at]);
        }
    });
    gradient
}

/// Rows of `from` elements as rows of `to`, filled up with zeros.
fn widen<'a, T: Element>(rows: &'a [T], from: usize, to: usize, buffer: &'a mut Vec<T>) -> &'a [T] {
    if from == to {
        return rows;
    }
    buffer.clear();
    buffer.resize(rows.len() / from * to, T::ZERO);
    for (wide, row) in buffer.chunks_exact_mut(to).zip(rows.chunks_exact(from)) {
        wide[..from].copy_from_slice(row);
    }
    buffer
}

/// Adds one tile's share of the weights' gradient to `sum` (kernel row, kernel column, input; output).
fn weight_gradient_tile<T: Element>(padded: &[T], dy: &[T], sum: &mut [T], g: Geometry, kernel: Kernel<T>) {
    let columns = g.outputs.next_multiple_of(kernel.width);
    let dy_row = g.out_width * columns;
    let (rows, step) = (dy.len() / dy_row, (WEIGHT_PIXELS / g.out_width).max(1));
    let needed = ((rows - 1) * g.stride + g.kernel_height - 1) * g.padded_row() + g.padded_row();
    assert!(padded.len() >= needed && sum.len() >= g.kernel_height * g.taps() * columns);
    for first in (0..rows).step_by(step) {
        for ky in 0..g.kernel_height {
            for column in (0..columns).step_by(kernel.width) {
                let product = Product {
                    m: g.taps(),
                    outer: step.min(rows - first),
                    inner: g.out_width,
                    a: padded[(first * g.stride + ky) * g.padded_row()..].as_ptr(),
                    a_m: 1,
                    a_outer: g.stride * g.padded_row(),
                    a_inner: g.stride * g.inputs,
                    b: dy[first * dy_row + column..].as_ptr(),
                    b_outer: dy_row,
                    b_inner: columns,
                    c: sum[ky * g.taps() * columns + column..].as_mut_ptr(),
                    c_m: columns,
                };
                // SAFETY: the assertion above for A and C; `dy` holds `rows` rows of `out_width · columns`.
                unsafe { (kernel.run)(product) };
            }
        }
    }
}
