//! Sparse attention: each query reads only the keys that its list names, in the forward and in the backward
//! pass. Nothing of size n×n is built, and nothing is kept for the backward pass, which takes the
//! probabilities of one query at a time again.
//!
//! One task is one head of one sample: its keys and values are gathered once into a contiguous block.

use super::{
    simd::{Real, add_lanes, axpy, dot, fma_lanes, fma_rest, max_lanes, multiversion},
    slices::{Scatter, by_dtype, fresh, slice, storage, tensor, view},
};
use crate::error::{Result, ensure};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;
use std::sync::Arc;

pub use super::key_ranges::{KeyRanges, Run};

/// `qkv (b, l, 3, heads, d)` → `(b, l, heads·d)`: softmax of q·k / √d over the listed keys, times v. A query
/// without keys gives zeros.
pub fn attention(qkv: &Tensor, keys: &Arc<KeyRanges>) -> Result<Tensor> {
    let (samples, positions, three, _, _) = qkv.dims5()?;
    ensure!(three == 3, "attention: expected queries, keys and values, got {three} parts");
    keys.check(samples, positions)?;
    if !qkv.device().is_cpu() {
        return composed(qkv, keys);
    }
    Ok(qkv.contiguous()?.apply_op1(Attention { keys: keys.clone() })?)
}

/// The same with a full mask from stock candle ops.
pub(crate) fn composed(qkv: &Tensor, keys: &KeyRanges) -> Result<Tensor> {
    let (b, l, _, heads, d) = qkv.dims5()?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? * (d as f64).powf(-0.5))?;
    let mask = Tensor::from_vec(keys.mask(b, l), (b, 1, l, l), qkv.device())?.broadcast_as(scores.shape())?;
    // Hidden scores are far below all others but finite: a row without keys must not become not-a-number.
    let hidden = (scores.zeros_like()? - 1e30)?;
    let scores = mask.where_cond(&scores, &hidden)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = (weights * mask.to_dtype(qkv.dtype())?)?;
    let sums = weights.sum_keepdim(D::Minus1)?.maximum(1e-30)?;
    let out = weights.broadcast_div(&sums)?.matmul(&v)?;
    Ok(out.transpose(1, 2)?.reshape((b, l, heads * d))?)
}

/// Sizes of a packed `qkv (samples, positions, 3, heads, d)`.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub samples: usize,
    pub positions: usize,
    pub heads: usize,
    pub d: usize,
}

impl Sizes {
    fn of(shape: &Shape) -> candle_core::Result<Self> {
        let (samples, positions, _, heads, d) = shape.dims5()?;
        Ok(Self { samples, positions, heads, d })
    }

    /// Elements of the output.
    fn outputs(&self) -> usize {
        self.samples * self.positions * self.heads * self.d
    }

    /// Where the row of a head starts in the output.
    fn output_row(&self, sample: usize, position: usize, head: usize) -> usize {
        ((sample * self.positions + position) * self.heads + head) * self.d
    }

    /// Where the query (`part` 0), key (1) or value (2) of a head starts in qkv.
    fn row(&self, sample: usize, position: usize, part: usize, head: usize) -> usize {
        (((sample * self.positions + position) * 3 + part) * self.heads + head) * self.d
    }

    /// All rows of a part of a head, gathered.
    fn gather<T: Real>(&self, qkv: &[T], sample: usize, part: usize, head: usize) -> Vec<T> {
        let mut rows = Vec::with_capacity(self.positions * self.d);
        for position in 0..self.positions {
            rows.extend_from_slice(&qkv[self.row(sample, position, part, head)..][..self.d]);
        }
        rows
    }

    /// Every (sample, head), in parallel.
    fn heads(&self) -> impl ParallelIterator<Item = (usize, usize)> {
        let heads = self.heads;
        (0..self.samples * heads).into_par_iter().map(move |i| (i / heads, i % heads))
    }
}

/// The output (samples, positions, heads, d).
pub fn forward<T: Real>(qkv: &[T], keys: &KeyRanges, sizes: Sizes) -> Vec<T> {
    let fill = |out: &mut [T]| {
        let out = Scatter::new(out);
        sizes.heads().for_each(|(sample, head)| forward_head(qkv, keys, sizes, sample, head, &out));
    };
    // SAFETY: the tasks write every row of every head.
    unsafe { fresh(sizes.outputs(), fill) }
}

