//! Sparse attention over listed keys: `softmax(q·k / √d) v` for the keys that a query may see, and only
//! those. Nothing of size sequence × sequence is ever built; the backward pass recomputes a query's
//! probabilities from its keys.

use super::{
    simd::{self, Real, multiversion},
    slices::{by_dtype, slice, storage, tensor, view},
};
use crate::error::{Result, ensure};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;
use std::{ops::Range, sync::Arc};

/// The key positions `start, start + stride, …`, `len` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub start: usize,
    pub len: usize,
    pub stride: usize,
}

/// The keys of every query of a batch. All samples share one list; a sample with less text than the
/// others leaves out what lies behind it.
#[derive(Debug, Clone)]
pub struct KeyRanges {
    /// Query `q` reads `runs[offsets[q]..offsets[q + 1]]`.
    pub offsets: Vec<usize>,
    /// Runs that do not overlap within a query.
    pub runs: Vec<Run>,
    /// Positions that hold padded text.
    pub text: Range<usize>,
    /// Valid positions of `text` in each sample; `None`: all of them, or no padding that anyone sees.
    pub text_lengths: Option<Vec<usize>>,
}

impl KeyRanges {
    /// Number of queries.
    pub fn queries(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// The runs of a query, with those inside the padded text cut to the sample's length.
    #[inline(always)]
    fn runs_of(&self, sample: usize, query: usize) -> impl Iterator<Item = Run> + '_ {
        let valid = self.text_lengths.as_ref().map(|lengths| self.text.start + lengths[sample]);
        self.runs[self.offsets[query]..self.offsets[query + 1]].iter().map(move |run| match valid {
            Some(end) if self.text.contains(&run.start) => {
                let keys = end.saturating_sub(run.start).div_ceil(run.stride);
                Run { len: run.len.min(keys), ..*run }
            }
            _ => *run,
        })
    }

    fn check(&self, samples: usize, positions: usize) -> Result<()> {
        ensure!(self.queries() == positions, "keys of {} queries for {positions} positions", self.queries());
        let lengths = self.text_lengths.as_ref();
        ensure!(lengths.is_none_or(|l| l.len() == samples), "text lengths of another batch");
        ensure!(self.offsets.last().is_none_or(|end| *end <= self.runs.len()), "key offsets outside of the runs");
        for run in &self.runs {
            ensure!(run.stride > 0, "a run of keys with stride 0");
            ensure!(run.len == 0 || run.start + (run.len - 1) * run.stride < positions, "keys outside of the sequence");
            let crosses = run.start < self.text.end && run.start + run.len.max(1) > self.text.end;
            ensure!(lengths.is_none() || !crosses, "a run of keys goes on behind the padded text");
        }
        Ok(())
    }
}

/// Attention of `qkv: (batch, length, 3, heads, head_dim)`; returns `(batch, length, heads · head_dim)`.
/// A query without keys gives zeros.
///
/// # Errors
/// The keys belong to another shape.
pub fn attention(qkv: &Tensor, keys: &Arc<KeyRanges>) -> Result<Tensor> {
    let (batch, length, three, heads, head_dim) = qkv.dims5()?;
    ensure!(three == 3, "queries, keys and values packed as {three}");
    keys.check(batch, length)?;
    if !qkv.device().is_cpu() {
        return composed(qkv, keys);
    }
    let shape = Heads { batch, length, heads, head_dim };
    Ok(qkv.contiguous()?.apply_op1(Attention { keys: keys.clone(), shape })?)
}

/// The same from stock candle ops, through a full matrix of scores.
pub(crate) fn composed(qkv: &Tensor, keys: &KeyRanges) -> Result<Tensor> {
    let (batch, length, _, heads, head_dim) = qkv.dims5()?;
    let mut mask = vec![f32::NEG_INFINITY; batch * length * length];
    let mut seen = vec![0f32; batch * length];
    for row in 0..batch * length {
        for run in keys.runs_of(row / length, row % length) {
            for i in 0..run.len {
                mask[row * length + run.start + i * run.stride] = 0.0;
                seen[row] = 1.0;
            }
        }
        if seen[row] == 0.0 {
            mask[row * length] = 0.0; // any key will do: the row is multiplied by 0 below
        }
    }
    let mask = Tensor::from_vec(mask, (batch, 1, length, length), qkv.device())?.to_dtype(qkv.dtype())?;
    let seen = Tensor::from_vec(seen, (batch, length, 1), qkv.device())?.to_dtype(qkv.dtype())?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? * (head_dim as f64).powf(-0.5))?.broadcast_add(&mask)?;
    let exp = scores.broadcast_sub(&scores.max_keepdim(3)?.detach())?.exp()?;
    let p = exp.broadcast_div(&exp.sum_keepdim(3)?)?;
    let y = p.matmul(&v)?.transpose(1, 2)?.reshape((batch, length, heads * head_dim))?;
    Ok(y.broadcast_mul(&seen)?)
}

