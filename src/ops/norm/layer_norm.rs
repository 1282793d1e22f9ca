//! `y = (x − mean) / sqrt(variance + eps) · weight + bias` over the last dimension.
//!
//! The backward pass recomputes mean and variance while the row is in cache, so the forward pass saves nothing.

use super::layer_norm_cuda;
use crate::{
    error::Result,
    ops::{
        cuda,
        custom_gradient::custom_gradient,
        matmul::linear::column_sums,
        simd::{Real, dot, multiversion, sum},
        slices::{by_dtype, fresh, has_cpu_kernels, in_f32, slice, storage, tensor, view},
    },
    runtime::{self, Kernels},
};
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// Layer normalization of `x (.., channels)` with `weight (channels)` and `bias (channels)`; the output has the shape
/// and type of x. The arithmetic is in the type of the weight: x may have a shorter one.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_cpu_kernels(x) {
        return on_device(runtime::kernels(), x, weight, bias, eps);
    }
    Ok(x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps })?)
}

/// [`layer_norm()`] on other devices than CPUs, and for half precision.
pub(crate) fn on_device(kernels: Kernels, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let of_kernel = weight.dtype() == DType::F32 && weight.elem_count() <= layer_norm_cuda::MAX_CHANNELS;
    if of_kernel && cuda::takes(kernels, &[x]) && cuda::takes(kernels, &[weight, bias]) {
        return Ok(layer_norm_cuda::layer_norm(x, weight, bias, eps)?);
    }
    let forward = |args: &[Tensor]| in_f32(&args[0], |x| composed(x, &args[1], &args[2], eps));
    let backward = move |args: &[&Tensor], _: &Tensor, dy: &Tensor| composed_backward(args[0], args[1], dy, eps);
    custom_gradient("layer norm", &[x, weight, bias], forward, backward)
}

/// [`layer_norm()`] from stock candle ops.
pub(crate) fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(normalized(x, eps)?.0.broadcast_mul(weight)?.broadcast_add(bias)?)
}

/// The normalized rows, and the standard deviation of each.
fn normalized(x: &Tensor, eps: f64) -> candle_core::Result<(Tensor, Tensor)> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok((centred.broadcast_div(&deviation)?, deviation))
}

/// dx, dweight and dbias as [`backward`], in the type of the weight; dx in that of x.
fn composed_backward(x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f64) -> candle_core::Result<Vec<Tensor>> {
    let (dtype, columns) = (weight.dtype(), weight.elem_count());
    let sums = |x: &Tensor| x.reshape(((), columns))?.sum(0);
    let dy = dy.to_dtype(dtype)?;
    let (normed, deviation) = normalized(&x.to_dtype(dtype)?, eps)?;
    let (dweight, dbias) = (sums(&(&dy * &normed)?)?, sums(&dy)?);
    let g = dy.broadcast_mul(weight)?;
    drop(dy);
    let slope = (&g * &normed)?.mean_keepdim(D::Minus1)?;
    let along = normed.broadcast_mul(&slope)?;
    drop(normed);
    let across = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?;
    drop(g);
    let dx = (across - along)?.broadcast_div(&deviation)?;
    Ok(vec![dx.to_dtype(x.dtype())?, dweight, dbias])
}

/// Number of rows per task; fixed, so that the result does not depend on the number of threads.
const ROWS: usize = 64;

/// y (rows, channels) of x (rows, channels).
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: &[T], eps: f64) -> Vec<T> {
    let chunk = weight.len().max(1) * ROWS;
    let fill = |y: &mut [T]| {
        let rows = y.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
        rows.for_each(|(y, x)| forward_rows(y, x, weight, bias, T::from_f64(eps)));
    };
    // SAFETY: `forward_rows` writes every element of its rows.
    unsafe { fresh(x.len(), fill) }
}

/// dx (rows, channels), dweight and dbias (channels).
pub fn backward<T: Real>(x: &[T], weight: &[T], dy: &[T], eps: f64) -> (Vec<T>, Vec<T>, Vec<T>) {
    let channels = weight.len();
    let chunk = channels.max(1) * ROWS;
    let mut sums = vec![T::ZERO; x.len().div_ceil(chunk) * 2 * channels];
    let fill = |dx: &mut [T]| {
        let rows = dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk));
        rows.zip(sums.par_chunks_mut(2 * channels.max(1))).for_each(|(((dx, x), dy), sums)| {
            let (dweight, dbias) = sums.split_at_mut(channels);
            backward_rows(dx, x, dy, weight, dweight, dbias, T::from_f64(eps));
        });
    };
    // SAFETY: `backward_rows` writes every element of its rows.
    let dx = unsafe { fresh(x.len(), fill) };
    let mut both = column_sums(&sums, 2 * channels);
    let dbias = both.split_off(channels);
    (dx, both, dbias)
}