/// dqkv, from the gradient of the output.
pub fn backward<T: Real>(qkv: &[T], dout: &[T], keys: &KeyRanges, sizes: Sizes) -> Vec<T> {
    let fill = |dqkv: &mut [T]| {
        let dqkv = Scatter::new(dqkv);
        sizes.heads().for_each(|(sample, head)| backward_head(qkv, dout, keys, sizes, sample, head, &dqkv));
    };
    // SAFETY: the tasks write every row of every part of every head.
    unsafe { fresh(3 * sizes.outputs(), fill) }
}

/// Width of the vectors that scores and sums are kept in.
const WIDE: usize = 16;

/// `out[i] = a · block[keys[i]]`. The lanes of a few keys go through memory before they are added up: left to
/// itself the compiler vectorises across keys and shuffles every load.
#[inline(always)]
fn dots<T: Real, const FMA: bool>(out: &mut [T], a: &[T], block: &[T], keys: &[usize]) {
    let d = a.len();
    let (a, a_rest) = a.as_chunks::<WIDE>();
    let mut partial = [[T::ZERO; WIDE]; 8];
    for (out, keys) in out.chunks_mut(8).zip(keys.chunks(8)) {
        for (partial, &key) in partial.iter_mut().zip(keys) {
            let mut lanes = [T::ZERO; WIDE];
            for (a, b) in a.iter().zip(block[key * d..][..d].as_chunks().0) {
                fma_lanes::<T, FMA, WIDE>(&mut lanes, a, b);
            }
            *partial = lanes;
        }
        for ((out, &partial), &key) in out.iter_mut().zip(&partial).zip(keys) {
            let b_rest = &block[(key + 1) * d - a_rest.len()..(key + 1) * d];
            *out = fma_rest::<T, FMA>(add_lanes(partial), a_rest, b_rest);
        }
    }
}

/// `out = Σᵢ weights[i] · block[keys[i]]`, four keys at a time so that `out` is read and written less.
#[inline(always)]
fn mix<T: Real, const FMA: bool>(out: &mut [T], weights: &[T], block: &[T], keys: &[usize]) {
    let d = out.len();
    let row = |key: usize| &block[key * d..][..d];
    out.fill(T::ZERO);
    let ((weights, weights_rest), (keys, keys_rest)) = (weights.as_chunks::<4>(), keys.as_chunks::<4>());
    for (w, keys) in weights.iter().zip(keys) {
        let [a, b, c, e] = [row(keys[0]), row(keys[1]), row(keys[2]), row(keys[3])];
        for i in 0..d {
            let first = w[0].fma::<FMA>(a[i], w[1] * b[i]);
            let second = w[2].fma::<FMA>(c[i], w[3].fma::<FMA>(e[i], out[i]));
            out[i] = first + second;
        }
    }
    for (&w, &key) in weights_rest.iter().zip(keys_rest) {
        axpy::<T, FMA>(out, w, row(key));
    }
}

/// The probabilities of query `q` over the listed keys of `k`, in `room`.
#[inline(always)]
fn probabilities<'a, T: Real, const FMA: bool>(
    room: &'a mut [[T; WIDE]],
    q: &[T],
    k: &[T],
    keys: &[usize],
    scale: T,
) -> &'a [T] {
    let n = keys.len();
    let room = &mut room[..n.div_ceil(WIDE)];
    let scores = room.as_flattened_mut();
    dots::<T, FMA>(&mut scores[..n], q, k, keys);
    scores[n..].fill(T::NEG_INFINITY); // becomes 0 in the sum
    softmax(room, scale);
    &room.as_flattened()[..n]
}

/// softmax of `scale` · scores.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [[T; WIDE]], scale: T) {
    let mut lanes = [T::NEG_INFINITY; WIDE];
    for s in scores.iter() {
        for i in 0..WIDE {
            lanes[i] = if s[i] > lanes[i] { s[i] } else { lanes[i] };
        }
    }
    let largest = max_lanes(lanes);
    let mut lanes = [T::ZERO; WIDE];
    for s in scores.iter_mut() {
        for i in 0..WIDE {
            s[i] = Real::exp((s[i] - largest) * scale);
            lanes[i] += s[i];
        }
    }
    let factor = T::ONE / add_lanes(lanes);
    scores.as_flattened_mut().iter_mut().for_each(|s| *s *= factor);
}

