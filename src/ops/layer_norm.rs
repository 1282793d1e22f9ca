//! LayerNorm over the last dimension: `y = (x - mean) / √(var + ε) · w + b` (arXiv 1607.06450).

use super::linear::reduce_rows;
use super::{
    simd::{self, Real, multiversion},
    slices::{by_dtype, slice, storage, tensor, view},
};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Shape, Tensor, WithDType, backend::BackendStorage};
use rayon::prelude::*;

/// Rows a task of the row-wise loops takes.
const ROWS: usize = 64;

/// LayerNorm of `x: (.., channels)` with `weight` and `bias: (channels)`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed(x, weight, bias, eps);
    }
    Ok(x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps })?)
}

/// The same from stock candle ops.
pub(crate) fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(centred.broadcast_div(&deviation)?.broadcast_mul(weight)?.broadcast_add(bias)?)
}

struct LayerNorm {
    eps: f64,
}

/// Mean and 1/√(var + ε) of a row.
#[inline(always)]
fn moments<T: Real>(x: &[T], eps: T) -> (T, T) {
    let count = T::from_f64(x.len() as f64);
    let mean = simd::sum(x) / count;
    let mut lanes = [T::ZERO; simd::LANES];
    for chunk in x.chunks(simd::LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += (*x - mean) * (*x - mean);
        }
    }
    (mean, T::ONE / (simd::sum(&lanes) / count + eps).sqrt())
}

multiversion! {
    fn forward<T: Real, const FMA: bool>(x: &[T], weight: &[T], bias: &[T], eps: T, y: &mut [T]) {
        for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
            let (mean, scale) = moments(x, eps);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = (*x - mean) * scale * *w + *b;
            }
        }
    }
}

multiversion! {
    /// `dx = s (g - mean(g) - x̂ mean(g x̂))` with `g = dy · w`, `x̂ = (x - mean) s`.
    fn backward_x<T: Real, const FMA: bool>(x: &[T], weight: &[T], dy: &[T], eps: T, dx: &mut [T]) {
        let width = weight.len();
        let count = T::from_f64(width as f64);
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let (mean, scale) = moments(x, eps);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
                *dx = *dy * *w;
            }
            let mean_g = simd::sum(dx) / count;
            let mean_gx = (simd::dot::<T, FMA>(dx, x) - simd::sum(dx) * mean) * scale / count;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = scale * (*dx - mean_g - (*x - mean) * scale * mean_gx);
            }
        }
    }
}

multiversion! {
    /// Adds `dy · x̂` to the first half of `sums` and `dy` to the second.
    fn backward_parameters<T: Real, const FMA: bool>(x: &[T], dy: &[T], eps: T, sums: &mut [T]) {
        let width = sums.len() / 2;
        let (dw, db) = sums.split_at_mut(width);
        for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
            let (mean, scale) = moments(x, eps);
            for (((dw, db), x), dy) in dw.iter_mut().zip(db.iter_mut()).zip(x).zip(dy) {
                *dw += *dy * (*x - mean) * scale;
                *db += *dy;
            }
        }
    }
}

fn backward<T: Real>(x: &[T], weight: &[T], dy: &[T], eps: f64) -> (Vec<T>, Vec<T>) {
    let (width, eps) = (weight.len(), T::from_f64(eps));
    let mut dx = vec![T::ZERO; x.len()];
    let inputs = x.par_chunks(width * ROWS).zip(dy.par_chunks(width * ROWS));
    dx.par_chunks_mut(width * ROWS).zip(inputs).for_each(|(dx, (x, dy))| backward_x(x, weight, dy, eps, dx));
    let sums = reduce_rows(x.len() / width, 2 * width, |rows, sums| {
        let rows = rows.start * width..rows.end * width;
        backward_parameters(&x[rows.clone()], &dy[rows], eps, sums);
    });
    (dx, sums)
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
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
        let width = lx.dims().last().copied().unwrap_or(0);
        if lw.dims() != [width] || lb.dims() != [width] {
            candle_core::bail!("layer norm: {:?} with weight {:?} and bias {:?}", lx.dims(), lw.dims(), lb.dims());
        }
        by_dtype!(x.dtype(), "layer norm", T => {
            let (x, w, b) = (slice::<T>(x, lx)?, slice::<T>(w, lw)?, slice::<T>(b, lb)?);
            let mut y = vec![T::ZERO; x.len()];
            let rows = y.par_chunks_mut(width * ROWS).zip(x.par_chunks(width * ROWS));
            rows.for_each(|(y, x)| forward(x, w, b, T::from_f64(self.eps), y));
            storage(y, lx.shape())
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let width = w.elem_count();
        by_dtype!(x.dtype(), "layer norm", T => {
            let (dx, sums) = backward(&view::<T>(x)?, &view::<T>(w)?, &view::<T>(&dy)?, self.eps);
            let (dw, db) = (tensor(sums[..width].to_vec(), width)?, tensor(sums[width..].to_vec(), width)?);
            Ok((Some(tensor(dx, x.shape())?), Some(dw), Some(db)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    fn inputs(shape: &[usize; 3], dtype: DType) -> [candle_core::Var; 3] {
        [normal("x", shape, dtype), normal("w", &shape[2..], dtype), normal("b", &shape[2..], dtype)]
    }

    #[test]
    fn equals_composed_and_finite_differences_on_any_thread() -> Result<()> {
        let fused = |t: &[Tensor]| layer_norm(&t[0], &t[1], &t[2], 1e-5);
        for shape in [[1, 1, 3], [2, 5, 17], [3, 200, 64]] {
            let vars = inputs(&shape, DType::F32);
            assert_same(&vars, 5e-5, &fused, &|t| composed(&t[0], &t[1], &t[2], 1e-5))?;
            assert_thread_independent(&vars, &fused)?;
        }
        assert_gradients(&inputs(&[2, 3, 5], DType::F64), &fused)
    }
}