/// Mean and 1 / standard deviation of a row.
#[inline(always)]
fn moments<T: Real, const FMA: bool>(x: &[T], centred: &mut [T], eps: T) -> T {
    let count = T::from_f64(x.len() as f64);
    let mean = sum(x) / count;
    centred.iter_mut().zip(x).for_each(|(c, &x)| *c = x - mean);
    T::ONE / (dot::<T, FMA>(centred, centred) / count + eps).sqrt()
}

multiversion! {
    /// y (rows, channels) of x (rows, channels) on the calling thread.
    pub fn forward_rows<T: Real, const FMA: bool>(y: &mut [T], x: &[T], weight: &[T], bias: &[T], eps: T) {
        let channels = weight.len();
        let bias = &bias[..channels];
        for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            let scale = moments::<T, FMA>(x, y, eps);
            for i in 0..channels {
                y[i] = (y[i] * scale).fma::<FMA>(weight[i], bias[i]);
            }
        }
    }
}

multiversion! {
    /// Writes dx and adds to dweight and dbias. With x̂ the normalized row and g = dy·weight:
    /// dx = (g − mean(g) − x̂·mean(g·x̂)) / standard deviation.
    fn backward_rows<T: Real, const FMA: bool>(
        dx: &mut [T],
        x: &[T],
        dy: &[T],
        weight: &[T],
        dweight: &mut [T],
        dbias: &mut [T],
        eps: T,
    ) {
        let channels = weight.len();
        let (dweight, dbias) = (&mut dweight[..channels], &mut dbias[..channels]);
        let count = T::from_f64(channels as f64);
        let (mut normed, mut g) = (vec![T::ZERO; channels], vec![T::ZERO; channels]);
        let rows = dx.chunks_exact_mut(channels).zip(x.chunks_exact(channels)).zip(dy.chunks_exact(channels));
        for ((dx, x), dy) in rows {
            let scale = moments::<T, FMA>(x, &mut normed, eps);
            for i in 0..channels {
                normed[i] *= scale;
                g[i] = dy[i] * weight[i];
                dweight[i] = dy[i].fma::<FMA>(normed[i], dweight[i]);
                dbias[i] += dy[i];
            }
            let mean = sum(&g) / count;
            let slope = dot::<T, FMA>(&g, &normed) / count;
            for i in 0..channels {
                dx[i] = (g[i] - mean - normed[i] * slope) * scale;
            }
        }
    }
}

struct LayerNorm {
    eps: f64,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let channels = lx.dims().last().copied().unwrap_or(0);
        if channels == 0 || lw.dims() != [channels] || lb.dims() != [channels] {
            candle_core::bail!(
                "layer norm: the shapes {:?}, {:?} and {:?} do not match",
                lx.dims(),
                lw.dims(),
                lb.dims()
            );
        }
        by_dtype!(x.dtype(), "layer norm", T => {
            let y = forward::<T>(slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?, self.eps);
            storage(y, lx.shape())
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "layer norm", T => {
            let (dx, dw, db) = backward::<T>(&view(x)?, &view(weight)?, &view(&dy)?, self.eps);
            let of = |d| tensor(d, weight.shape()).map(Some);
            Ok((Some(tensor(dx, x.shape())?), of(dw)?, of(db)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Var};

    fn vars(shape: &[usize], dtype: DType) -> [Var; 3] {
        let channels = &shape[shape.len() - 1..];
        [normal("x", shape, dtype), normal("w", channels, dtype), normal("b", channels, dtype)]
    }

    fn fused(v: &[Tensor]) -> Result<Tensor> {
        layer_norm(&v[0], &v[1], &v[2], 1e-5)
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for shape in [&[1, 3][..], &[5, 33], &[2, 3, 64], &[200, 47], &[3, 1000]] {
            let vars = vars(shape, DType::F32);
            at_each_level(|| assert_same(&vars, 2e-5, &fused, &|v| composed(&v[0], &v[1], &v[2], 1e-5)))?;
        }
        Ok(())
    }

    fn stock(v: &[Tensor]) -> Result<Tensor> {
        on_device(Kernels::Stock, &v[0], &v[1], &v[2], 1e-5)
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        assert_gradients(&vars(&[2, 3, 5], DType::F64), &fused)?;
        assert_gradients(&vars(&[2, 3, 5], DType::F64), &stock)
    }

    #[test]
    fn the_gradient_of_devices_equals_autograd() -> Result<()> {
        assert_same(&vars(&[7, 33], DType::F32), 2e-5, &stock, &|v| composed(&v[0], &v[1], &v[2], 1e-5))
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        assert_thread_independent(&vars(&[700, 96], DType::F32), &fused)
    }
}
