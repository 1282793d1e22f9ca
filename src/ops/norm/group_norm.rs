//! Group normalization in NHWC, optionally followed by SiLU: one pass forward and one backward over an image in cache.
//!
//! With `x̂ = (x - mean) / sqrt(var + eps)` over the pixels and channels of a group: `y = f(x̂ · w + b)`, where `f` is
//! the identity or `u · sigmoid(u)`.

use crate::{
    error::{Result, ensure},
    ops::{
        simd::{Real, multiversion},
        slices::{by_dtype, fresh, slice, storage, tensor, view},
    },
};
use candle_core::{CpuStorage, CustomOp3, D, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// Group normalization of `x (b, .., c)` with `weight (c)` and `bias (c)`, followed by SiLU if `silu`; the output has
/// the shape of x.
///
/// # Errors
/// The channels are not a multiple of `groups`, or shapes do not match.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    ensure!(
        groups > 0 && channels.is_multiple_of(groups),
        "{channels} channels cannot be split into {groups} equal groups"
    );
    if !x.device().is_cpu() {
        return composed(x, weight, bias, groups, eps, silu);
    }
    let op = GroupNorm { groups, eps, silu };
    Ok(x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?)
}

/// [`group_norm()`] from stock candle ops.
pub fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let (images, channels) = (x.dim(0)?, x.dim(D::Minus1)?);
    let grouped = x.reshape((images, (), groups, channels / groups))?;
    let mean = grouped.mean_keepdim(3)?.mean_keepdim(1)?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim(3)?.mean_keepdim(1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape(x.shape())?;
    let u = normal.broadcast_mul(weight)?.broadcast_add(bias)?;
    Ok(if silu { u.silu()? } else { u })
}

/// Number of rows (pixels) per task; fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 1024;

/// Number of channels whose sums stay in registers.
const BLOCK: usize = 16;

/// Two sums for each channel over some rows: first the first sum of all channels, then the second.
type Sums = Vec<f64>;

/// Sums fixed chunks of rows in parallel, but always in the same order.
fn sum_chunks(channels: usize, chunks: impl IndexedParallelIterator<Item = Sums>) -> Sums {
    let partials: Vec<Sums> = chunks.collect();
    let mut total = vec![0.0; 2 * channels];
    for partial in partials {
        total.iter_mut().zip(partial).for_each(|(t, p)| *t += p);
    }
    total
}

/// Mean and 1/sqrt(var + eps) of the group of each channel, for one image.
fn moments_of_image<T: Real>(x: &[T], channels: usize, groups: usize, eps: f64) -> [Vec<T>; 2] {
    let chunk = ROWS * channels;
    let count = (x.len() / groups) as f64;
    let spread = |sums: &[f64]| -> Vec<f64> {
        let of_group = |g: &[f64]| g.iter().sum::<f64>() / count;
        sums.chunks_exact(channels / groups).flat_map(|g| vec![of_group(g); g.len()]).collect()
    };
    // Two passes over an image in cache: a difference of large sums would lose the precision of the variance.
    let zeros = vec![T::ZERO; channels];
    let sums = sum_chunks(channels, x.par_chunks(chunk).map(|x| products(x, &zeros, x, &zeros)));
    let mean: Vec<T> = spread(&sums[..channels]).into_iter().map(T::from_f64).collect();
    let sums = sum_chunks(channels, x.par_chunks(chunk).map(|x| products(x, &mean, x, &mean)));
    let deviation = spread(&sums[channels..]).into_iter().map(|v| T::from_f64(1.0 / (v + eps).sqrt())).collect();
    [mean, deviation]
}

