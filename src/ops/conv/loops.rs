//! The loops of a convolution over tiles, panels of weights and kernel rows.

use super::{
    geometry::{Geometry, Tile},
    kernel::{Element, Kernel, Product},
};
use rayon::prelude::*;

/// Number of output pixels whose gradients stay in L1 while all rows of the weights' gradient are updated.
const WEIGHT_PIXELS: usize = 128;

/// Number of tasks that sum the weights' gradient, each over its share of the tiles. It is fixed, so that the result
/// does not depend on the number of threads.
const WEIGHT_TASKS: usize = 8;

/// An ordinary convolution whose outputs are every `step`-th pixel of an image, starting at (`row`, `column`). A
/// convolution is one phase of step 1; the gradient of its input is `stride²` phases, one for each remainder.
struct Phase<T> {
    g: Geometry,
    row: usize,
    column: usize,
    weights: Vec<T>,
}

/// Packs weights in panels of the kernel's width: (panel, kernel row, kernel column, input, lane), zeros beyond the
/// last output.
fn pack<T: Element>(g: Geometry, width: usize, at: impl Fn(usize, usize, usize, usize) -> T + Sync) -> Vec<T> {
    let (kh, kw, panels) = (g.kernel_height, g.kernel_width, g.outputs.div_ceil(width));
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

/// `y (b, h', w', out)`: convolution, bias and residual.
pub(super) fn convolve<T: Element>(
    x: &[T],
    w: &[T],
    b: Option<&[T]>,
    residual: Option<&[T]>,
    y: &mut [T],
    g: Geometry,
) {
    let at = |output, ky, kx, input| w[((output * g.inputs + input) * g.kernel_height + ky) * g.kernel_width + kx];
    let weights = pack(g, T::kernel(g.outputs).width, at);
    run(x, &[Phase { g, row: 0, column: 0, weights }], 1, b, residual, (y, g.out_height, g.out_width));
}

/// `dx (b, h, w, in)` of `dy (b, h', w', out)`: with the bias, a transposed convolution of `dy`.
pub(super) fn convolve_transposed<T: Element>(dy: &[T], w: &[T], b: Option<&[T]>, dx: &mut [T], g: Geometry) {
    let phases: Vec<_> = (0..g.stride * g.stride).filter_map(|i| phase(w, g, i / g.stride, i % g.stride)).collect();
    run(dy, &phases, g.stride, b, None, (dx, g.height, g.width));
}

/// The pixels of `dx` with these remainders of row and column: pixel r gets contributions from `(r + top - k) / stride`
/// for the kernel rows k that make this an integer.
fn phase<T: Element>(w: &[T], g: Geometry, row: usize, column: usize) -> Option<Phase<T>> {
    let line = |first: usize, padding: isize, kernel: usize, length: usize| {
        let at = first as isize + padding;
        let k = at.rem_euclid(g.stride as isize) as usize;
        let taps = kernel.saturating_sub(k).div_ceil(g.stride);
        let before = taps as isize - 1 - at.div_euclid(g.stride as isize);
        (k, taps, before, length.saturating_sub(first).div_ceil(g.stride))
    };
    let (ky, kernel_height, top, out_height) = line(row, g.top, g.kernel_height, g.height);
    let (kx, kernel_width, left, out_width) = line(column, g.left, g.kernel_width, g.width);
    let sizes = Geometry {
        images: g.images,
        height: g.out_height,
        width: g.out_width,
        inputs: g.outputs,
        out_height,
        out_width,
        outputs: g.inputs,
        kernel_height,
        kernel_width,
        stride: 1,
        top,
        left,
    };
    if kernel_height * kernel_width * out_height * out_width == 0 {
        return None;
    }
    let at = |output, y, x, input| {
        let (y, x) = (ky + g.stride * (kernel_height - 1 - y), kx + g.stride * (kernel_width - 1 - x));
        w[((input * g.inputs + output) * g.kernel_height + y) * g.kernel_width + x]
    };
    let weights = pack(sizes, T::kernel(g.inputs).width, at);
    Some(Phase { g: sizes, row, column, weights })
}

/// All phases over the same image, tile by tile; `y` is `(images, height, width, outputs)`.
fn run<T: Element>(
    x: &[T],
    phases: &[Phase<T>],
    step: usize,
    b: Option<&[T]>,
    residual: Option<&[T]>,
    (y, height, width): (&mut [T], usize, usize),
) {
    let Some(Phase { g, .. }) = phases.first() else { return y.fill(T::ZERO) };
    let (outputs, row, tile_rows) = (g.outputs, width * g.outputs, g.tile_rows());
    let tiles = y.par_chunks_mut(height * row).enumerate().flat_map(|(image, y)| {
        y.par_chunks_mut(step * tile_rows * row).enumerate().map(move |(i, y)| (image, i * tile_rows, y))
    });
    tiles.for_each_init(Vec::new, |buffer, (image, first, y)| {
        let from = (image * height + first * step) * row;
        start(y, b, residual.map(|r| &r[from..]), outputs);
        for phase in phases {
            let rows = (y.len() / row).saturating_sub(phase.row).div_ceil(step);
            if rows > 0 {
                let tile = Tile { image, rows: first..first + rows };
                let place = Place { row: step * row, pixel: step * outputs };
                let y = &mut y[phase.row * row + phase.column * outputs..];
                convolve_tile(phase.g.padded(x, &tile, buffer), &phase.weights, (y, place, rows), phase.g);
            }
        }
    });
}

/// Initializes the sums of a convolution with bias and residual.
fn start<T: Element>(y: &mut [T], b: Option<&[T]>, residual: Option<&[T]>, outputs: usize) {
    match residual {
        Some(residual) => y.copy_from_slice(&residual[..y.len()]),
        None => y.fill(T::ZERO),
    }
    if let Some(b) = b {
        y.chunks_exact_mut(outputs).for_each(|y| y.iter_mut().zip(b).for_each(|(y, b)| *y += *b));
    }
}

/// Strides of the output's rows and pixels.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    pixel: usize,
}

