//! Sparse attention from stock tensor ops, on any device: no n×n matrix is built.
//!
//! The trick: codes are grouped by rows or columns of the grid, so that all keys of a group are one contiguous list.
//! Row and conv layers multiply a row of codes with a band of rows, which are shifted copies of all keys; column layers
//! multiply columns, which are a transposition. So scores are (b, heads, groups, codes of a group, keys) with a few rows or
//! one column of keys. The few other positions (text, start of image) are multiplied with all keys they can see. What a list
//! does not name is hidden by a bias, which is made once for each list and stays on the device.
//!
//! It is one op for autograd: of a forward pass only the input and the output stay, and the backward pass computes the scores
//! again, as FlashAttention does (arXiv 2205.14135).

use super::{
    blocks::{Biases, Blocks},
    blockwise_parts::{Codes, Others, Placed, split},
    grouping::{biases, blocks, grouped},
    key_ranges::{KeyLists, KeyRanges},
};
use crate::{
    error::Result,
    ops::custom_gradient::custom_gradient,
    runtime::{self, Kernels},
};
use candle_core::{Result as CandleResult, Tensor};
use std::sync::Arc;

/// `qkv (b, l, 3, heads, d)` → `(b, l, heads·d)`, as [`attention`](super::attention()); the softmax is computed in f32 (f64
/// for f64).
///
/// # Errors
/// The device is out of memory.
pub fn attention(qkv: &Tensor, keys: &KeyRanges) -> Result<Tensor> {
    attention_by(runtime::kernels(), qkv, keys)
}

/// [`attention`] with the softmax from stock ops or by a kernel of ours.
///
/// # Errors
/// The device is out of memory.
pub fn attention_by(kernels: Kernels, qkv: &Tensor, keys: &KeyRanges) -> Result<Tensor> {
    let blocks = blocks(&keys.lists, qkv.dim(1)?, qkv.device())?;
    let biases = biases(keys, &blocks, qkv.device())?.clone();
    let attention = Blockwise { kernels, blocks, biases };
    let again = attention.clone();
    let forward = |args: &[Tensor]| Ok(attention.forward(&args[0])?);
    custom_gradient("attention", &[qkv], forward, move |args, _, dy| Ok(vec![again.backward(args[0], dy)?]))
}

/// The scores of a sample and head in the largest tensor of [`attention`].
pub fn scores(lists: &KeyLists, positions: usize) -> usize {
    let blocks = grouped(lists, positions);
    let (groups, size) = blocks.groups();
    let others = positions - blocks.codes.len();
    (groups * size * (blocks.around_len() + blocks.width())).max(others * blocks.reach)
}

/// Attention of one batch.
#[derive(Clone)]
struct Blockwise {
    kernels: Kernels,
    blocks: Arc<Blocks>,
    biases: Biases,
}

impl Blockwise {
    fn forward(&self, qkv: &Tensor) -> CandleResult<Tensor> {
        let (b, l, _, heads, d) = qkv.dims5()?;
        let [q, k, v] = split(qkv)?;
        let others = self.others(&q, &k, &v)?.map(|others| others.output()).transpose()?;
        let codes = self.codes(&q, &k, &v)?.map(|codes| codes.output(&self.blocks)).transpose()?;
        self.joined(others, codes)?.transpose(1, 2)?.reshape((b, l, heads * d))
    }

    /// The gradient of qkv.
    fn backward(&self, qkv: &Tensor, dy: &Tensor) -> CandleResult<Tensor> {
        let (b, l, _, heads, d) = qkv.dims5()?;
        let dy = dy.reshape((b, l, heads, d))?.transpose(1, 2)?.contiguous()?;
        let [q, k, v] = split(qkv)?;
        let (mut dk, mut dv) = (Placed::new(l), Placed::new(l));
        let others = self.others(&q, &k, &v)?;
        let others =
            others.map(|others| others.backward(self.kernels, &self.blocks, &dy, &mut dk, &mut dv)).transpose()?;
        let codes = self.codes(&q, &k, &v)?;
        drop((q, k, v));
        let codes = codes.map(|codes| codes.backward(self.kernels, &self.blocks, &dy, &mut dk, &mut dv)).transpose()?;
        let dq = (self.joined(others, codes)? * (d as f64).powf(-0.5))?;
        // (3, b, heads, l, d)
        let [dk, dv] = [dk, dv].map(|placed| placed.sum.map_or_else(|| dq.zeros_like(), Ok));
        Tensor::stack(&[dq, dk?, dv?], 0)?.permute((1, 3, 0, 2, 4))
    }

