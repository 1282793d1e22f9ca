//! Sparse attention: each query only reads the keys of its list, in forward and backward. No n×n matrix is built; the
//! backward pass recomputes the probabilities from the log-sum-exp of each query.
//!
//! The trick: one task is one head of one sample. Its keys and values are gathered once, so that columns of codes
//! become contiguous (`plan`). Blocks of adjacent queries are then multiplied with the union of their keys in
//! register-blocked products (`products`, `kernel`), with an online softmax (Dao et al., arXiv 2205.14135).

mod blocks;
pub mod blockwise;
mod blockwise_parts;
mod blockwise_parts_tape;
mod blockwise_softmax;
pub mod blockwise_tape;
pub mod cached;
mod grouping;
mod heads;
pub mod image;
mod kernel;
pub mod key_ranges;
mod plan;
mod products;
mod sizes;
mod softmax_cuda;

use crate::{
    error::{Result, ensure},
    ops::slices::{Scatter, by_dtype, fresh, has_cpu_kernels, slice, storage, tensor, view},
};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Tensor, backend::BackendStorage};
use heads::{Head, Inputs, Scratch, backward_head, forward_head};
use kernel::Element;
pub use key_ranges::{Codes, KeyLists, KeyRanges, Run};
use plan::Plan;
use rayon::prelude::*;
pub use sizes::Sizes;
use std::sync::Arc;

/// `qkv (b, l, 3, heads, d)` → `(b, l, heads·d)`: softmax of q·k / √d over the listed keys, times v. A query
/// without keys gives zeros.
pub fn attention(qkv: &Tensor, keys: &Arc<KeyRanges>) -> Result<Tensor> {
    let (samples, positions, three, _, _) = qkv.dims5()?;
    ensure!(three == 3, "attention: expected queries, keys and values, got {three} parts");
    keys.check(samples, positions)?;
    if !has_cpu_kernels(qkv) {
        return blockwise::attention(qkv, keys);
    }
    Ok(qkv.contiguous()?.apply_op1(Attention { keys: keys.clone() })?)
}

/// [`attention()`] with a full mask, from stock candle ops.
pub(crate) fn composed(qkv: &Tensor, keys: &KeyRanges) -> Result<Tensor> {
    let (b, l, _, heads, d) = qkv.dims5()?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? * (d as f64).powf(-0.5))?;
    let mask = Tensor::from_vec(keys.mask(b, l), (b, 1, l, l), qkv.device())?.broadcast_as(scores.shape())?;
    // Masked scores are far below all others but finite: otherwise a row without keys would become NaN.
    let hidden = (scores.zeros_like()? - 1e30)?;
    let scores = mask.where_cond(&scores, &hidden)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = (weights * mask.to_dtype(qkv.dtype())?)?;
    let sums = weights.sum_keepdim(D::Minus1)?.maximum(1e-30)?;
    let out = weights.broadcast_div(&sums)?.matmul(&v)?;
    Ok(out.transpose(1, 2)?.reshape((b, l, heads * d))?)
}

/// Runs `f` for every head of every sample in parallel, with buffers that tasks reuse.
fn each_head<R>(
    sizes: Sizes,
    keys: &KeyRanges,
    workspace: impl Fn() -> R + Sync + Send,
    task: impl Fn(&mut R, Head) + Sync + Send,
) {
    (0..sizes.samples * sizes.heads).into_par_iter().for_each_init(workspace, |workspace, i| {
        let sample = i / sizes.heads;
        task(workspace, Head { sample, head: i % sizes.heads, padding: keys.padding(sample) });
    });
}

/// Writes the output (samples, positions, heads, d), and the log-sum-exp of the scores of each query (samples, heads,
/// positions), which the backward pass needs; it is 0 for a query without keys.
pub fn forward_into<T: Element>(out: &mut [T], lse: &mut [T], qkv: &[T], keys: &KeyRanges, sizes: Sizes) {
    let plan = Plan::new(keys);
    let inputs = Inputs { qkv, plan: &plan, sizes, shape: products::Shape::new(sizes.d) };
    let (out, lse) = (Scatter::new(out), Scatter::new(lse));
    let workspace = || Scratch::forward(sizes.positions, inputs.shape);
    each_head(sizes, keys, workspace, |workspace, head| forward_head(&out, &lse, inputs, head, workspace));
}

/// Writes dqkv, from the results of the forward pass and the gradient of its output.
pub fn backward_into<T: Element>(
    dqkv: &mut [T],
    qkv: &[T],
    (out, lse): (&[T], &[T]),
    dout: &[T],
    keys: &KeyRanges,
    sizes: Sizes,
) {
    let plan = Plan::new(keys);
    let inputs = Inputs { qkv, plan: &plan, sizes, shape: products::Shape::new(sizes.d) };
    let dqkv = Scatter::new(dqkv);
    let workspace = || Scratch::backward(sizes.positions, inputs.shape);
    each_head(sizes, keys, workspace, |workspace, head| backward_head(&dqkv, inputs, out, lse, dout, head, workspace));
}

