//! Sparse attention: each query reads only the keys that its list names, in the forward and in the backward
//! pass. Nothing of size n×n is built, and nothing is kept for the backward pass, which takes the
//! probabilities of one query at a time again.
//!
//! One task is one head of one sample: its keys and values are gathered once into a contiguous block.

use super::{
    simd::{Real, axpy, dot, max, multiversion, sum},
    slices::{Scatter, by_dtype, fresh, slice, storage, tensor, view},
};
use crate::error::{Result, ensure};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;
use std::{ops::Range, sync::Arc};

/// The key positions `start`, `start + stride`, …, `len` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub start: usize,
    pub len: usize,
    pub stride: usize,
}

/// Which keys each query reads. All samples share the lists, but for the length of their source text.
#[derive(Debug, Clone)]
pub struct KeyRanges {
    /// The runs of query q are `runs[offsets[q]..offsets[q + 1]]`; no key may be listed twice.
    pub offsets: Vec<usize>,
    pub runs: Vec<Run>,
    /// Positions that hold the source text with its padding.
    pub text: Range<usize>,
    /// Of each sample, the positions of `text` in use; nobody reads the rest. `None`: all of them.
    pub text_lengths: Option<Vec<usize>>,
}

impl KeyRanges {
    /// The runs of a query.
    pub fn runs_of(&self, query: usize) -> &[Run] {
        &self.runs[self.offsets[query]..self.offsets[query + 1]]
    }

    /// Positions of padding in a sample.
    fn padding(&self, sample: usize) -> Range<usize> {
        match &self.text_lengths {
            Some(lengths) => (self.text.start + lengths[sample]).min(self.text.end)..self.text.end,
            None => 0..0,
        }
    }

    /// Replaces `keys` by the positions that a query of a sample reads.
    fn list(&self, padding: &Range<usize>, query: usize, keys: &mut Vec<usize>) {
        keys.clear();
        for run in self.runs_of(query) {
            let positions = (0..run.len).map(|i| run.start + i * run.stride);
            keys.extend(positions.filter(|key| !padding.contains(key)));
        }
    }

    /// Checks that the lists fit a batch.
    fn check(&self, samples: usize, positions: usize) -> Result<()> {
        let last = self.runs.iter().filter(|run| run.len > 0).map(|run| run.start + (run.len - 1) * run.stride).max();
        ensure!(
            self.offsets.len() == positions + 1
                && self.offsets.is_sorted()
                && self.offsets[positions] <= self.runs.len()
                && last.is_none_or(|last| last < positions),
            "attention: the lists of keys are not for {positions} positions"
        );
        let lengths = self.text_lengths.as_ref().map_or(samples, Vec::len);
        ensure!(lengths == samples, "attention: {lengths} text lengths for {samples} samples");
        Ok(())
    }

    /// 1 where a query sees a key: (samples, queries, keys) u8. For the oracle only.
    fn mask(&self, samples: usize, positions: usize) -> Vec<u8> {
        let mut mask = vec![0; samples * positions * positions];
        let mut keys = Vec::new();
        for (row, mask) in mask.chunks_exact_mut(positions.max(1)).enumerate() {
            self.list(&self.padding(row / positions), row % positions, &mut keys);
            keys.iter().for_each(|&key| mask[key] = 1);
        }
        mask
    }
}

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
        let rows = (0..self.positions).map(|position| self.row(sample, position, part, head));
        rows.flat_map(|start| &qkv[start..start + self.d]).copied().collect()
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

/// Keys that are worked on together: they share the loads of the query, and their sums are independent.
const GROUP: usize = 4;

/// The rows `keys` of a block of rows of length `d`.
#[inline(always)]
fn rows<'a, T>(block: &'a [T], d: usize, keys: &[usize]) -> [&'a [T]; GROUP] {
    std::array::from_fn(|i| &block[keys[i] * d..][..d])
}

/// `out[i] = a · block[keys[i]]`.
#[inline(always)]
fn dots<T: Real, const FMA: bool>(out: &mut [T], a: &[T], block: &[T], keys: &[usize]) {
    let d = a.len();
    let whole = keys.len() / GROUP * GROUP;
    for (out, keys) in out.chunks_exact_mut(GROUP).zip(keys.chunks_exact(GROUP)) {
        out.copy_from_slice(&super::simd::dots::<T, FMA, GROUP>(a, rows(block, d, keys)));
    }
    for (out, &key) in out[whole..].iter_mut().zip(&keys[whole..]) {
        *out = dot::<T, FMA>(a, &block[key * d..][..d]);
    }
}