/// Adds the convolution of one padded tile to its rows of the output.
fn convolve_tile<T: Element>(padded: &[T], packed: &[T], (y, place, rows): (&mut [T], Place, usize), g: Geometry) {
    let kernel = T::kernel(g.outputs);
    let width = kernel.width;
    let mut partial = vec![T::ZERO; if g.outputs.is_multiple_of(width) { 0 } else { g.out_width * width }];
    for (panel, weights) in packed.chunks_exact(g.kernel_height * g.taps() * width).enumerate() {
        let lanes = width.min(g.outputs - panel * width);
        for row in 0..rows {
            let whole = lanes == width;
            let y = &mut y[row * place.row + panel * width..];
            let (c, c_m) = if whole { (&mut *y, place.pixel) } else { (&mut partial[..], width) };
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
                fresh: !whole,
            };
            // SAFETY: the assertions above for A and C; a panel of weights has kernel_height · taps · width elements.
            unsafe { (kernel.run)(product) };
            if !whole {
                for (y, partial) in y.chunks_mut(place.pixel).zip(partial.chunks_exact(width)) {
                    y.iter_mut().zip(&partial[..lanes]).for_each(|(y, p)| *y += *p);
                }
            }
        }
    }
}

/// Adds the weights' gradient to `dw (out, in, kh, kw)`.
pub(super) fn weight_gradient<T: Element>(x: &[T], dy: &[T], dw: &mut [T], g: Geometry) {
    let kernel = T::kernel(g.outputs);
    let columns = g.outputs.next_multiple_of(kernel.width);
    let size = g.kernel_height * g.taps() * columns;
    let tiles = g.tiles();
    let partial = |tiles: &[Tile]| {
        let (mut sum, mut padded, mut panels) = (vec![T::ZERO; size], Vec::new(), Vec::new());
        for tile in tiles {
            let first = (tile.image * g.out_height + tile.rows.start) * g.out_row();
            let dy = &dy[first..][..tile.rows.len() * g.out_row()];
            weight_gradient_tile(g.padded(x, tile, &mut padded), dy, &mut panels, &mut sum, g, kernel);
        }
        sum
    };
    let share = tiles.len().div_ceil(WEIGHT_TASKS).max(1);
    let partials: Vec<Vec<T>> = tiles.par_chunks(share).map(partial).collect();
    let sums = sum_partials(partials);
    let (area, filter) = (g.kernel_height * g.kernel_width, g.kernel_height * g.taps());
    dw.par_chunks_mut((BLOCK * filter).max(1)).enumerate().for_each(|(block, dw)| {
        for (at, sums) in sums.chunks_exact(columns).enumerate() {
            let to = at % g.inputs * area + at / g.inputs;
            let sums = &sums[block * BLOCK..];
            dw.chunks_exact_mut(filter).zip(sums).for_each(|(dw, sum)| dw[to] += *sum);
        }
    });
}