    fn others(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> CandleResult<Option<Others>> {
        Others::new(self.kernels, [q, k, v], &self.blocks, &self.biases)
    }

    fn codes(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> CandleResult<Option<Codes>> {
        let some = !self.blocks.codes.is_empty();
        some.then(|| Codes::new(self.kernels, [q, k, v], &self.blocks, &self.biases)).transpose()
    }

    /// All positions (b, heads, l, d) in order, from those that are no codes and from the codes.
    fn joined(&self, others: Option<Tensor>, codes: Option<Tensor>) -> CandleResult<Tensor> {
        let Some(others) = others else {
            return codes.map_or_else(|| candle_core::bail!("attention of no positions"), Ok);
        };
        let (before, count) = (self.blocks.codes.start, others.dim(2)?);
        let mut parts = Vec::with_capacity(3);
        parts.extend((before > 0).then(|| others.narrow(2, 0, before)).transpose()?);
        parts.extend(codes);
        parts.extend((count > before).then(|| others.narrow(2, before, count - before)).transpose()?);
        Tensor::cat(&parts, 2)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{blocks::Shape, composed},
        *,
    };
    use crate::{
        ops::{
            attention::{Codes, Run},
            cuda,
            testing::*,
        },
        random::Random,
    };
    use candle_core::{DType, Var};
    use std::sync::Arc;

    fn qkv(shape: [usize; 4], dtype: DType) -> [Var; 1] {
        let [b, l, heads, d] = shape;
        [normal("qkv", &[b, l, 3, heads, d], dtype)]
    }

    /// Lists of which each query has every key with some probability, of a kind: any key, keys of its own column, or keys of
    /// the band of rows around it; every seventh query has none.
    fn random_lists(positions: usize, codes: Codes, kind: u64, random: &mut Random) -> KeyLists {
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        let inside = codes.positions.clone();
        for query in 0..positions {
            for key in 0..positions {
                let listed = match (inside.contains(&query), inside.contains(&key)) {
                    (true, true) => {
                        let [query, key] = [query, key].map(|position| position - inside.start);
                        match kind {
                            0 => true,
                            1 => query % codes.width == key % codes.width,
                            _ => (query / codes.width).abs_diff(key / codes.width) <= 1,
                        }
                    }
                    // Codes see only some of what is behind them, as of a question and its answer.
                    (true, false) => key < inside.start || key < inside.end + 2,
                    (false, _) => key <= query || kind == 2,
                };
                if listed && query % 7 != 6 && random.unit() < 0.7 {
                    runs.push(Run { start: key, len: 1, stride: 1 });
                }
            }
            offsets.push(runs.len());
        }
        KeyLists::new(offsets, runs, 0..inside.start, Some(codes))
    }

    /// With text before the codes or behind them or both, grids with missing codes, and samples without text.
    #[test]
    fn blockwise_equals_composed() -> Result<()> {
        let mut random = Random::keyed(1, "lists", 0, 0);
        for (i, (front, codes, width, behind)) in
            [(3, 12, 4, 0), (1, 11, 4, 0), (0, 15, 5, 4), (2, 7, 3, 3), (0, 6, 6, 0), (4, 5, 1, 0), (0, 1, 1, 1)]
                .into_iter()
                .enumerate()
        {
            for kind in 0..3 {
                let positions = front + codes + behind;
                let codes = Codes { positions: front..front + codes, width };
                let lists = Arc::new(random_lists(positions, codes, kind, &mut random));
                let lengths = (front > 0).then(|| vec![front, front - 1, 0]);
                let keys = KeyRanges::new(lists, lengths);
                for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
                    let qkv = qkv([3, positions, 2, 4], dtype);
                    assert_same(&qkv, tolerance, &|v| attention(&v[0], &keys), &|v| composed(&v[0], &keys))
                        .map_err(|e| e.context(format!("{i} {kind}")))?;
                }
            }
        }
        Ok(())
    }

    /// The same with the softmax by its kernel, on the emulator: every shape of scores and biases that blocks have.
    #[test]
    fn the_kernel_of_the_softmax_fits_in() -> Result<()> {
        if !cuda::emulator::available() {
            return Ok(());
        }
        let mut random = Random::keyed(3, "lists", 0, 0);
        for (front, codes, width, behind) in [(3, 11, 4, 2), (0, 6, 3, 0), (2, 5, 1, 0)] {
            for kind in 0..3 {
                let positions = front + codes + behind;
                let codes = Codes { positions: front..front + codes, width };
                let lists = Arc::new(random_lists(positions, codes, kind, &mut random));
                let keys = KeyRanges::new(lists, (front > 0).then(|| vec![front, 0]));
                let qkv = qkv([2, positions, 2, 4], DType::F32);
                let fused = |v: &[Tensor]| attention_by(Kernels::Fused, &v[0], &keys);
                assert_same(&qkv, 1e-5, &fused, &|v| composed(&v[0], &keys))?;
            }
        }
        Ok(())
    }

    #[test]
    fn lists_without_codes_are_dense() -> Result<()> {
        let keys = KeyRanges::new(Arc::new(KeyLists::dense(9)), Some(vec![9, 4]));
        let qkv = qkv([2, 9, 2, 8], DType::F64);
        assert_same(&qkv, 1e-10, &|v| attention(&v[0], &keys), &|v| composed(&v[0], &keys))
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let mut random = Random::keyed(2, "lists", 0, 0);
        for kind in 1..3 {
            let lists = Arc::new(random_lists(8, Codes { positions: 2..8, width: 2 }, kind, &mut random));
            let keys = KeyRanges::new(lists, Some(vec![2, 1]));
            assert_gradients(&qkv([2, 8, 1, 3], DType::F64), &|v| attention(&v[0], &keys))?;
        }
        Ok(())
    }

    /// The numbers of scores by hand: two rows for a causal window of rows, one column for columns.
    #[test]
    fn groups_are_as_small_as_the_lists_allow() {
        let lists = |stride: usize, before: usize| {
            let (mut offsets, mut runs) = (vec![0], Vec::new());
            for query in 0..12_usize {
                let start = query.saturating_sub(before);
                let start = if stride > 1 { query % stride } else { start };
                runs.push(Run { start, len: (query - start) / stride + 1, stride });
                offsets.push(runs.len());
            }
            KeyLists::new(offsets, runs, 0..0, Some(Codes { positions: 0..12, width: 4 }))
        };
        let shape = |lists: &KeyLists| grouped(lists, 12).shape;
        assert_eq!(shape(&lists(1, 4)), Shape::Band { before: 1, after: 0 });
        assert_eq!(shape(&lists(1, 0)), Shape::Columns, "only itself");
        assert_eq!(shape(&lists(4, 0)), Shape::Columns);
        assert_eq!(shape(&lists(1, 12)), Shape::All);
        assert_eq!([4, 0].map(|before| scores(&lists(1, before), 12)), [12 * 8, 12 * 3]);
    }
}
