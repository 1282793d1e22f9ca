//! The parts of [`blockwise`](super::blockwise) attention, forward and backward: the positions that are no codes, and the codes
//! in groups.

use super::{
    blocks::{Biases, Blocks, Shape},
    blockwise_softmax::{softmax, softmax_backward},
};
use crate::runtime::Kernels;
use candle_core::{D, Result, Tensor};
use std::ops::Range;

/// qkv (b, l, 3, heads, d) → queries, divided by √d, keys and values (b, heads, l, d).
pub fn split(qkv: &Tensor) -> Result<[Tensor; 3]> {
    let d = qkv.dim(D::Minus1)?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    Ok([(part(0)? * (d as f64).powf(-0.5))?, part(1)?, part(2)?])
}

/// A gradient of keys or values (b, heads, l, d) as the sum of those of ranges of positions.
pub struct Placed {
    positions: usize,
    /// `None`: no position is a key.
    pub sum: Option<Tensor>,
}

impl Placed {
    pub fn new(positions: usize) -> Self {
        Self { positions, sum: None }
    }

    /// Adds the gradient of the positions from `start`.
    fn add(&mut self, start: usize, part: &Tensor) -> Result<()> {
        let part = part.pad_with_zeros(2, start, self.positions - start - part.dim(2)?)?;
        self.sum = Some(match self.sum.take() {
            Some(sum) => (sum + part)?,
            None => part,
        });
        Ok(())
    }
}

/// The positions that are no codes, with the keys and values of the first positions.
pub struct Others {
    /// (b, heads, others, d)
    q: Tensor,
    seen: Option<Seen>,
}

struct Seen {
    /// (b, heads, reach, d)
    k: Tensor,
    v: Tensor,
    /// (b, heads, others, reach)
    weights: Tensor,
}

impl Others {
    /// `None`: all positions are codes.
    pub fn new(kernels: Kernels, [q, k, v]: [&Tensor; 3], blocks: &Blocks, biases: &Biases) -> Result<Option<Self>> {
        let Some(q) = outside(q, &blocks.codes)? else { return Ok(None) };
        if blocks.reach == 0 {
            return Ok(Some(Self { q, seen: None }));
        }
        let (k, v) = (k.narrow(2, 0, blocks.reach)?.contiguous()?, v.narrow(2, 0, blocks.reach)?.contiguous()?);
        let weights = softmax(kernels, &q.matmul(&k.t()?)?, biases.others.as_ref(), biases.has_empty)?;
        Ok(Some(Self { q, seen: Some(Seen { k, v, weights }) }))
    }

    /// (b, heads, others, d)
    pub fn output(&self) -> Result<Tensor> {
        match &self.seen {
            Some(Seen { v, weights, .. }) => weights.matmul(v),
            None => self.q.zeros_like(),
        }
    }

    /// The gradient of the queries, from that of the output at all positions; adds to those of keys and values.
    pub fn backward(
        self,
        kernels: Kernels,
        blocks: &Blocks,
        dy: &Tensor,
        dk: &mut Placed,
        dv: &mut Placed,
    ) -> Result<Tensor> {
        let (Some(Seen { k, v, weights }), Some(dy)) = (self.seen, outside(dy, &blocks.codes)?) else {
            return self.q.zeros_like();
        };
        dv.add(0, &weights.t()?.matmul(&dy)?)?;
        let dscores = softmax_backward(kernels, &weights, dy.matmul(&v.t()?)?)?;
        dk.add(0, &dscores.t()?.matmul(&self.q)?)?;
        dscores.matmul(&k)
    }
}

/// The codes in groups, each with the positions around the image and the keys of its group.
pub struct Codes {
    /// (b, heads, groups, codes of a group, d)
    q: Tensor,
    /// (b · heads · groups, keys, d)
    keys: Tensor,
    values: Tensor,
    /// Keys and values (b, heads, around, d).
    around: Option<[Tensor; 2]>,
    /// (b, heads, groups, codes of a group, around + keys)
    weights: Tensor,
}

impl Codes {
    pub fn new(kernels: Kernels, [q, k, v]: [&Tensor; 3], blocks: &Blocks, biases: &Biases) -> Result<Self> {
        let q = blocks.queries(q)?;
        let (b, heads, groups, size, d) = q.dims5()?;
        let flat = |x: Tensor| x.reshape((b * heads * groups, (), d));
        let (keys, values) = (flat(blocks.keys(k)?)?, flat(blocks.keys(v)?)?);
        let mut scores = flat(q.clone())?.matmul(&keys.t()?)?.reshape((b, heads, groups, size, ()))?;
        let around = blocks.around(k)?.zip(blocks.around(v)?).map(|(k, v)| [k, v]);
        if let Some([k, _]) = &around {
            let of_around = q.reshape((b, heads, groups * size, d))?.matmul(&k.t()?)?;
            scores = Tensor::cat(&[&of_around.reshape((b, heads, groups, size, ()))?, &scores], D::Minus1)?;
        }
        let weights = softmax(kernels, &scores, biases.codes.as_ref(), biases.has_empty)?;
        Ok(Self { q, keys, values, around, weights })
    }

    /// Scores or weights of the positions around, (b, heads, codes of all groups, around), and of the keys of groups, (b · heads ·
    /// groups, codes of a group, keys).
    fn parts(&self, scores: &Tensor) -> Result<(Option<Tensor>, Tensor)> {
        let (b, heads, groups, size, all) = scores.dims5()?;
        let width = self.keys.dim(1)?;
        let around = (all > width)
            .then(|| scores.narrow(D::Minus1, 0, all - width)?.contiguous()?.reshape((b, heads, groups * size, ())));
        let own = scores.narrow(D::Minus1, all - width, width)?.contiguous()?;
        Ok((around.transpose()?, own.reshape((b * heads * groups, size, width))?))
    }

