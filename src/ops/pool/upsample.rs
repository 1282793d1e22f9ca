//! Nearest-neighbor upsampling by 2 over `(batch, height, width, channels)`.
//!
//! candle's `upsample_nearest2d` is not used: its gradient overwrites one that has already accumulated.

use crate::{
    error::Result,
    ops::{
        simd::Real,
        slices::{by_dtype, slice, storage, tensor, view},
    },
};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// Repeats each pixel four times: `(batch, height, width, c)` → `(batch, 2 height, 2 width, c)`.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed(x);
    }
    Ok(x.contiguous()?.apply_op1(Upsample)?)
}

/// [`upsample_nearest2x()`] from stock candle ops.
pub fn composed(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?;
    Ok(x.contiguous()?.reshape((b, 2 * h, 2 * w, c))?)
}

struct Upsample;

/// Repeats one row of pixels into two rows of twice the width.
fn repeat<T: Real>(x: &[T], channels: usize, y: &mut [T]) {
    let (first, second) = y.split_at_mut(2 * x.len());
    for (pixel, y) in x.chunks_exact(channels).zip(first.chunks_exact_mut(2 * channels)) {
        y[..channels].copy_from_slice(pixel);
        y[channels..].copy_from_slice(pixel);
    }
    second.copy_from_slice(first);
}

/// The sum of each pixel's four gradients.
fn gather<T: Real>(dy: &[T], channels: usize, dx: &mut [T]) {
    let (first, second) = dy.split_at(2 * dx.len());
    let rows = first.chunks_exact(2 * channels).zip(second.chunks_exact(2 * channels));
    for (dx, (first, second)) in dx.chunks_exact_mut(channels).zip(rows) {
        for (c, dx) in dx.iter_mut().enumerate() {
            *dx = first[c] + first[c + channels] + second[c] + second[c + channels];
        }
    }
}

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        by_dtype!(x.dtype(), "upsample", T => {
            let x = slice::<T>(x, layout)?;
            let mut y = vec![T::ZERO; 4 * x.len()];
            y.par_chunks_mut(4 * w * c).zip(x.par_chunks(w * c)).for_each(|(y, x)| repeat(x, c, y));
            storage(y, (b, 2 * h, 2 * w, c))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, _, w, c) = x.dims4()?;
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "upsample", T => {
            let dys = view::<T>(&dy)?;
            let mut dx = vec![T::ZERO; x.elem_count()];
            dx.par_chunks_mut(w * c).zip(dys.par_chunks(4 * w * c)).for_each(|(dx, dy)| gather(dy, c, dx));
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
        let x = [normal("x", &[2, 3, 5, 7], DType::F32)];
        assert_same(&x, 1e-6, &|t| upsample_nearest2x(&t[0]), &|t| composed(&t[0]))?;
        assert_thread_independent(&x, &|t| upsample_nearest2x(&t[0]))?;
        assert_gradients(&[normal("x", &[1, 2, 3, 2], DType::F64)], &|t| upsample_nearest2x(&t[0]))
    }
}
