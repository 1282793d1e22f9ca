//! Two-dimensional convolution in NHWC, forward and backward, with any stride and separate padding on each side.
//!
//! The trick: no im2col. Images are split into tiles of rows that fit the cache ([`geometry`]); a tile is copied once
//! into a padded buffer, which the micro-kernel of [`kernel`] reads in place. The gradient of the input is the same
//! convolution over the gradient of the output with flipped weights; with stride 2 it is four of them, one for each
//! remainder of row and column. 3×3 convolutions with stride 1 run in [`winograd`], optionally with products in bf16.

mod geometry;
mod kernel;
mod loops;
mod region;
pub mod upsample;
mod winograd;

use crate::{
    config::Precision,
    error::{Result, ensure},
    ops::{
        matmul::{
            gemm::rounded_to_f16,
            linear::{column_sums, matmul_weight_dtype},
        },
        simd::Real,
        slices::{by_dtype, fresh, slice, storage, tensor, view},
    },
};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, backend::BackendStorage};
pub use geometry::{Geometry, Padding};
use kernel::Kernel;
use std::borrow::Cow;
use winograd::{Filters, element::WinogradElement, products::Multiplier};

/// `x (b, h, w, in)`, `w (out, in, kh, kw)`, `b (out)` → `(b, h', w', out)`, in f32 (f64: for gradient checks).
///
/// # Errors
/// The stride or the kernel is 0, the padded image is smaller than the kernel, or the channels do not match.
pub fn conv2d(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Tensor> {
    conv2d_in(Precision::F32, x, w, b, stride, padding)
}

/// [`conv2d`] with products in `precision`, also in the backward pass: on a CPU as in [`forward`], on other devices for
/// every product.
///
/// # Errors
/// As [`conv2d`].
pub fn conv2d_in(
    precision: Precision,
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let (_, _, kh, kw) = w.dims4()?;
    let padded = (height + padding.top + padding.bottom, width + padding.left + padding.right);
    ensure!(stride > 0 && kh > 0 && kw > 0, "a convolution needs a stride and a kernel of at least 1");
    ensure!(padded.0 >= kh && padded.1 >= kw, "a {height}×{width} image is too small for a {kh}×{kw} convolution");
    if !x.device().is_cpu() {
        let Some(dtype) = matmul_weight_dtype(precision) else { return composed(x, w, b, stride, padding) };
        let y = composed(&x.to_dtype(dtype)?, &w.to_dtype(dtype)?, None, stride, padding)?.to_dtype(x.dtype())?;
        return Ok(b.map_or(Ok(y.clone()), |b| y.broadcast_add(b))?);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let op = Conv { precision, stride, padding };
    Ok(match b {
        Some(b) => x.apply_op3(&w, &b.contiguous()?, op)?,
        None => x.apply_op2(&w, op)?,
    })
}

/// [`conv2d`] composed of stock candle ops: for other devices, and as the reference in tests.
pub fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Tensor> {
    let x = x.permute((0, 3, 1, 2))?;
    let x = x.pad_with_zeros(2, padding.top, padding.bottom)?.pad_with_zeros(3, padding.left, padding.right)?;
    let y = x.contiguous()?.conv2d(w, 0, stride, 1, 1)?.permute((0, 2, 3, 1))?;
    Ok(match b {
        Some(b) => y.broadcast_add(b)?,
        None => y.contiguous()?,
    })
}

/// `y (b, h', w', out)` = convolution of `x (b, h, w, in)` with `w (out, in, kh, kw)`, + bias, + residual.
///
/// bf16 is used where the processor has fast bf16 instructions, for 3×3 convolutions with stride 1 and 32, 64, ...
/// channels: their factors are rounded after the transforms. All others run in f32. f16 rounds images and weights, as a
/// GPU would.
pub fn forward<T: WinogradElement>(
    precision: Precision,
    x: &[T],
    w: &[T],
    b: Option<&[T]>,
    residual: Option<&[T]>,
    y: &mut [T],
    g: Geometry,
) {
    let [x, w] = &factors(precision, [x, w]);
    match way::<T>(precision, &g) {
        Way::Rounded(unit) => winograd::convolve(unit, x, Filters::Plain(w), b, residual, y, g),
        Way::Winograd(kernel) => winograd::convolve(kernel, x, Filters::Plain(w), b, residual, y, g),
        Way::Direct => loops::convolve(x, w, b, residual, y, g),
    }
}

/// Writes the gradient of `x`, `(b, h, w, in)`, to `dx`, from the gradient `dy (b, h', w', out)` of the output.
pub fn input_gradient<T: WinogradElement>(precision: Precision, dy: &[T], w: &[T], dx: &mut [T], g: Geometry) {
    let [dy, w] = &factors(precision, [dy, w]);
    match way::<T>(precision, &g.transposed()) {
        Way::Rounded(unit) => winograd::convolve(unit, dy, Filters::Flipped(w), None, None, dx, g.transposed()),
        Way::Winograd(kernel) => winograd::convolve(kernel, dy, Filters::Flipped(w), None, None, dx, g.transposed()),
        Way::Direct => loops::convolve_transposed(dy, w, None, dx, g),
    }
}

/// Adds the gradient of `w` to `dw (out, in, kh, kw)`.
pub fn weight_gradient<T: WinogradElement>(precision: Precision, x: &[T], dy: &[T], dw: &mut [T], g: Geometry) {
    let [x, dy] = &factors(precision, [x, dy]);
    match way::<T>(precision, &g) {
        Way::Rounded(unit) => winograd::weight_gradient(unit, x, dy, dw, g),
        Way::Winograd(kernel) => winograd::weight_gradient(kernel, x, dy, dw, g),
        Way::Direct => loops::weight_gradient(x, dy, dw, g),
    }
}

/// The algorithm of a convolution.
enum Way<T: WinogradElement> {
    Rounded(T::Rounded),
    Winograd(Kernel<T>),
    Direct,
}

fn way<T: WinogradElement>(precision: Precision, g: &Geometry) -> Way<T> {
    let kernel = T::kernel(g.outputs);
    match T::rounded(precision) {
        Some(unit) if winograd::fits(g, unit.width()) => Way::Rounded(unit),
        _ if winograd::fits(g, kernel.width) => Way::Winograd(kernel),
        _ => Way::Direct,
    }
}

/// The factors of a product in this precision: f16 rounds them first.
pub(super) fn factors<T: Real>(precision: Precision, factors: [&[T]; 2]) -> [Cow<'_, [T]>; 2] {
    factors.map(|x| match precision {
        Precision::F16 => Cow::Owned(rounded_to_f16(x)),
        Precision::F32 | Precision::Bf16 => Cow::Borrowed(x),
    })
}

#[derive(Clone, Copy)]
struct Conv {
    precision: Precision,
    stride: usize,
    padding: Padding,
}

impl Conv {
    fn geometry(&self, x: &Shape, w: &Shape) -> candle_core::Result<Geometry> {
        let ((b, height, width, inputs), (outputs, w_inputs, kh, kw)) = (x.dims4()?, w.dims4()?);
        if inputs != w_inputs {
            candle_core::bail!("conv2d: input {x:?} does not match the weight {w:?}");
        }
        Ok(Geometry::new([b, height, width, inputs], [outputs, inputs, kh, kw], self.stride, self.padding))
    }

    fn fwd(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let g = self.geometry(lx.shape(), lw.shape())?;
        if let Some((_, lb)) = b
            && lb.dims() != [g.outputs]
        {
            candle_core::bail!("conv2d: bias {:?} does not match the weight {:?}", lb.dims(), lw.dims());
        }
        by_dtype!(x.dtype(), "conv2d", T => {
            let b = b.map(|(b, lb)| slice::<T>(b, lb)).transpose()?;
            let (x, w) = (slice::<T>(x, lx)?, slice(w, lw)?);
            // SAFETY: a convolution writes every element of its output.
            let y = unsafe { fresh(g.output().iter().product(), |y| forward(self.precision, x, w, b, None, y, g)) };
            storage(y, g.output().to_vec())
        })
    }

    /// Gradients of x, w and b.
    fn bwd(&self, x: &Tensor, w: &Tensor, dy: &Tensor) -> candle_core::Result<[Option<Tensor>; 3]> {
        let g = self.geometry(x.shape(), w.shape())?;
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "conv2d", T => {
            let (xs, ws, dys) = (view::<T>(x)?, view::<T>(w)?, view::<T>(&dy)?);
            // SAFETY: the gradient is written to every element.
            let dx = || unsafe { fresh(x.elem_count(), |dx| input_gradient(self.precision, &dys, &ws, dx, g)) };
            let dw = || {
                let mut dw = vec![<T as Real>::ZERO; w.elem_count()];
                weight_gradient(self.precision, &xs, &dys, &mut dw, g);
                dw
            };
            let dx = x.track_op().then(|| tensor(dx(), x.shape()));
            let dw = w.track_op().then(|| tensor(dw(), w.shape()));
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
    type Case = ([usize; 4], usize, [usize; 2], usize, Padding);

    const CASES: [Case; 9] = [
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
    fn gradients_equal_finite_differences() -> Result<()> {
        for (x, outputs, kernel, stride, padding) in CASES {
            let vars = vars(x, outputs, kernel, DType::F64);
            assert_gradients(&vars, &|v| conv2d(&v[0], &v[1], Some(&v[2]), stride, padding))?;
        }
        Ok(())
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        let larger = [
            ([2, 16, 16, 32], 40, [3, 3], 1, Padding::same(1)),
            ([1, 70, 70, 16], 64, [3, 3], 1, Padding::same(1)),
            ([2, 32, 32, 33], 32, [3, 3], 2, DOWN),
            ([3, 9, 9, 64], 17, [1, 1], 1, Padding::same(0)),
        ];
        for (x, outputs, kernel, stride, padding) in CASES.into_iter().chain(larger) {
            let vars = vars(x, outputs, kernel, DType::F32);
            // candle's gradient of a strided convolution requires sizes that are multiples of the stride: compare only
            // those.
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
    fn in_f16_every_product_has_rounded_factors() -> Result<()> {
        let cases = [([2, 5, 7, 3], 4, [3, 3], 1, Padding::same(1)), ([1, 6, 6, 32], 32, [3, 3], 1, Padding::same(1))];
        for (x, outputs, kernel, stride, padding) in cases {
            let [x, w, b] = vars(x, outputs, kernel, DType::F32);
            let round =
                |x: &Tensor| x.to_dtype(DType::F16).and_then(|x| x.to_dtype(DType::F32)).map(|x| x.contiguous());
            let rounded = [Var::from_tensor(&round(&x)??)?, Var::from_tensor(&round(&w)??)?];
            let ours = conv2d_in(Precision::F16, &x, &w, Some(&b), stride, padding)?;
            let theirs = conv2d(&rounded[0], &rounded[1], Some(&b), stride, padding)?;
            assert_eq!(values(&ours), values(&theirs));
            assert_ne!(values(&ours), values(&conv2d(&x, &w, Some(&b), stride, padding)?));
            let dy = normal("dy", ours.dims(), DType::F32);
            let (ours, theirs) = ((ours * dy.as_tensor())?.backward()?, (theirs * round(&dy)??)?.backward()?);
            for (a, b) in [&x, &w].into_iter().zip(&rounded) {
                assert_eq!(ours.get(a).map(values), theirs.get(b).map(values));
            }
        }
        Ok(())
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
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