/// `out = Σᵢ weights[i] · block[keys[i]]`.
#[inline(always)]
fn mix<T: Real, const FMA: bool>(out: &mut [T], weights: &[T], block: &[T], keys: &[usize]) {
    let d = out.len();
    let whole = keys.len() / GROUP * GROUP;
    out.fill(T::ZERO);
    for (w, keys) in weights.chunks_exact(GROUP).zip(keys.chunks_exact(GROUP)) {
        let [a, b, c, e] = rows(block, d, keys);
        for i in 0..d {
            let first = w[0].fma::<FMA>(a[i], w[1] * b[i]);
            let second = w[2].fma::<FMA>(c[i], w[3].fma::<FMA>(e[i], out[i]));
            out[i] = first + second;
        }
    }
    for (&w, &key) in weights[whole..].iter().zip(&keys[whole..]) {
        axpy::<T, FMA>(out, w, &block[key * d..][..d]);
    }
}

/// Turns scores into probabilities.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T], scale: T) {
    let largest = max(scores);
    scores.iter_mut().for_each(|s| *s = Real::exp((*s - largest) * scale));
    let normalise = T::ONE / sum(scores);
    scores.iter_mut().for_each(|s| *s *= normalise);
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
        let d = sizes.d;
        let (k, v) = (sizes.gather(qkv, sample, 1, head), sizes.gather(qkv, sample, 2, head));
        let scale = T::ONE / T::from_f64(d as f64).sqrt();
        let padding = keys.padding(sample);
        let (mut list, mut p) = (Vec::new(), vec![T::ZERO; sizes.positions]);
        for query in 0..sizes.positions {
            keys.list(&padding, query, &mut list);
            let p = &mut p[..list.len()];
            dots::<T, FMA>(p, &qkv[sizes.row(sample, query, 0, head)..][..d], &k, &list);
            softmax(p, scale);
            // SAFETY: this row belongs to this task alone.
            let row = unsafe { out.row(sizes.output_row(sample, query, head), d) };
            mix::<T, FMA>(row, p, &v, &list);
        }
    }
}

multiversion! {
    /// With p the probabilities of a query and dp = dout·v: ds = p (dp − Σ p dp), dq = ds·k / √d, dk += ds q / √d, dv += p dout.
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
        let (mut list, mut p, mut dp) = (Vec::new(), vec![T::ZERO; positions], vec![T::ZERO; positions]);
        for query in 0..positions {
            keys.list(&padding, query, &mut list);
            let (p, dp) = (&mut p[..list.len()], &mut dp[..list.len()]);
            let q = &qkv[sizes.row(sample, query, 0, head)..][..d];
            let dout = &dout[sizes.output_row(sample, query, head)..][..d];
            dots::<T, FMA>(p, q, &k, &list);
            softmax(p, scale);
            dots::<T, FMA>(dp, dout, &v, &list);
            let mean = dot::<T, FMA>(p, dp);
            dp.iter_mut().zip(&*p).for_each(|(dp, &p)| *dp = (*dp - mean) * p * scale);
            // SAFETY: the rows of a head belong to its task alone, here and below.
            mix::<T, FMA>(unsafe { dqkv.row(sizes.row(sample, query, 0, head), d) }, dp, &k, &list);
            for ((&key, &p), &ds) in list.iter().zip(&*p).zip(&*dp) {
                let range = key * d..(key + 1) * d;
                axpy::<T, FMA>(&mut dk[range.clone()], ds, q);
                axpy::<T, FMA>(&mut dv[range], p, dout);
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
        let text_lengths = (seed % 3 > 0).then(|| (0..samples).map(|_| below(text.len() + 1)).collect());
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
                let keys = random_keys(shape[0], shape[1], seed);
                assert_same(&qkv(*shape, DType::F32), 1e-5, &|v| attention(&v[0], &keys), &|v| composed(&v[0], &keys))?;
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
