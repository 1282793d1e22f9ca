//! The activation functions of imported towers: GELU by the error function (BERT) and QuickGELU (CLIP), beside
//! [`gelu`](mod@super::gelu).

use super::gelu;
use crate::{
    config::Activation,
    error::Result,
    ops::{
        simd::{Real, multiversion},
        slices::{CHUNK, by_dtype, fresh, has_cpu_kernels, in_f32, slice, storage, tensor, view},
    },
    runtime::Kernels,
};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// The activation of each element of a tensor of any shape.
pub fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    match kind {
        Activation::Gelu => gelu::gelu(x),
        _ if has_cpu_kernels(x) => Ok(x.contiguous()?.apply_op1(Activated(kind))?),
        _ => in_f32(x, |x| composed(kind, x)),
    }
}

/// [`activation()`] on other devices than CPUs, and for half precision.
pub(crate) fn on_device(kernels: Kernels, kind: Activation, x: &Tensor) -> Result<Tensor> {
    match kind {
        Activation::Gelu => gelu::on_device(kernels, x),
        _ => in_f32(x, |x| composed(kind, x)),
    }
}

/// [`activation()`] from stock candle ops.
pub(crate) fn composed(kind: Activation, x: &Tensor) -> Result<Tensor> {
    match kind {
        Activation::Gelu => gelu::composed(x),
        Activation::GeluErf => Ok((x * ((x / std::f64::consts::SQRT_2)?.erf()? + 1.0)?)?.affine(0.5, 0.0)?),
        Activation::QuickGelu => Ok((x / ((x * -QUICK)?.exp()? + 1.0)?)?),
    }
}

/// The slope of QuickGELU, `x · σ(1.702 x)`.
const QUICK: f64 = 1.702;

/// The activation of each element.
pub fn forward<T: Real>(kind: Activation, x: &[T]) -> Vec<T> {
    let each = |chunk: fn(&mut [T], &[T])| {
        let fill = |y: &mut [T]| y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| chunk(y, x));
        // SAFETY: the chunk functions write every element.
        unsafe { fresh(x.len(), fill) }
    };
    match kind {
        Activation::Gelu => gelu::forward(x),
        Activation::GeluErf => each(erf_chunk),
        Activation::QuickGelu => each(quick_chunk),
    }
}

/// The gradient of x from the gradient `dy` of the output.
pub fn backward<T: Real>(kind: Activation, x: &[T], dy: &[T]) -> Vec<T> {
    let each = |chunk: fn(&mut [T], &[T], &[T])| {
        let fill = |dx: &mut [T]| {
            let chunks = dx.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
            chunks.for_each(|((dx, x), dy)| chunk(dx, x, dy));
        };
        // SAFETY: the chunk functions write every element.
        unsafe { fresh(x.len(), fill) }
    };
    match kind {
        Activation::Gelu => gelu::backward(x, dy),
        Activation::GeluErf => each(erf_backward_chunk),
        Activation::QuickGelu => each(quick_backward_chunk),
    }
}

/// The standard normal distribution function Φ(x) and its density, by Abramowitz and Stegun 7.1.26: the error of Φ is
/// below 7.5e-8.
#[inline(always)]
fn distribution<T: Real>(x: T) -> (T, T) {
    const POLYNOMIAL: [f64; 5] = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let square = Real::exp(x * x * T::from_f64(-0.5));
    let size = if x < T::ZERO { -x } else { x };
    let t = T::ONE / (T::ONE + size * T::from_f64(0.327_591_1 * std::f64::consts::FRAC_1_SQRT_2));
    let tail = POLYNOMIAL.into_iter().fold(T::ZERO, |sum, factor| sum * t + T::from_f64(factor)) * t * square;
    let half = T::from_f64(0.5) * tail;
    let below = if x < T::ZERO { half } else { T::ONE - half };
    (below, square * T::from_f64(0.398_942_280_401_432_7))
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + Real::exp(-x))
}

multiversion! {
    fn erf_chunk<T: Real, const FMA: bool>(y: &mut [T], x: &[T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * distribution(x).0);
    }
}

multiversion! {
    fn erf_backward_chunk<T: Real, const FMA: bool>(dx: &mut [T], x: &[T], dy: &[T]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let (below, density) = distribution(x);
            *dx = dy * (below + x * density);
        }
    }
}

multiversion! {
    fn quick_chunk<T: Real, const FMA: bool>(y: &mut [T], x: &[T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * sigmoid(x * T::from_f64(QUICK)));
    }
}

multiversion! {
    fn quick_backward_chunk<T: Real, const FMA: bool>(dx: &mut [T], x: &[T], dy: &[T]) {
        let slope = T::from_f64(QUICK);
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let s = sigmoid(x * slope);
            *dx = dy * (s + x * slope * s * (T::ONE - s));
        }
    }
}

struct Activated(Activation);

impl CustomOp1 for Activated {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        by_dtype!(x.dtype(), "activation", T => storage(forward::<T>(self.0, slice(x, layout)?), layout.shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "activation", T => tensor(backward::<T>(self.0, &view(x)?, &view(&dy)?), x.shape()).map(Some))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Device};

    const KINDS: [Activation; 2] = [Activation::GeluErf, Activation::QuickGelu];

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for kind in KINDS {
            for shape in [&[7, 5][..], &[3, 5, 17], &[20_001]] {
                let x = [normal("x", shape, DType::F32)];
                let same = || assert_same(&x, 2e-6, &|v| activation(kind, &v[0]), &|v| composed(kind, &v[0]));
                at_each_level(same)?;
            }
        }
        Ok(())
    }

    /// Values of the formulas in double precision (Python's `math.erf` and `math.exp`).
    #[test]
    fn known_values() -> Result<()> {
        let x = Tensor::new(&[-3f32, -1.0, -0.1, 0.0, 0.5, 2.0], &Device::Cpu)?;
        let expected = [
            [-0.004_049_694, -0.158_655_254, -0.046_017_216, 0.0, 0.345_731_231, 1.954_499_736],
            [-0.018_071_310, -0.154_204_234, -0.045_755_242, 0.0, 0.350_388_364, 1.935_658_623],
        ];
        for (kind, expected) in KINDS.into_iter().zip(expected) {
            for (y, expected) in values(&activation(kind, &x)?).iter().zip(expected) {
                assert!((y - expected).abs() < 1e-6, "{kind:?}: {y} instead of {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        // The distribution function is approximated, its density is not: f64 shows the difference.
        let quick = |v: &[Tensor]| activation(Activation::QuickGelu, &v[0]);
        assert_gradients(&[normal("x", &[5, 4], DType::F64)], &quick)
    }
}