/// Number of adjacent outputs whose gradients one task writes.
pub(super) const BLOCK: usize = 16;

/// Sums the tasks' results, always in the same order.
pub(super) fn sum_partials<T: Element>(mut partials: Vec<Vec<T>>) -> Vec<T> {
    const CHUNK: usize = 1 << 14;
    let Some(mut total) = partials.pop() else { return Vec::new() };
    total.par_chunks_mut(CHUNK).enumerate().for_each(|(i, total)| {
        for partial in &partials {
            total.iter_mut().zip(&partial[i * CHUNK..]).for_each(|(t, p)| *t += *p);
        }
    });
    total
}

/// Rows of `outputs` elements as panels of `width` columns, (panel, row, lane), padded with zeros, in the order in
/// which the kernel reads them.
fn into_panels<T: Element>(rows: &[T], outputs: usize, width: usize, panels: &mut Vec<T>) {
    let count = rows.len() / outputs;
    panels.resize(count * outputs.next_multiple_of(width), T::ZERO);
    for (panel, lanes) in panels.chunks_exact_mut(count * width).enumerate() {
        let used = panel * width..outputs.min((panel + 1) * width);
        for (lanes, row) in lanes.chunks_exact_mut(width).zip(rows.chunks_exact(outputs)) {
            lanes[..used.len()].copy_from_slice(&row[used.clone()]);
            lanes[used.len()..].fill(T::ZERO);
        }
    }
}

/// Adds one tile's share of the weights' gradient to `sum` (kernel row, kernel column, input; output).
fn weight_gradient_tile<T: Element>(
    padded: &[T],
    dy: &[T],
    panels: &mut Vec<T>,
    sum: &mut [T],
    g: Geometry,
    kernel: Kernel<T>,
) {
    let (columns, width) = (g.outputs.next_multiple_of(kernel.width), kernel.width);
    let (rows, step) = (dy.len() / g.out_row(), (WEIGHT_PIXELS / g.out_width).max(1));
    let needed = ((rows - 1) * g.stride + g.kernel_height) * g.padded_row();
    assert!(padded.len() >= needed && sum.len() >= g.kernel_height * g.taps() * columns);
    for (i, dy) in dy.chunks(step * g.out_row()).enumerate() {
        into_panels(dy, g.outputs, width, panels);
        let pixels = dy.len() / g.outputs;
        for ky in 0..g.kernel_height {
            for (column, panel) in panels.chunks_exact(pixels * width).enumerate() {
                let product = Product {
                    m: g.taps(),
                    outer: pixels / g.out_width,
                    inner: g.out_width,
                    a: padded[(i * step * g.stride + ky) * g.padded_row()..].as_ptr(),
                    a_m: 1,
                    a_outer: g.stride * g.padded_row(),
                    a_inner: g.stride * g.inputs,
                    b: panel.as_ptr(),
                    b_outer: g.out_width * width,
                    b_inner: width,
                    c: sum[ky * g.taps() * columns + column * width..].as_mut_ptr(),
                    c_m: columns,
                    fresh: false,
                };
                // SAFETY: the assertion above for A and C; a panel holds `width` lanes of every pixel.
                unsafe { (kernel.run)(product) };
            }
        }
    }
}