multiversion! {
    fn forward_head<T: Real, const FMA: bool>(
        qkv: &[T],
        keys: &KeyRanges,
        sizes: Sizes,
        sample: usize,
        head: usize,
        out: &Scatter<T>,
    ) {
        let Sizes { positions, d, .. } = sizes;
        let (k, v) = (sizes.gather(qkv, sample, 1, head), sizes.gather(qkv, sample, 2, head));
        let scale = T::ONE / T::from_f64(d as f64).sqrt();
        let padding = keys.padding(sample);
        let (mut list, mut room) = (Vec::new(), vec![[T::ZERO; WIDE]; positions.div_ceil(WIDE)]);
        for query in 0..positions {
            keys.list(&padding, query, &mut list);
            let q = &qkv[sizes.row(sample, query, 0, head)..][..d];
            let p = probabilities::<T, FMA>(&mut room, q, &k, &list, scale);
            // SAFETY: this row belongs to this task alone.
            mix::<T, FMA>(unsafe { out.row(sizes.output_row(sample, query, head), d) }, p, &v, &list);
        }
    }
}

multiversion! {
    /// With p the probabilities of a query and dp = dout·v: ds = p (dp − Σ p dp) / √d, dq = ds·k, dk += ds q, dv += p dout.
    fn backward_head<T: Real, const FMA: bool>(
        qkv: &[T],
        dout: &[T],
        keys: &KeyRanges,
        sizes: Sizes,
        sample: usize,
        head: usize,
        dqkv: &Scatter<T>,
    ) {
        let Sizes { positions, d, .. } = sizes;
        let (k, v) = (sizes.gather(qkv, sample, 1, head), sizes.gather(qkv, sample, 2, head));
        let (mut dk, mut dv) = (vec![T::ZERO; positions * d], vec![T::ZERO; positions * d]);
        let scale = T::ONE / T::from_f64(d as f64).sqrt();
        let padding = keys.padding(sample);
        let (mut list, mut room) = (Vec::new(), vec![[T::ZERO; WIDE]; positions.div_ceil(WIDE)]);
        let mut ds = vec![T::ZERO; positions];
        for query in 0..positions {
            keys.list(&padding, query, &mut list);
            let q = &qkv[sizes.row(sample, query, 0, head)..][..d];
            let dout = &dout[sizes.output_row(sample, query, head)..][..d];
            let p = probabilities::<T, FMA>(&mut room, q, &k, &list, scale);
            let ds = &mut ds[..list.len()];
            dots::<T, FMA>(ds, dout, &v, &list);
            let mean = dot::<T, FMA>(p, ds);
            ds.iter_mut().zip(p).for_each(|(ds, &p)| *ds = (*ds - mean) * p * scale);
            // SAFETY: the rows of a head belong to its task alone, here and below.
            mix::<T, FMA>(unsafe { dqkv.row(sizes.row(sample, query, 0, head), d) }, ds, &k, &list);
            for ((&key, &p), &ds) in list.iter().zip(p).zip(&*ds) {
                axpy::<T, FMA>(&mut dk[key * d..][..d], ds, q);
                axpy::<T, FMA>(&mut dv[key * d..][..d], p, dout);
            }
        }
        for position in 0..positions {
            let range = position * d..(position + 1) * d;
            // SAFETY: as above.
            unsafe {
                dqkv.row(sizes.row(sample, position, 1, head), d).copy_from_slice(&dk[range.clone()]);
                dqkv.row(sizes.row(sample, position, 2, head), d).copy_from_slice(&dv[range]);
            }
        }
    }
}