#[derive(Clone, Copy)]
struct Heads {
    batch: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
}

impl Heads {
    fn row(&self) -> usize {
        self.heads * self.head_dim
    }

    /// One head's `part` (0 query, 1 key, 2 value) of a sample as a contiguous `(length, head_dim)`.
    fn gather<T: Real>(&self, qkv: &[T], sample: usize, head: usize, part: usize) -> Vec<T> {
        let mut out = Vec::with_capacity(self.length * self.head_dim);
        for position in 0..self.length {
            let from = ((sample * self.length + position) * 3 + part) * self.row() + head * self.head_dim;
            out.extend_from_slice(&qkv[from..from + self.head_dim]);
        }
        out
    }

    /// Runs `f(sample, head)` for all heads in parallel, in order of sample, then head.
    fn each<R: Send>(&self, f: impl Fn(usize, usize) -> R + Sync) -> Vec<R> {
        (0..self.batch * self.heads).into_par_iter().map(|i| f(i / self.heads, i % self.heads)).collect()
    }
}

struct Attention {
    keys: Arc<KeyRanges>,
    shape: Heads,
}

/// The probabilities of a query over its keys, in order of the runs, into `p`.
#[inline(always)]
fn probabilities<T: Real, const FMA: bool>(
    q: &[T],
    k: &[T],
    runs: impl Iterator<Item = Run>,
    scale: T,
    p: &mut Vec<T>,
) {
    p.clear();
    let dim = q.len();
    for run in runs {
        for i in 0..run.len {
            let key = (run.start + i * run.stride) * dim;
            p.push(simd::dot::<T, FMA>(q, &k[key..key + dim]) * scale);
        }
    }
    let Some(mut largest) = p.first().copied() else { return };
    for x in p.iter() {
        largest = if *x > largest { *x } else { largest };
    }
    for x in p.iter_mut() {
        *x = (*x - largest).exp();
    }
    let factor = T::ONE / simd::sum(p);
    for x in p.iter_mut() {
        *x *= factor;
    }
}

multiversion! {
    fn forward<T: Real, const FMA: bool>(q: &[T], k: &[T], v: &[T], keys: &KeyRanges, sample: usize, dim: usize, y: &mut [T]) {
        let scale = T::ONE / T::from_f64(dim as f64).sqrt();
        let mut p = Vec::new();
        for (query, (q, y)) in q.chunks_exact(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
            probabilities::<T, FMA>(q, k, keys.runs_of(sample, query), scale, &mut p);
            let mut p = p.iter();
            for run in keys.runs_of(sample, query) {
                for (i, p) in (0..run.len).zip(&mut p) {
                    let key = (run.start + i * run.stride) * dim;
                    simd::axpy::<T, FMA>(y, *p, &v[key..key + dim]);
                }
            }
        }
    }
}

/// Queries, keys and values of one head, and room for their gradients.
struct Head<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

multiversion! {
    /// `ds_j = p_j (dy·v_j - Σ_i p_i dy·v_i) / √d`; `dq += ds_j k_j`, `dk_j += ds_j q`, `dv_j += p_j dy`.
    fn backward<T: Real, const FMA: bool>(head: &mut Head<T>, dy: &[T], keys: &KeyRanges, sample: usize, dim: usize) {
        let Head { q, k, v, dq, dk, dv } = head;
        let scale = T::ONE / T::from_f64(dim as f64).sqrt();
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        for (query, ((q, dq), dy)) in q.chunks_exact(dim).zip(dq.chunks_exact_mut(dim)).zip(dy.chunks_exact(dim)).enumerate() {
            probabilities::<T, FMA>(q, k, keys.runs_of(sample, query), scale, &mut p);
            dp.clear();
            for run in keys.runs_of(sample, query) {
                for i in 0..run.len {
                    let key = (run.start + i * run.stride) * dim;
                    dp.push(simd::dot::<T, FMA>(dy, &v[key..key + dim]));
                }
            }
            let mean = simd::dot::<T, FMA>(&p, &dp);
            let mut entries = p.iter().zip(&dp);
            for run in keys.runs_of(sample, query) {
                for (i, (p, dp)) in (0..run.len).zip(&mut entries) {
                    let key = (run.start + i * run.stride) * dim;
                    let key = key..key + dim;
                    let ds = *p * (*dp - mean) * scale;
                    simd::axpy::<T, FMA>(dq, ds, &k[key.clone()]);
                    simd::axpy::<T, FMA>(&mut dk[key.clone()], ds, q);
                    simd::axpy::<T, FMA>(&mut dv[key], *p, dy);
                }
            }
        }
    }
}