multiversion! {
    /// Sums over the rows of `a - c` and of `(a - c)(b - d)`, where c and d are numbers a channel.
    fn products<T: Real, const FMA: bool>(a: &[T], c: &[T], b: &[T], d: &[T]) -> Sums {
        let channels = c.len();
        let mut sums = vec![0.0; 2 * channels];
        for first in (0..channels).step_by(BLOCK) {
            let at = first..channels.min(first + BLOCK);
            let (mut one, mut two) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
            let [mut shift, mut shift2] = [[T::ZERO; BLOCK]; 2];
            shift[..at.len()].copy_from_slice(&c[at.clone()]);
            shift2[..at.len()].copy_from_slice(&d[at.clone()]);
            for (a, b) in a.chunks_exact(channels).zip(b.chunks_exact(channels)) {
                let (a, b) = (&a[at.clone()], &b[at.clone()]);
                if let (Ok(a), Ok(b)) = (<&[T; BLOCK]>::try_from(a), <&[T; BLOCK]>::try_from(b)) {
                    for i in 0..BLOCK {
                        one[i] += a[i] - shift[i];
                        two[i] = (a[i] - shift[i]).fma::<FMA>(b[i] - shift2[i], two[i]);
                    }
                } else {
                    for i in 0..at.len() {
                        one[i] += a[i] - shift[i];
                        two[i] = (a[i] - shift[i]).fma::<FMA>(b[i] - shift2[i], two[i]);
                    }
                }
            }
            for i in 0..at.len() {
                sums[first + i] = one[i].to_f64();
                sums[channels + first + i] = two[i].to_f64();
            }
        }
        sums
    }
}

#[inline(always)]
fn sigmoid<T: Real>(u: T) -> T {
    T::ONE / (T::ONE + Real::exp(-u))
}

multiversion! {
    /// `y = f(x · scale + shift)` with a scale and a shift for each channel.
    fn apply<T: Real, const FMA: bool>(x: &[T], y: &mut [T], scale: &[T], shift: &[T], silu: bool) {
        let channels = scale.len();
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
            let lines = x.iter().zip(y).zip(scale.iter().zip(shift));
            if silu {
                lines.for_each(|((&x, y), (&scale, &shift))| {
                    let u = x.fma::<FMA>(scale, shift);
                    *y = u * sigmoid(u);
                });
            } else {
                lines.for_each(|((&x, y), (&scale, &shift))| *y = x.fma::<FMA>(scale, shift));
            }
        }
    }
}

/// Mean and 1/sqrt(var + eps) of the group of each channel, for each image: the backward pass needs only these and x.
#[derive(Clone)]
pub struct Statistics<T>(Vec<[Vec<T>; 2]>);

impl GroupNorm {
    /// The statistics of `x`, whose images have `image` elements.
    pub fn statistics<T: Real>(&self, x: &[T], channels: usize, image: usize) -> Statistics<T> {
        Statistics(x.par_chunks(image).map(|x| moments_of_image(x, channels, self.groups, self.eps)).collect())
    }

    /// Writes the normalized `x`, given its statistics.
    pub fn forward<T: Real>(&self, x: &[T], weight: &[T], bias: &[T], statistics: &Statistics<T>, y: &mut [T]) {
        let image = x.len() / statistics.0.len();
        let images = x.par_chunks(image).zip(y.par_chunks_mut(image)).zip(&statistics.0);
        images.for_each(|((x, y), [mean, deviation])| {
            let (scale, shift) = affine(mean, deviation, weight, bias);
            let chunk = ROWS * weight.len();
            x.par_chunks(chunk).zip(y.par_chunks_mut(chunk)).for_each(|(x, y)| apply(x, y, &scale, &shift, self.silu));
        });
    }

    /// Replaces the gradient of the output in `dx` by that of the input plus `plus` (the gradient that reaches `x` on
    /// another path). Returns the gradients of weight and bias.
    pub fn backward<T: Real>(
        &self,
        x: &[T],
        weight: &[T],
        bias: &[T],
        statistics: &Statistics<T>,
        dx: &mut [T],
        plus: Option<&[T]>,
    ) -> [Vec<T>; 2] {
        let (channels, image) = (weight.len(), x.len() / statistics.0.len());
        let images = x.par_chunks(image).zip(dx.par_chunks_mut(image)).zip(&statistics.0).enumerate();
        let per_image: Vec<Sums> = images
            .map(|(i, ((x, dx), statistics))| {
                let plus = plus.map(|plus| &plus[i * image..(i + 1) * image]);
                backward_image(x, weight, bias, statistics, dx, plus, *self)
            })
            .collect();
        let mut total = vec![0.0; 2 * channels];
        for sums in per_image {
            total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
        }
        let cast = |sums: &[f64]| sums.iter().map(|&s| T::from_f64(s)).collect();
        [cast(&total[channels..]), cast(&total[..channels])]
    }
}

