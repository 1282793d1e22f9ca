//! Sparse attention from stock tensor ops, on any device, with autograd: no n×n matrix is built.
//!
//! The trick: codes are grouped by rows or columns of the grid, so that all keys of a group are one contiguous list.
//! Row and conv layers multiply a row of codes with a band of rows, which are shifted copies of all keys; column layers
//! multiply columns, which are a transposition. So scores are (b, heads, groups, codes of a group, keys) with a few rows or
//! one column of keys. The few other positions (text, start of image) are multiplied with all keys they can see. What a list
//! does not name is hidden by a bias, which is made once for each list and stays on the device.

use super::{
    blocks::{Biases, Blocks, Shape},
    grouping::{HIDDEN, biases, blocks, grouped},
    key_ranges::{KeyLists, KeyRanges},
    softmax_cuda,
};
use crate::{
    error::Result,
    ops::{cuda, custom_gradient::custom_gradient, slices::is_half},
    runtime::{self, Kernels},
};
use candle_core::{D, DType, Tensor};
use std::ops::Range;

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
    let (b, l, _, heads, d) = qkv.dims5()?;
    let blocks = blocks(&keys.lists, l, qkv.device())?;
    let biases = biases(keys, blocks, qkv.device())?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = ((part(0)? * (d as f64).powf(-0.5))?, part(1)?, part(2)?);
    let codes = &blocks.codes;
    let mut parts = Vec::with_capacity(3);
    let others = others(kernels, &q, &k, &v, blocks, biases)?;
    if let Some(others) = &others {
        parts.extend((codes.start > 0).then(|| others.narrow(2, 0, codes.start)).transpose()?);
    }
    if !codes.is_empty() {
        parts.push(of_codes(kernels, &q, &k, &v, blocks, biases)?);
    }
    if let Some(others) = &others {
        let behind = l - codes.end;
        parts.extend((behind > 0).then(|| others.narrow(2, codes.start, behind)).transpose()?);
    }
    Ok(Tensor::cat(&parts, 2)?.transpose(1, 2)?.reshape((b, l, heads * d))?)
}

/// The scores of a sample and head in the largest tensor of [`attention`].
pub fn scores(lists: &KeyLists, positions: usize) -> usize {
    let blocks = grouped(lists, positions);
    let (groups, size) = blocks.groups();
    let others = positions - blocks.codes.len();
    (groups * size * (blocks.around_len() + blocks.width())).max(others * blocks.reach)
}

/// The positions that are no codes (b, heads, others, d), in order; `None`: there are none.
fn others(
    kernels: Kernels,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    blocks: &Blocks,
    biases: &Biases,
) -> Result<Option<Tensor>> {
    let q = outside(q, &blocks.codes)?;
    let Some(q) = q else { return Ok(None) };
    if blocks.reach == 0 {
        return Ok(Some(q.zeros_like()?));
    }
    let (k, v) = (k.narrow(2, 0, blocks.reach)?.contiguous()?, v.narrow(2, 0, blocks.reach)?.contiguous()?);
    let weights = softmax(kernels, &q.matmul(&k.t()?)?, biases.others.as_ref(), biases.has_empty)?;
    Ok(Some(weights.matmul(&v)?))
}

/// The codes (b, heads, codes, d): each group against the positions around the image and the keys of its group.
fn of_codes(kernels: Kernels, q: &Tensor, k: &Tensor, v: &Tensor, blocks: &Blocks, biases: &Biases) -> Result<Tensor> {
    let (b, heads, _, d) = q.dims4()?;
    let (groups, size) = blocks.groups();
    let batched = b * heads * groups;
    let q = blocks.queries(q)?;
    let (keys, values) = (blocks.keys(k)?, blocks.keys(v)?);
    let width = keys.dim(3)?;
    let flat = |x: &Tensor| x.reshape((batched, (), d));
    let mut scores = flat(&q)?.matmul(&flat(&keys)?.t()?)?.reshape((b, heads, groups, size, width))?;
    let (around_k, around_v) = (blocks.around(k)?, blocks.around(v)?);
    if let Some(around) = &around_k {
        let of_around = q.reshape((b, heads, groups * size, d))?.matmul(&around.t()?)?;
        scores = Tensor::cat(&[&of_around.reshape((b, heads, groups, size, ()))?, &scores], D::Minus1)?;
    }
    let weights = softmax(kernels, &scores, biases.codes.as_ref(), biases.has_empty)?;
    let around = weights.dim(D::Minus1)? - width;
    let own = weights.narrow(D::Minus1, around, width)?.contiguous()?.reshape((batched, size, width))?;
    let mut out = own.matmul(&flat(&values)?)?.reshape((b, heads, groups * size, d))?;
    if let Some(values) = &around_v {
        let weights = weights.narrow(D::Minus1, 0, around)?.contiguous()?.reshape((b, heads, groups * size, around))?;
        out = (out + weights.matmul(values)?)?;
    }
    blocks.raster(&out)
}

