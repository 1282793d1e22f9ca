//! The sequence of each direction: `[source | target]`, who sees whom, and what is predicted (paper §2.2).
//!
//! | direction | source | target inputs | outputs |
//! | --- | --- | --- | --- |
//! | text→image | text, m positions | start of image, z₁ … zₙ₋₁ | z₁ … zₙ |
//! | image→text | z₁ … zₙ | text without its last position | text without `[CLS]` |
//!
//! Nothing is shifted: a code sits at its own place of the grid whether it is source or target.

use crate::{
    error::{Result, ensure},
    nn::pattern::{Grid, Pattern},
    ops::attention::{KeyRanges, Run},
};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// What is made from what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    TextToImage,
    ImageToText,
}

/// Sequences of one direction.
#[derive(Debug, Clone)]
pub struct Batch {
    pub direction: Direction,
    /// (b, m) u32: `[CLS]`, tokens, `[SEP]`, padding. A dropped condition is `[CLS] [SEP]`.
    pub text: Tensor,
    /// Positions in use of each row of `text`.
    pub text_lengths: Vec<usize>,
    /// (b, n) u32 in raster order.
    pub codes: Tensor,
    /// The loss is `loss_scale` · Σ −log p(target token).
    pub loss_scale: f64,
}

impl Batch {
    /// Number of predicted tokens.
    pub fn targets(&self) -> usize {
        match self.direction {
            Direction::TextToImage => self.codes.elem_count(),
            Direction::ImageToText => self.text_lengths.iter().map(|&length| length.saturating_sub(1)).sum(),
        }
    }

    /// The tokens that the target positions predict and their weights in the loss, both (b · targets); padding has weight 0.
    pub fn outputs(&self) -> Result<(Tensor, Tensor)> {
        let (b, m) = self.text.dims2()?;
        let scale = self.loss_scale as f32;
        let (tokens, weights) = match self.direction {
            Direction::TextToImage => (self.codes.clone(), vec![scale; self.codes.elem_count()]),
            Direction::ImageToText => {
                let weight = |&length: &usize| (1..m).map(move |i| if i < length { scale } else { 0.0 });
                (self.text.narrow(1, 1, m - 1)?, self.text_lengths.iter().flat_map(weight).collect())
            }
        };
        let count = weights.len();
        ensure!(
            self.text_lengths.len() == b && tokens.elem_count() == count,
            "text, its lengths and codes differ in number"
        );
        Ok((tokens.contiguous()?.flatten_all()?, Tensor::from_vec(weights, count, self.text.device())?))
    }
}

/// What a position of a sequence holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The text's token `i`.
    Text(usize),
    /// The learned start of the image: outside the grid and, like text, densely visible.
    Start,
    /// The code at this place of the grid.
    Image(usize),
}

/// The shape of a direction's sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub direction: Direction,
    /// Text positions.
    pub text: usize,
    pub grid: Grid,
}

impl Layout {
    /// Of the sequences of a batch.
    pub fn of(batch: &Batch, grid: Grid) -> Result<Self> {
        Ok(Self { direction: batch.direction, text: batch.text.dim(1)?, grid })
    }

    /// Positions of the source; the target begins there.
    pub fn source(&self) -> usize {
        match self.direction {
            Direction::TextToImage => self.text,
            Direction::ImageToText => self.grid.len(),
        }
    }

    /// Positions of the target.
    pub fn target(&self) -> usize {
        match self.direction {
            Direction::TextToImage => self.grid.len(),
            Direction::ImageToText => self.text - 1,
        }
    }

    /// All positions.
    pub fn positions(&self) -> usize {
        self.source() + self.target()
    }

    /// What `position` holds.
    pub fn slot(&self, position: usize) -> Slot {
        match (self.direction, position.checked_sub(self.source())) {
            (Direction::TextToImage, None) => Slot::Text(position),
            (Direction::TextToImage, Some(0)) => Slot::Start,
            (Direction::TextToImage, Some(target)) => Slot::Image(target - 1),
            (Direction::ImageToText, None) => Slot::Image(position),
            (Direction::ImageToText, Some(target)) => Slot::Text(target),
        }
    }