/// `x̂ · w + b` as `x · scale + shift`.
fn affine<T: Real>(mean: &[T], deviation: &[T], weight: &[T], bias: &[T]) -> (Vec<T>, Vec<T>) {
    let scale: Vec<T> = weight.iter().zip(deviation).map(|(&w, &d)| w * d).collect();
    let shift = bias.iter().zip(mean).zip(&scale).map(|((&b, &m), &s)| b - m * s).collect();
    (scale, shift)
}

multiversion! {
    /// Turns dy in `du` into the gradient of u, the argument of SiLU.
    fn through_silu<T: Real, const FMA: bool>(x: &[T], du: &mut [T], scale: &[T], shift: &[T]) {
        let channels = scale.len();
        for (x, du) in x.chunks_exact(channels).zip(du.chunks_exact_mut(channels)) {
            for ((du, &x), (&scale, &shift)) in du.iter_mut().zip(x).zip(scale.iter().zip(shift)) {
                let u = x.fma::<FMA>(scale, shift);
                let s = sigmoid(u);
                *du = *du * s * (T::ONE + u * (T::ONE - s));
            }
        }
    }
}

multiversion! {
    /// `dx = du · scale + x · slope + offset + plus`, where `dx` holds du.
    fn combine<T: Real, const FMA: bool>(
        x: &[T], dx: &mut [T], scale: &[T], slope: &[T], offset: &[T], plus: Option<&[T]>
    ) {
        let channels = scale.len();
        for (i, (x, dx)) in x.chunks_exact(channels).zip(dx.chunks_exact_mut(channels)).enumerate() {
            for ((dx, &x), ((&scale, &slope), &offset)) in dx.iter_mut().zip(x).zip(scale.iter().zip(slope).zip(offset)) {
                *dx = dx.fma::<FMA>(scale, x.fma::<FMA>(slope, offset));
            }
            if let Some(plus) = plus {
                dx.iter_mut().zip(&plus[i * channels..]).for_each(|(dx, &plus)| *dx += plus);
            }
        }
    }
}

/// Turns one image's dy into its dx; returns its share of the gradients of bias (first) and weight.
fn backward_image<T: Real>(
    x: &[T],
    weight: &[T],
    bias: &[T],
    [mean, deviation]: &[Vec<T>; 2],
    dx: &mut [T],
    plus: Option<&[T]>,
    op: GroupNorm,
) -> Sums {
    let (channels, chunk) = (weight.len(), ROWS * weight.len());
    let (scale, shift) = affine(mean, deviation, weight, bias);
    let parts = x.par_chunks(chunk).zip(dx.par_chunks_mut(chunk));
    let zeros = vec![T::ZERO; channels];
    let chunk_sums = parts.map(|(x, du)| {
        if op.silu {
            through_silu(x, du, &scale, &shift);
        }
        products(du, &zeros, x, mean)
    });
    let mut sums = sum_chunks(channels, chunk_sums);
    for (sum, deviation) in sums[channels..].iter_mut().zip(deviation) {
        *sum *= deviation.to_f64();
    }
    // dx̂ = du · w; dx = (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂)) / sqrt(var + eps), means over the group.
    let per_group = channels / op.groups;
    let count = (x.len() / op.groups) as f64;
    let (mut slope, mut offset) = (Vec::with_capacity(channels), Vec::with_capacity(channels));
    for c in 0..channels {
        let group = c / per_group * per_group..(c / per_group + 1) * per_group;
        let mean_of = |sums: &[f64]| group.clone().map(|c| sums[c] * weight[c].to_f64()).sum::<f64>() / count;
        let (one, two, d) = (mean_of(&sums[..channels]), mean_of(&sums[channels..]), deviation[c].to_f64());
        slope.push(T::from_f64(-two * d * d));
        offset.push(T::from_f64((two * d * mean[c].to_f64() - one) * d));
    }
    x.par_chunks(chunk).zip(dx.par_chunks_mut(chunk)).enumerate().for_each(|(i, (x, dx))| {
        combine(x, dx, &scale, &slope, &offset, plus.map(|plus| &plus[i * chunk..]));
    });
    sums
}