/// The output and the log-sum-exp, see [`forward_into`].
pub fn forward_saved<T: Element>(qkv: &[T], keys: &KeyRanges, sizes: Sizes) -> (Vec<T>, Vec<T>) {
    let mut lse = vec![T::ZERO; sizes.samples * sizes.heads * sizes.positions];
    // SAFETY: the tasks write every row of every head.
    let out = unsafe { fresh(sizes.outputs(), |out| forward_into(out, &mut lse, qkv, keys, sizes)) };
    (out, lse)
}

/// The output (samples, positions, heads, d).
pub fn forward<T: Element>(qkv: &[T], keys: &KeyRanges, sizes: Sizes) -> Vec<T> {
    forward_saved(qkv, keys, sizes).0
}

/// dqkv, from the gradient of the output; runs the forward pass again, unlike [`backward_saved`].
pub fn backward<T: Element>(qkv: &[T], dout: &[T], keys: &KeyRanges, sizes: Sizes) -> Vec<T> {
    let (out, lse) = forward_saved(qkv, keys, sizes);
    backward_saved(qkv, (&out, &lse), dout, keys, sizes)
}

/// dqkv, from the result of [`forward_saved`] and the gradient of the output.
pub fn backward_saved<T: Element>(
    qkv: &[T],
    saved: (&[T], &[T]),
    dout: &[T],
    keys: &KeyRanges,
    sizes: Sizes,
) -> Vec<T> {
    // SAFETY: the tasks write every row of every part of every head.
    unsafe { fresh(3 * sizes.outputs(), |dqkv| backward_into(dqkv, qkv, saved, dout, keys, sizes)) }
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

    /// Random lists, including empty ones, strides, and padded text at the start.
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
        Arc::new(KeyRanges::new(Arc::new(KeyLists::new(offsets, runs, text, None)), text_lengths))
    }

    fn qkv(shape: [usize; 4], dtype: DType) -> [candle_core::Var; 1] {
        let [b, l, heads, d] = shape;
        [normal("qkv", &[b, l, 3, heads, d], dtype)]
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
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

    /// Text, then a grid in columns, rows and neighborhoods, causal or not: longer than a chunk, with orders and
    /// alignments that random lists do not contain.
    #[test]
    fn fused_equals_composed_on_grids() -> Result<()> {
        let (text, width, height) = (5, 12, 13);
        let positions = text + width * height;
        for (pattern, causal) in (0..4).flat_map(|pattern| [(pattern, false), (pattern, true)]) {
            let (mut offsets, mut runs) = (vec![0], Vec::new());
            for query in 0..positions {
                runs.push(Run { start: 0, len: text, stride: 1 });
                let last = if causal { query } else { positions - 1 };
                let code = query.saturating_sub(text);
                let (start, stride) = match pattern {
                    0 => (0, 1),
                    1 => (code.saturating_sub(width), 1),
                    2 => (code - code % width, 1),
                    _ => (code % width, width),
                };
                let end = if pattern == 1 { last.min(query + width) } else { last };
                if query >= text {
                    runs.push(Run { start: text + start, len: (end - text - start) / stride + 1, stride });
                }
                offsets.push(runs.len());
            }
            let lists = Arc::new(KeyLists::new(offsets, runs, 0..text, None));
            let keys = Arc::new(KeyRanges::new(lists, Some(vec![3, 5])));
            let qkv = qkv([2, positions, 1, 20], DType::F32);
            at_each_level(|| assert_same(&qkv, 1e-5, &|v| attention(&v[0], &keys), &|v| composed(&v[0], &keys)))?;
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let keys = random_keys(2, 6, 1);
        assert_gradients(&qkv([2, 6, 2, 3], DType::F64), &|v| attention(&v[0], &keys))
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        let keys = random_keys(3, 40, 2);
        assert_thread_independent(&qkv([3, 40, 2, 32], DType::F32), &|v| attention(&v[0], &keys))
    }

    #[test]
    fn padding_is_not_read_and_no_keys_give_zeros() -> Result<()> {
        let runs = vec![Run { start: 0, len: 4, stride: 1 }];
        let lists = Arc::new(KeyLists::new(vec![0, 1, 1, 1, 1], runs, 0..4, None));
        let keys = Arc::new(KeyRanges::new(lists, Some(vec![1, 0])));
        let [qkv] = qkv([2, 4, 1, 2], DType::F32);
        let (all, out) = (values(&qkv), values(&attention(&qkv, &keys)?));
        assert_eq!(out[..2], all[4..6], "the only key's value");
        assert!(out[2..].iter().all(|&x| x == 0.0));
        Ok(())
    }

    #[test]
    fn lists_of_other_sizes_are_errors() {
        let [qkv] = qkv([2, 4, 1, 2], DType::F32);
        let keys = |offsets: Vec<usize>, runs: Vec<Run>, text_lengths: Option<Vec<usize>>| {
            Arc::new(KeyRanges::new(Arc::new(KeyLists::new(offsets, runs, 0..0, None)), text_lengths))
        };
        let run = Run { start: 3, len: 2, stride: 1 };
        assert!(attention(&qkv, &keys(vec![0; 5], vec![], None)).is_ok());
        for bad in [
            keys(vec![0; 4], vec![], None),
            keys(vec![0, 0, 0, 0, 1], vec![], None),
            keys(vec![0, 0, 0, 0, 1], vec![run], None),
            keys(vec![0; 5], vec![], Some(vec![1])),
        ] {
            assert!(attention(&qkv, &bad).is_err());
        }
    }
}
