//! Two-dimensional convolution in NHWC, forward and backward, any stride, padding on each side by itself.
//!
//! Pictures are cut into tiles of rows that fit the cache; a tile is copied once into a padded buffer, which
//! the micro-kernel of [`super::conv_kernel`] then reads in place (no im2col). The input's gradient is the same
//! convolution over the output's gradient with flipped weights; where the stride is 2 the copy into the padded
//! buffer spreads its pixels.

use super::{
    conv_kernel::{Element, Kernel, Product},
    linear::column_sums,
    slices::{by_dtype, fresh, slice, storage, tensor, view},
};
use crate::error::{Result, ensure};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;
use std::ops::Range;

/// Zero pixels around a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Padding {
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Padding {
    /// The same on every side.
    pub const fn same(pixels: usize) -> Self {
        Self { top: pixels, bottom: pixels, left: pixels, right: pixels }
    }
}

/// `x (b, h, w, in)`, `w (out, in, kh, kw)`, `b (out)` → `(b, h', w', out)`.
pub fn conv2d(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let (_, _, kh, kw) = w.dims4()?;
    let padded = (height + padding.top + padding.bottom, width + padding.left + padding.right);
    ensure!(stride > 0 && kh > 0 && kw > 0, "a convolution needs a stride and a kernel of at least 1");
    ensure!(padded.0 >= kh && padded.1 >= kw, "a {height}×{width} picture is too small for a {kh}×{kw} convolution");
    if !x.device().is_cpu() {
        return composed(x, w, b, stride, padding);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let op = Conv { stride, padding };
    Ok(match b {
        Some(b) => x.apply_op3(&w, &b.contiguous()?, op)?,
        None => x.apply_op2(&w, op)?,
    })
}

/// The same from stock candle ops.
pub fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Tensor> {
    let x = x.permute((0, 3, 1, 2))?;
    let x = x.pad_with_zeros(2, padding.top, padding.bottom)?.pad_with_zeros(3, padding.left, padding.right)?;
    let y = x.contiguous()?.conv2d(w, 0, stride, 1, 1)?.permute((0, 2, 3, 1))?;
    Ok(match b {
        Some(b) => y.broadcast_add(b)?,
        None => y.contiguous()?,
    })
}

/// The sizes of one convolution, or of the one that gives its input's gradient.
#[derive(Clone, Copy)]
struct Geometry {
    images: usize,
    height: usize,
    width: usize,
    inputs: usize,
    out_height: usize,
    out_width: usize,
    outputs: usize,
    kernel_height: usize,
    kernel_width: usize,
    stride: usize,
    /// Padded rows above and columns left of the picture; negative where the picture is cut.
    top: isize,
    left: isize,
    /// Distance of the picture's pixels in the padded buffer; more than 1 in the gradient of a strided convolution.
    spread: usize,
}

/// Elements of the padded buffer that a tile aims at: a quarter of a megabyte, so that L2 holds it beside
/// weights and output.
const TILE: usize = 1 << 16;

/// Output pixels whose gradients stay in L1 while all rows of the weights' gradient pass over them.
const WEIGHT_PIXELS: usize = 128;

/// Tasks that add up the weights' gradient, each over its share of the tiles: fixed, so that the result does
/// not depend on the number of threads.
const WEIGHT_TASKS: usize = 8;

/// Rows of the output of one image.
#[derive(Clone)]
struct Tile {
    image: usize,
    rows: Range<usize>,
}

impl Geometry {
    fn new(x: &Shape, w: &Shape, stride: usize, padding: Padding) -> candle_core::Result<Self> {
        let (images, height, width, inputs) = x.dims4()?;
        let (outputs, w_inputs, kernel_height, kernel_width) = w.dims4()?;
        if inputs != w_inputs {
            candle_core::bail!("conv2d: input {x:?} does not fit the weight {w:?}");
        }
        Ok(Self {
            images,
            height,
            width,
            inputs,
            out_height: (height + padding.top + padding.bottom - kernel_height) / stride + 1,
            out_width: (width + padding.left + padding.right - kernel_width) / stride + 1,
            outputs,
            kernel_height,
            kernel_width,
            stride,
            top: padding.top as isize,
            left: padding.left as isize,
            spread: 1,
        })
    }

    /// The convolution (of the output's gradient, with flipped weights) that gives the input's gradient.
    fn transposed(self) -> Self {
        Self {
            height: self.out_height,
            width: self.out_width,
            inputs: self.outputs,
            out_height: self.height,
            out_width: self.width,
            outputs: self.inputs,
            stride: 1,
            top: self.kernel_height as isize - 1 - self.top,
            left: self.kernel_width as isize - 1 - self.left,
            spread: self.stride,
            ..self
        }
    }

    /// Elements of a row of the padded buffer.
    fn padded_row(&self) -> usize {
        ((self.out_width - 1) * self.stride + self.kernel_width) * self.inputs
    }

    fn out_row(&self) -> usize {
        self.out_width * self.outputs
    }

    /// Weights of one output channel in one kernel row: neighbours in the padded buffer.
    fn taps(&self) -> usize {
        self.kernel_width * self.inputs
    }

    fn tile_rows(&self) -> usize {
        (TILE / (self.padded_row() * self.stride).max(1)).clamp(1, self.out_height)
    }

    fn tile(&self, image: usize, index: usize) -> Tile {
        let first = index * self.tile_rows();
        Tile { image, rows: first..(first + self.tile_rows()).min(self.out_height) }
    }

    fn tiles(&self) -> Vec<Tile> {
        let per_image = self.out_height.div_ceil(self.tile_rows());
        (0..self.images * per_image).map(|i| self.tile(i / per_image, i % per_image)).collect()
    }

    /// The part of the padded picture that a tile reads: the picture itself where nothing is padded.
    fn padded<'a, T: Element>(&self, x: &'a [T], tile: &Tile, buffer: &'a mut Vec<T>) -> &'a [T] {
        let image = &x[tile.image * self.height * self.width * self.inputs..][..self.height * self.width * self.inputs];
        if self.kernel_height * self.kernel_width * self.stride * self.spread == 1 && (self.top, self.left) == (0, 0) {
            return &image[tile.rows.start * self.padded_row()..tile.rows.end * self.padded_row()];
        }
        let rows = (tile.rows.len() - 1) * self.stride + self.kernel_height;
        buffer.resize(rows * self.padded_row(), T::ZERO);
        for (i, out) in buffer.chunks_exact_mut(self.padded_row()).enumerate() {
            let row = (tile.rows.start * self.stride + i) as isize - self.top;
            match source(row, self.spread, self.height) {
                Some(row) => self.pad_row(&image[row * self.width * self.inputs..][..self.width * self.inputs], out),
                None => out.fill(T::ZERO),
            }
        }
        buffer
    }

    fn pad_row<T: Element>(&self, row: &[T], out: &mut [T]) {
        let inputs = self.inputs;
        if self.spread > 1 {
            for (i, out) in out.chunks_exact_mut(inputs).enumerate() {
                match source(i as isize - self.left, self.spread, self.width) {
                    Some(column) => out.copy_from_slice(&row[column * inputs..][..inputs]),
                    None => out.fill(T::ZERO),
                }
            }
            return;
        }
        let (before, cut) = (self.left.max(0) as usize * inputs, (-self.left).max(0) as usize * inputs);
        let row = &row[cut.min(row.len())..];
        let before = before.min(out.len());
        let copied = row.len().min(out.len() - before);
        out[..before].fill(T::ZERO);
        out[before..before + copied].copy_from_slice(&row[..copied]);
        out[before + copied..].fill(T::ZERO);
    }
}

/// The row or column of the picture that lies at `position` of the spread one, if there is one.
fn source(position: isize, spread: usize, length: usize) -> Option<usize> {
    let position = usize::try_from(position).ok()?;
    (position.is_multiple_of(spread) && position / spread < length).then_some(position / spread)
}

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
fn convolve<T: Element>(x: &[T], w: &[T], b: Option<&[T]>, g: Geometry, flipped: bool) -> Vec<T> {
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
fn weight_gradient<T: Element>(x: &[T], dy: &[T], g: Geometry) -> Vec<T> {
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

#[derive(Clone, Copy)]
struct Conv {
    stride: usize,
    padding: Padding,
}

impl Conv {
    fn fwd(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let g = Geometry::new(lx.shape(), lw.shape(), self.stride, self.padding)?;
        if let Some((_, lb)) = b
            && lb.dims() != [g.outputs]
        {
            candle_core::bail!("conv2d: bias {:?} does not fit the weight {:?}", lb.dims(), lw.dims());
        }
        by_dtype!(x.dtype(), "conv2d", T => {
            let b = b.map(|(b, lb)| slice::<T>(b, lb)).transpose()?;
            let y = convolve::<T>(slice(x, lx)?, slice(w, lw)?, b, g, false);
            storage(y, (g.images, g.out_height, g.out_width, g.outputs))
        })
    }

    /// Gradients of x, w and b.
    fn bwd(&self, x: &Tensor, w: &Tensor, dy: &Tensor) -> candle_core::Result<[Option<Tensor>; 3]> {
        let g = Geometry::new(x.shape(), w.shape(), self.stride, self.padding)?;
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "conv2d", T => {
            let (xs, ws, dys) = (view::<T>(x)?, view::<T>(w)?, view::<T>(&dy)?);
            let dx = x.track_op().then(|| tensor(convolve(&dys, &ws, None, g.transposed(), true), x.shape()));
            let dw = w.track_op().then(|| tensor(weight_gradient(&xs, &dys, g), w.shape()));
            let db = tensor(column_sums(&dys, g.outputs), g.outputs)?;
            Ok([dx.transpose()?, dw.transpose()?, Some(db)])
        })
    }
}

impl CustomOp2 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd((x, lx), (w, lw), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = Conv::bwd(self, x, w, dy)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd((x, lx), (w, lw), Some((b, lb)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(Conv::bwd(self, x, w, dy)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Var};

    const DOWN: Padding = Padding { top: 0, bottom: 1, left: 0, right: 1 };

    /// Input shape, outputs, kernel, stride, padding.
    const CASES: [([usize; 4], usize, [usize; 2], usize, Padding); 9] = [
        ([1, 1, 1, 1], 1, [1, 1], 1, Padding::same(0)),
        ([2, 5, 7, 3], 4, [3, 3], 1, Padding::same(1)),
        ([2, 6, 6, 4], 3, [3, 3], 2, DOWN),
        ([1, 7, 5, 2], 5, [3, 3], 2, DOWN),
        ([2, 4, 3, 5], 9, [1, 1], 1, Padding::same(0)),
        ([1, 5, 5, 2], 2, [1, 1], 2, Padding::same(0)),
        ([1, 6, 8, 2], 3, [4, 4], 2, Padding::same(1)),
        ([1, 4, 4, 2], 3, [3, 1], 1, Padding { top: 2, bottom: 0, left: 0, right: 3 }),
        ([1, 5, 5, 1], 1, [2, 3], 3, Padding { top: 3, bottom: 2, left: 1, right: 0 }),
    ];

    fn vars(x: [usize; 4], outputs: usize, [kh, kw]: [usize; 2], dtype: DType) -> [Var; 3] {
        [normal("x", &x, dtype), normal("w", &[outputs, x[3], kh, kw], dtype), normal("b", &[outputs], dtype)]
    }

    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        for (x, outputs, kernel, stride, padding) in CASES {
            let vars = vars(x, outputs, kernel, DType::F64);
            assert_gradients(&vars, &|v| conv2d(&v[0], &v[1], Some(&v[2]), stride, padding))?;
        }
        Ok(())
    }

    #[test]
    fn fused_is_composed() -> Result<()> {
        let larger = [
            ([2, 16, 16, 32], 40, [3, 3], 1, Padding::same(1)),
            ([1, 70, 70, 16], 64, [3, 3], 1, Padding::same(1)),
            ([2, 32, 32, 33], 32, [3, 3], 2, DOWN),
            ([3, 9, 9, 64], 17, [1, 1], 1, Padding::same(0)),
        ];
        for (x, outputs, kernel, stride, padding) in CASES.into_iter().chain(larger) {
            let vars = vars(x, outputs, kernel, DType::F32);
            // candle's gradient of a strided convolution wants sizes that divide: compare where it has one.
            let whole = x[1].is_multiple_of(2) && stride < 3;
            let ours = |v: &[Tensor]| conv2d(&v[0], &v[1], Some(&v[2]), stride, padding);
            let stock = |v: &[Tensor]| composed(&v[0], &v[1], Some(&v[2]), stride, padding);
            if whole || stride == 1 {
                assert_same(&vars, 3e-5, &ours, &stock)?;
            } else {
                let tensors = vars.each_ref().map(|v| v.as_tensor().detach());
                let (a, b) = (values(&ours(&tensors)?), values(&stock(&tensors)?));
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4));
            }
        }
        Ok(())
    }

    #[test]
    fn threads_do_not_matter() -> Result<()> {
        for (x, stride) in [([5, 20, 20, 24], 1), ([2, 64, 64, 32], 2)] {
            let vars = vars(x, 32, [3, 3], DType::F32);
            assert_thread_independent(&vars, &|v| conv2d(&v[0], &v[1], Some(&v[2]), stride, DOWN))?;
        }
        Ok(())
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let [x, w, b] = vars([1, 2, 2, 3], 4, [3, 3], DType::F32);
        assert!(conv2d(&x, &w, Some(&b), 1, Padding::same(0)).is_err());
        assert!(conv2d(&x, &w, Some(&b), 0, Padding::same(1)).is_err());
        assert!(conv2d(&x, &w.narrow(1, 0, 2).unwrap(), Some(&b), 1, Padding::same(1)).is_err());
    }
}