    /// (b, heads, codes, d)
    pub fn output(&self, blocks: &Blocks) -> Result<Tensor> {
        let (b, heads, groups, size, d) = self.q.dims5()?;
        let (of_around, own) = self.parts(&self.weights)?;
        let mut out = own.matmul(&self.values)?.reshape((b, heads, groups * size, d))?;
        if let (Some(weights), Some([_, v])) = (of_around, &self.around) {
            out = (out + weights.matmul(v)?)?;
        }
        blocks.raster(&out)
    }

    /// The gradient of the queries (b, heads, codes, d), from that of the output at all positions; adds to those of keys and
    /// values.
    pub fn backward(
        self,
        kernels: Kernels,
        blocks: &Blocks,
        dy: &Tensor,
        dk: &mut Placed,
        dv: &mut Placed,
    ) -> Result<Tensor> {
        let (b, heads, groups, size, d) = self.q.dims5()?;
        let (flat, rows) = ((b * heads * groups, size, d), (b, heads, groups * size, d));
        let dy = blocks.queries(dy)?;
        let (dy_own, dy_around) = (dy.reshape(flat)?, dy.reshape(rows)?);
        let (of_around, own) = self.parts(&self.weights)?;
        dv.add(blocks.codes.start, &blocks.codes_of_keys(&own.t()?.matmul(&dy_own)?, b, heads)?)?;
        drop(own);
        let mut dweights = dy_own.matmul(&self.values.t()?)?.reshape((b, heads, groups, size, ()))?;
        if let (Some(weights), Some([_, v])) = (of_around, &self.around) {
            blocks.add_around(dv, &weights.t()?.matmul(&dy_around)?)?;
            let of_around = dy_around.matmul(&v.t()?)?.reshape((b, heads, groups, size, ()))?;
            dweights = Tensor::cat(&[&of_around, &dweights], D::Minus1)?;
        }
        let dscores = softmax_backward(kernels, &self.weights, dweights)?;
        let (of_around, own) = self.parts(&dscores)?;
        drop(dscores);
        let mut dq = own.matmul(&self.keys)?.reshape(rows)?;
        dk.add(blocks.codes.start, &blocks.codes_of_keys(&own.t()?.matmul(&self.q.reshape(flat)?)?, b, heads)?)?;
        if let (Some(dscores), Some([k, _])) = (of_around, &self.around) {
            blocks.add_around(dk, &dscores.t()?.matmul(&self.q.reshape(rows)?)?)?;
            dq = (dq + dscores.matmul(k)?)?;
        }
        blocks.raster(&dq)
    }
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
        match self.shape {
            Shape::Band { .. } => Ok(x),
            Shape::Columns => x.transpose(2, 3)?.contiguous(),
            Shape::All => x.flatten(2, 3)?.unsqueeze(2),
        }
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
        Tensor::cat(&shifted.collect::<Result<Vec<_>>>()?, 3)
    }

    /// (b, heads, l, d) → (b, heads, height, width, d).
    fn cells(&self, x: &Tensor) -> Result<Tensor> {
        let (b, heads, _, d) = x.dims4()?;
        let (height, width) = self.grid;
        let codes = x.narrow(2, self.codes.start, self.codes.len())?;
        let missing = height * width - self.codes.len();
        let all = if missing > 0 { codes.pad_with_zeros(2, 0, missing)? } else { codes.contiguous()? };
        all.reshape((b, heads, height, width, d))
    }

    /// The keys or values around the codes, (b, heads, keys, d); `None`: codes attend to none of them.
    fn around(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let ranges = self.around.iter().filter(|range| !range.is_empty());
        let parts = ranges.map(|range| x.narrow(2, range.start, range.len())).collect::<Result<Vec<_>>>()?;
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
        x.narrow(2, 0, self.codes.len())
    }

    /// The transpose of [`Blocks::keys`], to the codes: (b · heads · groups, keys, d) → (b, heads, codes, d).
    fn codes_of_keys(&self, x: &Tensor, b: usize, heads: usize) -> Result<Tensor> {
        let d = x.dim(D::Minus1)?;
        let (height, width) = self.grid;
        let Shape::Band { before, after } = self.shape else { return self.raster(&x.reshape((b, heads, (), d))?) };
        let x = x.reshape((b, heads, height, before + 1 + after, width, d))?;
        let mut sum: Option<Tensor> = None;
        for shift in 0..=before + after {
            // The keys of row r are the rows r - before + shift.
            let part = x.narrow(3, shift, 1)?.squeeze(3)?;
            let (skipped, first) = (before.saturating_sub(shift), shift.saturating_sub(before));
            let count = height - skipped.max(first);
            let part = part.narrow(2, skipped, count)?.pad_with_zeros(2, first, height - first - count)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let Some(sum) = sum else { candle_core::bail!("a band without rows") };
        sum.reshape((b, heads, height * width, d))?.narrow(2, 0, self.codes.len())
    }

    /// The transpose of [`Blocks::around`]: adds the gradients (b, heads, around, d) to those of all positions.
    fn add_around(&self, sum: &mut Placed, x: &Tensor) -> Result<()> {
        let mut at = 0;
        for range in self.around.iter().filter(|range| !range.is_empty()) {
            sum.add(range.start, &x.narrow(2, at, range.len())?)?;
            at += range.len();
        }
        Ok(())
    }
}
