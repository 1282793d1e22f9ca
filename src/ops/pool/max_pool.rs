//! 2 × 2 max pooling over `(batch, height, width, channels)`.

use crate::{
    error::{Result, ensure},
    ops::{
        simd::Real,
        slices::{by_dtype, slice, storage, tensor, view},
    },
};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// `(batch, height, width, c)` → `(batch, height / 2, width / 2, c)`; an odd last row or column is dropped. The
/// gradient goes to the first of the largest pixels.
pub fn max_pool2x(x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    ensure!(h > 1 && w > 1, "a {h}×{w} image is too small to be halved");
    let x = x.narrow(1, 0, h / 2 * 2)?.narrow(2, 0, w / 2 * 2)?;
    if !x.device().is_cpu() {
        return composed(&x);
    }
    Ok(x.contiguous()?.apply_op1(MaxPool)?)
}

/// [`max_pool2x()`] composed of stock candle ops, for even sides.
pub fn composed(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.contiguous()?.reshape((b, h / 2, 2, w / 2, 2, c))?.permute((0, 1, 3, 5, 2, 4))?;
    Ok(x.contiguous()?.reshape((b, h / 2, w / 2, c, 4))?.max(D::Minus1)?)
}

struct MaxPool;

/// Calls `f` with the index in the output and that of the first largest pixel, for two rows of pixels.
fn largest<T: Real>(x: &[T], channels: usize, mut f: impl FnMut(usize, usize)) {
    let row = x.len() / 2;
    for out in 0..row / 2 {
        let (pixel, channel) = (out / channels, out % channels);
        let at = 2 * pixel * channels + channel;
        let mut best = at;
        for place in [at + channels, at + row, at + row + channels] {
            if x[place] > x[best] {
                best = place;
            }
        }
        f(out, best);
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max pool"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        by_dtype!(x.dtype(), "max pool", T => {
            let x = slice::<T>(x, layout)?;
            let mut y = vec![T::ZERO; x.len() / 4];
            let rows = y.par_chunks_mut(w / 2 * c).zip(x.par_chunks(2 * w * c));
            rows.for_each(|(y, x)| largest(x, c, |out, at| y[out] = x[at]));
            storage(y, (b, h / 2, w / 2, c))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, _, w, c) = x.dims4()?;
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "max pool", T => {
            let (xs, dys) = (view::<T>(x)?, view::<T>(&dy)?);
            let mut dx = vec![T::ZERO; x.elem_count()];
            let rows = dx.par_chunks_mut(2 * w * c).zip(dys.par_chunks(w / 2 * c)).zip(xs.par_chunks(2 * w * c));
            rows.for_each(|((dx, dy), x)| largest(x, c, |out, at| dx[at] = dy[out]));
            Ok(Some(tensor(dx, x.shape())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Device};

    #[test]
    fn equals_composed_and_finite_differences_on_any_thread() -> Result<()> {
        let x = [normal("x", &[2, 4, 6, 5], DType::F32)];
        assert_same(&x, 1e-6, &|t| max_pool2x(&t[0]), &|t| composed(&t[0]))?;
        assert_thread_independent(&x, &|t| max_pool2x(&t[0]))?;
        assert_gradients(&[normal("x", &[1, 3, 5, 2], DType::F64)], &|t| max_pool2x(&t[0]))
    }

    #[test]
    fn an_image_that_is_too_small_is_an_error() -> Result<()> {
        assert!(max_pool2x(&Tensor::zeros((1, 1, 4, 3), DType::F32, &Device::Cpu)?).is_err());
        Ok(())
    }
}