struct Attention {
    keys: Arc<KeyRanges>,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let sizes = Sizes::of(layout.shape())?;
        by_dtype!(qkv.dtype(), "attention", T => {
            let out = forward::<T>(slice(qkv, layout)?, &self.keys, sizes);
            storage(out, (sizes.samples, sizes.positions, sizes.heads * sizes.d))
        })
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let sizes = Sizes::of(qkv.shape())?;
        let dout = dout.contiguous()?;
        by_dtype!(qkv.dtype(), "attention", T => {
            tensor(backward::<T>(&view(qkv)?, &view(&dout)?, &self.keys, sizes), qkv.shape()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::testing::*, random::Random};
    use candle_core::DType;

    /// Random lists, with empty ones, strides, and padded text at the front.
    fn random_keys(samples: usize, positions: usize, seed: u64) -> Arc<KeyRanges> {
        let mut random = Random::keyed(seed, "keys", 0, 0);
        let mut below = |n: usize| random.below(n as u64) as usize;
        let text = 0..below(positions + 1);
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        for query in 0..positions {
            let mut next = 0; // ascending, so that no key is listed twice
            for _ in 0..below(4) {
                let start = next + below(3);
                let stride = 1 + below(3);
                if start < positions {
                    let len = below((positions - 1 - start) / stride + 2);
                    runs.push(Run { start, len, stride });
                    next = start + len * stride;
                }
            }
            if query % 5 == 4 {
                runs.truncate(offsets[query]);
            }
            offsets.push(runs.len());
        }
        let text_lengths = (!seed.is_multiple_of(3)).then(|| (0..samples).map(|_| below(text.len() + 1)).collect());
        Arc::new(KeyRanges { offsets, runs, text, text_lengths })
    }

    fn qkv(shape: [usize; 4], dtype: DType) -> [candle_core::Var; 1] {
        let [b, l, heads, d] = shape;
        [normal("qkv", &[b, l, 3, heads, d], dtype)]
    }

    #[test]
    fn fused_is_composed() -> Result<()> {
        for (seed, shape) in
            [[1, 1, 1, 1], [2, 7, 3, 5], [1, 30, 2, 64], [3, 17, 1, 33], [2, 50, 4, 16], [1, 9, 2, 100]]
                .iter()
                .enumerate()
        {
            for seed in [seed as u64, seed as u64 + 100, seed as u64 + 200] {
                let (keys, qkv) = (random_keys(shape[0], shape[1], seed), qkv(*shape, DType::F32));
                at_each_level(|| assert_same(&qkv, 1e-5, &|v| attention(&v[0], &keys), &|v| composed(&v[0], &keys)))?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        let keys = random_keys(2, 6, 1);
        assert_gradients(&qkv([2, 6, 2, 3], DType::F64), &|v| attention(&v[0], &keys))
    }

    #[test]
    fn threads_do_not_matter() -> Result<()> {
        let keys = random_keys(3, 40, 2);
        assert_thread_independent(&qkv([3, 40, 2, 32], DType::F32), &|v| attention(&v[0], &keys))
    }

    #[test]
    fn padding_is_not_read_and_no_keys_give_zeros() -> Result<()> {
        let runs = vec![Run { start: 0, len: 4, stride: 1 }];
        let keys =
            Arc::new(KeyRanges { offsets: vec![0, 1, 1, 1, 1], runs, text: 0..4, text_lengths: Some(vec![1, 0]) });
        let [qkv] = qkv([2, 4, 1, 2], DType::F32);
        let (all, out) = (values(&qkv), values(&attention(&qkv, &keys)?));
        assert_eq!(out[..2], all[4..6], "the only key's value");
        assert!(out[2..].iter().all(|&x| x == 0.0));
        Ok(())
    }

    #[test]
    fn foreign_lists_are_errors() {
        let [qkv] = qkv([2, 4, 1, 2], DType::F32);
        let good = KeyRanges { offsets: vec![0; 5], runs: vec![], text: 0..0, text_lengths: None };
        let run = Run { start: 3, len: 2, stride: 1 };
        assert!(attention(&qkv, &Arc::new(good.clone())).is_ok());
        for bad in [
            KeyRanges { offsets: vec![0; 4], ..good.clone() },
            KeyRanges { offsets: vec![0, 0, 0, 0, 1], ..good.clone() },
            KeyRanges { offsets: vec![0, 0, 0, 0, 1], runs: vec![run], ..good.clone() },
            KeyRanges { text_lengths: Some(vec![1]), ..good },
        ] {
            assert!(attention(&qkv, &Arc::new(bad)).is_err());
        }
    }
}
