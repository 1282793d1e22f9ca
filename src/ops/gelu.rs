//! GELU, tanh approximation: `y = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))` (arXiv 1606.08415).

use super::CHUNK;
use super::{
    simd::{Real, multiversion},
    slices::{by_dtype, slice, storage, tensor, view},
};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

const SCALE: f64 = 0.797_884_560_802_865_4; // sqrt(2 / pi)
const CUBE: f64 = 0.044_715;

/// GELU of each element; any shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Ok(if x.device().is_cpu() { x.contiguous()?.apply_op1(Gelu)? } else { x.gelu()? })
}

struct Gelu;

/// Hyperbolic tangent through one vectorisable exponential.
#[inline(always)]
fn tanh<T: Real>(x: T) -> T {
    T::ONE - (T::ONE + T::ONE) / ((x + x).exp() + T::ONE)
}

multiversion! {
    fn forward<T: Real, const FMA: bool>(x: &[T], y: &mut [T]) {
        let (scale, cube, half) = (T::from_f64(SCALE), T::from_f64(CUBE), T::from_f64(0.5));
        for (y, x) in y.iter_mut().zip(x) {
            let x = *x;
            *y = half * x * (T::ONE + tanh(scale * (x + cube * x * x * x)));
        }
    }
}

multiversion! {
    fn backward<T: Real, const FMA: bool>(x: &[T], dy: &[T], dx: &mut [T]) {
        let (scale, cube, half) = (T::from_f64(SCALE), T::from_f64(CUBE), T::from_f64(0.5));
        let three = T::from_f64(3.0);
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            let x = *x;
            let t = tanh(scale * (x + cube * x * x * x));
            let inner = scale * (T::ONE + three * cube * x * x);
            *dx = *dy * half * (T::ONE + t + x * (T::ONE - t * t) * inner);
        }
    }
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        by_dtype!(x.dtype(), "gelu", T => {
            let x = slice::<T>(x, layout)?;
            let mut y = vec![T::ZERO; x.len()];
            y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| forward(x, y));
            storage(y, layout.shape())
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "gelu", T => {
            let (xs, dys) = (view::<T>(x)?, view::<T>(&dy)?);
            let mut dx = vec![T::ZERO; xs.len()];
            let inputs = xs.par_chunks(CHUNK).zip(dys.par_chunks(CHUNK));
            dx.par_chunks_mut(CHUNK).zip(inputs).for_each(|(dx, (x, dy))| backward(x, dy, dx));
            Ok(Some(tensor(dx, x.shape())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    #[test]
    fn equals_composed_and_finite_differences_on_any_thread() -> Result<()> {
        let large = [normal("x", &[3, 7, 1000], DType::F32)];
        assert_same(&large, 2e-5, &|t| gelu(&t[0]), &|t| Ok(t[0].gelu()?))?;
        assert_thread_independent(&large, &|t| gelu(&t[0]))?;
        assert_gradients(&[normal("x", &[2, 9], DType::F64)], &|t| gelu(&t[0]))
    }
}
