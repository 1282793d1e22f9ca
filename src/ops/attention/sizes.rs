//! Sizes and memory layout of packed queries, keys and values.

use candle_core::Shape;

/// Sizes of a packed `qkv (samples, positions, 3, heads, d)`.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub samples: usize,
    pub positions: usize,
    pub heads: usize,
    pub d: usize,
}

impl Sizes {
    pub(super) fn of(shape: &Shape) -> candle_core::Result<Self> {
        let (samples, positions, _, heads, d) = shape.dims5()?;
        Ok(Self { samples, positions, heads, d })
    }

    /// Elements of the output.
    pub(super) fn outputs(&self) -> usize {
        self.samples * self.positions * self.heads * self.d
    }

    /// Offset of the row of a head in the output.
    pub(super) fn output_row(&self, sample: usize, position: usize, head: usize) -> usize {
        ((sample * self.positions + position) * self.heads + head) * self.d
    }

    /// Offset of the query (`part` 0), key (1) or value (2) of a head in qkv.
    pub(super) fn row(&self, sample: usize, position: usize, part: usize, head: usize) -> usize {
        (((sample * self.positions + position) * 3 + part) * self.heads + head) * self.d
    }
}