/// The settings of a group normalisation.
#[derive(Debug, Clone, Copy)]
pub struct GroupNorm {
    pub groups: usize,
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Number of elements of one image; checks the shapes.
fn image_size(x: &Shape, weight: &Shape, bias: &Shape) -> candle_core::Result<usize> {
    let channels = x.dims().last().copied().unwrap_or(0);
    if x.rank() < 2 || x.elem_count() == 0 || weight.dims() != [channels] || bias.dims() != [channels] {
        candle_core::bail!("group norm: input {x:?} does not match weight {weight:?} and bias {bias:?}");
    }
    Ok(x.elem_count() / x.dims()[0])
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group norm"
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
        let image = image_size(lx.shape(), lw.shape(), lb.shape())?;
        by_dtype!(x.dtype(), "group norm", T => {
            let (x, w, b) = (slice::<T>(x, lx)?, slice(w, lw)?, slice(b, lb)?);
            let statistics = self.statistics(x, w.len(), image);
            // SAFETY: every element is written.
            storage(unsafe { fresh(x.len(), |y| self.forward(x, w, b, &statistics, y)) }, lx.shape())
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let image = image_size(x.shape(), w.shape(), b.shape())?;
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "group norm", T => {
            let (xs, ws, bs, dys) = (view::<T>(x)?, view::<T>(w)?, view::<T>(b)?, view::<T>(&dy)?);
            let statistics = self.statistics(&xs, ws.len(), image);
            let mut dx = dys.to_vec();
            let [dw, db] = self.backward(&xs, &ws, &bs, &statistics, &mut dx, None);
            Ok((Some(tensor(dx, x.shape())?), Some(tensor(dw, w.shape())?), Some(tensor(db, b.shape())?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Var};

    const SHAPES: [([usize; 4], usize); 5] =
        [([2, 3, 2, 6], 3), ([1, 2, 2, 4], 1), ([2, 5, 1, 32], 32), ([1, 3, 3, 48], 8), ([1, 4, 1, 3], 3)];

    fn vars(x: [usize; 4], dtype: DType) -> [Var; 3] {
        [normal("x", &x, dtype), normal("w", &[x[3]], dtype), normal("b", &[x[3]], dtype)]
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        for (x, groups) in SHAPES {
            for silu in [false, true] {
                let vars = vars(x, DType::F64);
                assert_gradients(&vars, &|v| group_norm(&v[0], &v[1], &v[2], groups, 1e-6, silu))?;
            }
        }
        Ok(())
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for (x, groups) in SHAPES.into_iter().chain([([2, 40, 40, 64], 32)]) {
            for silu in [false, true] {
                assert_same(
                    &vars(x, DType::F32),
                    5e-5,
                    &|v| group_norm(&v[0], &v[1], &v[2], groups, 1e-6, silu),
                    &|v| composed(&v[0], &v[1], &v[2], groups, 1e-6, silu),
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_large_mean_does_not_hide_the_variance() -> Result<()> {
        let [x, w, b] = vars([1, 64, 64, 4], DType::F32);
        let plain = group_norm(&x, &w, &b, 2, 1e-6, true)?;
        let far = group_norm(&(x.as_tensor() + 1000.0)?, &w, &b, 2, 1e-6, true)?;
        let error = (plain - far)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error < 2e-3, "{error}");
        Ok(())
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        let vars = vars([3, 50, 50, 64], DType::F32);
        assert_thread_independent(&vars, &|v| group_norm(&v[0], &v[1], &v[2], 32, 1e-6, true))
    }

    #[test]
    fn unequal_groups_are_errors() {
        let [x, w, b] = vars([1, 2, 2, 6], DType::F32);
        assert!(group_norm(&x, &w, &b, 4, 1e-6, true).is_err());
        assert!(group_norm(&x, &w, &b, 0, 1e-6, true).is_err());
        assert!(group_norm(&x, &w.narrow(0, 0, 3).unwrap(), &b, 3, 1e-6, true).is_err());
    }
}