/// Softmax of the scores plus the bias over the last dimension, computed in f32 and returned in the type of the scores. If
/// `has_empty`, rows in which everything is hidden become zero.
fn softmax(kernels: Kernels, scores: &Tensor, bias: Option<&Tensor>, has_empty: bool) -> Result<Tensor> {
    if cuda::takes(kernels, &[scores])
        && let Some(weights) = softmax_cuda::softmax(scores, bias, HIDDEN / 2.0)?
    {
        return Ok(weights);
    }
    let forward = |args: &[Tensor]| stock_softmax(&args[0], bias, has_empty);
    custom_gradient("softmax", &[scores], forward, |_, y, dy| stock_softmax_backward(y, dy))
}

/// The gradient of the scores, y · (dy − Σ y · dy).
fn stock_softmax_backward(y: &Tensor, dy: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    let wide = if is_half(y.dtype()) { DType::F32 } else { y.dtype() };
    let (weights, dy) = (y.to_dtype(wide)?, dy.to_dtype(wide)?);
    let sums = (&weights * &dy)?.sum_keepdim(D::Minus1)?;
    let centred = dy.broadcast_sub(&sums)?;
    drop(dy);
    Ok(vec![(weights * centred)?.to_dtype(y.dtype())?])
}

/// [`softmax`] from stock candle ops.
pub(super) fn stock_softmax(scores: &Tensor, bias: Option<&Tensor>, has_empty: bool) -> Result<Tensor> {
    let (dtype, wide) = (scores.dtype(), if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 });
    let mut scores = scores.to_dtype(wide)?;
    let bias = bias.map(|bias| bias.to_dtype(wide)).transpose()?;
    if let Some(bias) = &bias {
        scores = scores.broadcast_add(bias)?;
    }
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let mut weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    if let Some(bias) = bias.filter(|_| has_empty) {
        let visible = bias.max_keepdim(D::Minus1)?.gt(f64::from(HIDDEN) / 2.0)?;
        weights = weights.broadcast_mul(&visible.to_dtype(wide)?)?;
    }
    Ok(weights.to_dtype(dtype)?)
}

/// The positions of dimension 2 outside of a range; `None`: there are none.
fn outside(x: &Tensor, range: &Range<usize>) -> Result<Option<Tensor>> {
    let l = x.dim(2)?;
    Ok(match (range.start, l - range.end) {
        (0, 0) => None,
        (0, behind) => Some(x.narrow(2, range.end, behind)?.contiguous()?),
        (before, 0) => Some(x.narrow(2, 0, before)?.contiguous()?),
        (before, behind) => Some(Tensor::cat(&[x.narrow(2, 0, before)?, x.narrow(2, range.end, behind)?], 2)?),
    })
}

impl Blocks {
    /// The codes (b, heads, l, d) in the order of the groups, (b, heads, groups, codes of a group, d). Cells without a code
    /// are zero.
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.cells(x)?;
        Ok(match self.shape {
            Shape::Band { .. } => x,
            Shape::Columns => x.transpose(2, 3)?.contiguous()?,
            Shape::All => x.flatten(2, 3)?.unsqueeze(2)?,
        })
    }

    /// The keys or values of each group, (b, heads, groups, keys, d).
    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let Shape::Band { before, after } = self.shape else { return self.queries(x) };
        let cells = self.cells(x)?;
        if before + after == 0 {
            return Ok(cells);
        }
        let height = self.grid.0;
        let padded = cells.pad_with_zeros(2, before, after)?;
        let shifted = (0..=before + after).map(|shift| padded.narrow(2, shift, height));
        Ok(Tensor::cat(&shifted.collect::<candle_core::Result<Vec<_>>>()?, 3)?)
    }

    /// (b, heads, l, d) → (b, heads, height, width, d).
    fn cells(&self, x: &Tensor) -> Result<Tensor> {
        let (b, heads, _, d) = x.dims4()?;
        let (height, width) = self.grid;
        let codes = x.narrow(2, self.codes.start, self.codes.len())?;
        let missing = height * width - self.codes.len();
        let all = if missing > 0 { codes.pad_with_zeros(2, 0, missing)? } else { codes.contiguous()? };
        Ok(all.reshape((b, heads, height, width, d))?)
    }

    /// The keys or values around the codes, (b, heads, keys, d); `None`: codes attend to none of them.
    fn around(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let ranges = self.around.iter().filter(|range| !range.is_empty());
        let parts =
            ranges.map(|range| x.narrow(2, range.start, range.len())).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(match &parts[..] {
            [] => None,
            [one] => Some(one.contiguous()?),
            parts => Some(Tensor::cat(parts, 2)?),
        })
    }

    /// The inverse of [`Blocks::queries`]: (b, heads, groups · codes of a group, d) → (b, heads, codes, d).
    fn raster(&self, x: &Tensor) -> Result<Tensor> {
        let (b, heads, cells, d) = x.dims4()?;
        let x = match self.shape {
            Shape::Band { .. } | Shape::All => x.clone(),
            Shape::Columns => {
                let (groups, size) = self.groups();
                x.reshape((b, heads, groups, size, d))?.transpose(2, 3)?.contiguous()?.reshape((b, heads, cells, d))?
            }
        };
        Ok(x.narrow(2, 0, self.codes.len())?)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::composed, *};
    use crate::{
        ops::{
            attention::{Codes, Run},
            testing::*,
        },
        random::Random,
    };
    use candle_core::Var;
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