impl Attention {
    fn run<T: Real>(&self, qkv: &[T]) -> Vec<T> {
        let shape = self.shape;
        let outputs = shape.each(|sample, head| {
            let part = |i| shape.gather(qkv, sample, head, i);
            let mut y = vec![T::ZERO; shape.length * shape.head_dim];
            forward(&part(0), &part(1), &part(2), &self.keys, sample, shape.head_dim, &mut y);
            y
        });
        let mut y = vec![T::ZERO; shape.batch * shape.length * shape.row()];
        let row = shape.row();
        y.par_chunks_mut(row).enumerate().for_each(|(i, y)| {
            let (sample, position) = (i / shape.length, i % shape.length);
            for (head, y) in y.chunks_exact_mut(shape.head_dim).enumerate() {
                let at = position * shape.head_dim;
                y.copy_from_slice(&outputs[sample * shape.heads + head][at..at + shape.head_dim]);
            }
        });
        y
    }

    fn gradient<T: Real>(&self, qkv: &[T], dy: &[T]) -> Vec<T> {
        let shape = self.shape;
        let (row, dim) = (shape.row(), shape.head_dim);
        let heads = shape.each(|sample, head| {
            let part = |i| shape.gather(qkv, sample, head, i);
            let zeros = || vec![T::ZERO; shape.length * dim];
            let mut state = Head { q: part(0), k: part(1), v: part(2), dq: zeros(), dk: zeros(), dv: zeros() };
            let mut dy_head = Vec::with_capacity(shape.length * dim);
            for position in 0..shape.length {
                let from = (sample * shape.length + position) * row + head * dim;
                dy_head.extend_from_slice(&dy[from..from + dim]);
            }
            backward(&mut state, &dy_head, &self.keys, sample, dim);
            [state.dq, state.dk, state.dv]
        });
        let mut dqkv = vec![T::ZERO; qkv.len()];
        dqkv.par_chunks_mut(3 * row).enumerate().for_each(|(i, out)| {
            let (sample, position) = (i / shape.length, i % shape.length);
            for (j, out) in out.chunks_exact_mut(dim).enumerate() {
                let (part, head) = (j / shape.heads, j % shape.heads);
                out.copy_from_slice(&heads[sample * shape.heads + head][part][position * dim..(position + 1) * dim]);
            }
        });
        dqkv
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "sparse-attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = Shape::from((self.shape.batch, self.shape.length, self.shape.row()));
        by_dtype!(qkv.dtype(), "attention", T => storage(self.run::<T>(slice(qkv, layout)?), shape))
    }

    fn bwd(&self, qkv: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_dtype!(qkv.dtype(), "attention", T => {
            let dqkv = self.gradient(&view::<T>(qkv)?, &view::<T>(&dy)?);
            Ok(Some(tensor(dqkv, qkv.shape())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::testing::*, random::Random};
    use candle_core::DType;

    /// A random list: half a text block with padding, then strided runs; query 0 sees nothing.
    fn random_keys(length: usize, samples: usize, seed: u64) -> Arc<KeyRanges> {
        let mut random = Random::keyed(seed, "keys", 0, 0);
        let text = length / 2;
        let (mut offsets, mut runs) = (vec![0, 0], Vec::new());
        for _ in 1..length {
            runs.push(Run { start: 0, len: text, stride: 1 });
            let stride = 1 + random.below(3) as usize;
            let start = text + random.below((length - text) as u64) as usize;
            let most = (length - start).div_ceil(stride);
            runs.push(Run { start, len: random.below(most as u64 + 1) as usize, stride });
            offsets.push(runs.len());
        }
        let lengths = (0..samples).map(|_| random.below(text as u64 + 1) as usize).collect();
        Arc::new(KeyRanges { offsets, runs, text: 0..text, text_lengths: Some(lengths) })
    }

    #[test]
    fn equals_composed_and_finite_differences_on_any_thread() -> Result<()> {
        for (i, shape) in [[1, 1, 3, 1, 1], [2, 7, 3, 3, 5], [3, 40, 3, 2, 20]].iter().enumerate() {
            let keys = random_keys(shape[1], shape[0], i as u64);
            let qkv = [normal("qkv", shape, DType::F32)];
            assert_same(&qkv, 2e-5, &|t| attention(&t[0], &keys), &|t| composed(&t[0], &keys))?;
            assert_thread_independent(&qkv, &|t| attention(&t[0], &keys))?;
        }
        let keys = random_keys(6, 2, 9);
        assert_gradients(&[normal("qkv", &[2, 6, 3, 2, 3], DType::F64)], &|t| attention(&t[0], &keys))
    }

    #[test]
    fn keys_of_another_shape_are_refused() -> Result<()> {
        let qkv = normal("qkv", &[2, 6, 3, 2, 3], DType::F32);
        assert!(attention(&qkv, &random_keys(6, 2, 0)).is_ok());
        assert!(attention(&qkv, &random_keys(5, 2, 0)).is_err());
        assert!(attention(&qkv, &random_keys(6, 3, 0)).is_err());
        Ok(())
    }
}