    /// The mask rule, one pair of positions at a time: source positions weigh 0, target position j weighs
    /// j + 1, and a query sees keys that weigh no more than itself; codes see codes through the layer's
    /// pattern, and the padding of a source text of `text_length` is seen by nobody.
    pub fn visible(&self, pattern: Pattern, text_length: usize, query: usize, key: usize) -> bool {
        let weight = |position: usize| (position + 1).saturating_sub(self.source());
        if weight(key) > weight(query) {
            return false;
        }
        match (self.slot(query), self.slot(key)) {
            (_, Slot::Text(i)) if key < self.source() => i < text_length,
            (Slot::Image(q), Slot::Image(k)) => pattern.visible(self.grid, self.causal(), q, k),
            _ => true,
        }
    }

    fn causal(&self) -> bool {
        self.direction == Direction::TextToImage
    }

    /// The same rule as lists of keys, for texts of the given lengths.
    pub fn keys(&self, pattern: Pattern, text_lengths: &[usize]) -> Arc<KeyRanges> {
        self.keys_of(pattern, 0..self.positions(), text_lengths)
    }

    /// The rule within the source alone, as decoding begins.
    pub fn source_keys(&self, pattern: Pattern, text_lengths: &[usize]) -> Arc<KeyRanges> {
        self.keys_of(pattern, 0..self.source(), text_lengths)
    }

    fn keys_of(&self, pattern: Pattern, queries: std::ops::Range<usize>, text_lengths: &[usize]) -> Arc<KeyRanges> {
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        for query in queries {
            self.push_runs(pattern, query, &mut runs);
            offsets.push(runs.len());
        }
        let (text, text_lengths) = match self.direction {
            Direction::TextToImage => (0..self.text, Some(text_lengths.to_vec())),
            Direction::ImageToText => (0..0, None),
        };
        Arc::new(KeyRanges { offsets, runs, text, text_lengths })
    }

    fn push_runs(&self, pattern: Pattern, query: usize, runs: &mut Vec<Run>) {
        let source = self.source();
        let first = |len| Run { start: 0, len, stride: 1 };
        match (self.direction, self.slot(query)) {
            (Direction::TextToImage, Slot::Text(_)) => runs.push(first(source)),
            (Direction::ImageToText, Slot::Text(_)) => runs.push(first(query + 1)),
            (_, Slot::Start) => runs.extend([first(source), Run { start: source, len: 1, stride: 1 }]),
            (Direction::TextToImage, Slot::Image(code)) => {
                runs.extend([first(source), Run { start: source, len: 1, stride: 1 }]);
                let run = |start, len, stride| runs.push(Run { start: source + 1 + start, len, stride });
                pattern.runs(self.grid, true, code, run);
            }
            (Direction::ImageToText, Slot::Image(code)) => {
                pattern.runs(self.grid, false, code, |start, len, stride| runs.push(Run { start, len, stride }));
            }
        }
    }

    /// 1 at the dense positions of text→image, source and start, that hold no padding: (b, m + 1) u8.
    pub fn source_mask(&self, text_lengths: &[usize], device: &Device) -> Result<Tensor> {
        let row = |&length: &usize| (0..=self.text).map(move |i| u8::from(i < length || i == self.text));
        let mask: Vec<u8> = text_lengths.iter().flat_map(row).collect();
        Ok(Tensor::from_vec(mask, (text_lengths.len(), self.text + 1), device)?)
    }

    /// The full mask (b, l, l) u8 by [`Layout::visible`], for the oracle.
    pub fn mask(&self, pattern: Pattern, text_lengths: &[usize], device: &Device) -> Result<Tensor> {
        let l = self.positions();
        let rows = text_lengths.iter().flat_map(|&length| (0..l).map(move |query| (length, query)));
        let mask: Vec<u8> = rows
            .flat_map(|(length, query)| (0..l).map(move |key| u8::from(self.visible(pattern, length, query, key))))
            .collect();
        Ok(Tensor::from_vec(mask, (text_lengths.len(), l, l), device)?)
    }
}

/// Rows of token ids as a padded tensor (b, width) u32, and their lengths.
///
/// # Errors
/// A row is empty or longer than `width`.
pub fn pad(rows: &[Vec<u32>], width: usize, padding: u32, device: &Device) -> Result<(Tensor, Vec<usize>)> {
    let mut ids = Vec::with_capacity(rows.len() * width);
    for row in rows {
        ensure!((1..=width).contains(&row.len()), "a text of {} tokens does not fit 1 to {width} positions", row.len());
        ids.extend(row.iter().copied().chain(std::iter::repeat_n(padding, width - row.len())));
    }
    let ids = Tensor::from_vec(ids, (rows.len(), width), device)?.to_dtype(DType::U32)?;
    Ok((ids, rows.iter().map(Vec::len).collect()))
}
