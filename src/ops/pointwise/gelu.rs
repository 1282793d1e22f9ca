//! GELU in its tanh approximation: `x · ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))` = `x · σ(2u)`, where u is the argument
//! of tanh.

use super::gelu_cuda;
use crate::{
    error::Result,
    ops::{
        cuda,
        custom_gradient::custom_gradient,
        simd::{Real, multiversion},
        slices::{CHUNK, by_dtype, fresh, has_cpu_kernels, in_f32, is_half, slice, storage, tensor, view},
    },
    runtime::{self, Kernels},
};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// GELU of each element of a tensor of any shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !has_cpu_kernels(x) {
        return on_device(runtime::kernels(), x);
    }
    Ok(x.contiguous()?.apply_op1(Gelu)?)
}

/// [`gelu()`] on other devices than CPUs, and for half precision.
pub(crate) fn on_device(kernels: Kernels, x: &Tensor) -> Result<Tensor> {
    if cuda::takes(kernels, &[x]) {
        return Ok(gelu_cuda::gelu(x)?);
    }
    custom_gradient("gelu", &[x], |args| in_f32(&args[0], composed), |args, _, dy| composed_backward(args[0], dy))
}

/// [`gelu()`] from stock candle ops; candle's own `gelu` rounds its constants to six digits in the gradient.
pub(crate) fn composed(x: &Tensor) -> Result<Tensor> {
    let u = ((x * &(x.sqr()? * CUBIC)?)? + x)?;
    Ok((x * ((u * SLOPE)?.tanh()? + 1.0)?)?.affine(0.5, 0.0)?)
}

/// dx as [`backward`], computed in f32 for x in half precision, and in the type of x.
fn composed_backward(x: &Tensor, dy: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    let wide = if is_half(x.dtype()) { DType::F32 } else { x.dtype() };
    let slope = composed_slope(&x.to_dtype(wide)?)?;
    Ok(vec![(dy.to_dtype(wide)? * slope)?.to_dtype(x.dtype())?])
}

/// d gelu(x) / dx = ½ (1 + tanh u + x (1 − tanh² u) u′).
fn composed_slope(x: &Tensor) -> candle_core::Result<Tensor> {
    let square = x.sqr()?;
    let tanh = (x * square.affine(SLOPE * CUBIC, SLOPE)?)?.tanh()?;
    let rise = (x * square.affine(3.0 * SLOPE * CUBIC, SLOPE)?)?;
    drop(square);
    let flat = tanh.sqr()?.affine(-1.0, 1.0)?;
    let inner = (rise * flat)?;
    (tanh + inner)?.affine(0.5, 0.5)
}

/// √(2/π)
const SLOPE: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

/// y = gelu(x).
pub fn forward<T: Real>(x: &[T]) -> Vec<T> {
    // SAFETY: `forward_into` writes every element.
    unsafe { fresh(x.len(), |y| forward_into(y, x)) }
}

/// [`forward`] into `y`, which has the length of x.
pub fn forward_into<T: Real>(y: &mut [T], x: &[T]) {
    assert_eq!(y.len(), x.len());
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| forward_chunk(y, x));
}

/// The gradient of x from the gradient `dy` of the output.
pub fn backward<T: Real>(x: &[T], dy: &[T]) -> Vec<T> {
    let fill = |dx: &mut [T]| {
        let chunks = dx.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
        chunks.for_each(|((dx, x), dy)| backward_chunk(dx, x, dy));
    };
    // SAFETY: `backward_chunk` writes every element.
    unsafe { fresh(x.len(), fill) }
}

/// σ(2u) with u = √(2/π) (x + 0.044715 x³).
#[inline(always)]
pub(in crate::ops) fn gate<T: Real>(x: T) -> T {
    let (linear, cubic) = (T::from_f64(-2.0 * SLOPE), T::from_f64(-2.0 * SLOPE * CUBIC));
    T::ONE / (T::ONE + Real::exp(x * (linear + cubic * x * x)))
}

multiversion! {
    fn forward_chunk<T: Real, const FMA: bool>(y: &mut [T], x: &[T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * gate(x));
    }
}

multiversion! {
    /// dx = dy · (s + x · s (1 − s) · 2u′) with s = σ(2u).
    fn backward_chunk<T: Real, const FMA: bool>(dx: &mut [T], x: &[T], dy: &[T]) {
        let (linear, cubic) = (T::from_f64(2.0 * SLOPE), T::from_f64(6.0 * SLOPE * CUBIC));
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let s = gate(x);
            *dx = dy * (s + x * s * (T::ONE - s) * (linear + cubic * x * x));
        }
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        by_dtype!(x.dtype(), "gelu", T => storage(forward::<T>(slice(x, layout)?), layout.shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "gelu", T => tensor(backward::<T>(&view(x)?, &view(&dy)?), x.shape()).map(Some))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::Device;

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for shape in [&[1][..], &[7, 5], &[3, 5, 17], &[20_001]] {
            let x = [normal("x", shape, DType::F32)];
            at_each_level(|| assert_same(&x, 1e-6, &|v| gelu(&v[0]), &|v| composed(&v[0])))?;
        }
        Ok(())
    }

    /// Values of the formula in double precision (Python's `math.tanh`).
    #[test]
    fn known_values() -> Result<()> {
        let x = Tensor::new(&[-3f32, -1.0, -0.1, 0.0, 0.5, 2.0], &Device::Cpu)?;
        let expected = [-0.003_637_392, -0.158_808_01, -0.046_017_17, 0.0, 0.345_714, 1.954_597_7];
        for (y, expected) in values(&gelu(&x)?).iter().zip(expected) {
            assert!((y - expected).abs() < 3e-7, "{y} instead of {expected}");
        }
        Ok(())
    }

    #[test]
    fn large_inputs_give_themselves_or_zero() -> Result<()> {
        let x = candle_core::Var::new(&[-1e4f32, -30.0, 30.0, 1e4, f32::NAN], &Device::Cpu)?;
        let y = gelu(&x)?;
        let dx = values(y.sum_all()?.backward()?.get(&x).expect("a gradient"));
        let y = values(&y);
        assert!(y[0].abs() < 1e-30 && y[1].abs() < 1e-30 && y[2..4] == [30.0, 1e4] && y[4].is_nan(), "{y:?}");
        assert!(dx[0].abs() < 1e-20 && dx[1].abs() < 1e-20 && dx[2..4] == [1.0, 1.0] && dx[4].is_nan(), "{dx:?}");
        Ok(())
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        assert_gradients(&[normal("x", &[5, 4], DType::F64)], &|v| gelu(&v[0]))?;
        assert_gradients(&[normal("x", &[5, 4], DType::F64)], &|v| on_device(Kernels::Stock, &v[0]))
    }

    #[test]
    fn the_gradient_of_devices_equals_autograd() -> Result<()> {
        assert_same(&[normal("x", &[3, 50], DType::F32)], 1e-5, &|v| on_device(Kernels::Stock, &v[0]), &|v| {
            composed(&v[0])
        })
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        assert_thread_independent(&[normal("x", &[40_000], DType::F32)], &|v| gelu(&v[0]))
    }
}
