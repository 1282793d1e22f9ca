//! Decoding with a cache: the source once, then one position a step for a batch of sequences.

use super::{
    sequence::{Direction, Layout, pad},
    transformer::Generator,
};
use crate::{
    error::{Result, ensure},
    nn::cache::{Cache, Place, Sizes},
};
use candle_core::Tensor;

/// What a batch of sequences starts from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Paint: each row is `[CLS]`, tokens, `[SEP]`.
    Text(&'a [Vec<u32>]),
    /// Describe: each row is the n codes of an image in raster order.
    Image { codes: &'a [Vec<u32>], cls: u32 },
}

/// A batch of sequences on the way. Sequences are independent; several may share a source.
pub struct DecodeState<'g> {
    generator: &'g Generator,
    layout: Layout,
    caches: Vec<Cache>,
    batch: usize,
    /// Target positions fed so far.
    fed: usize,
}

impl Generator {
    /// Runs the source and the first target position, and returns the logits (b, vocabulary) of the first
    /// token: a code, or the token after `[CLS]`.
    pub fn decode_start(&self, source: Source) -> Result<(DecodeState<'_>, Tensor)> {
        let device = self.embedding.device();
        let grid = self.grid();
        let (direction, rows) = match source {
            Source::Text(rows) => (Direction::TextToImage, rows),
            Source::Image { codes, .. } => (Direction::ImageToText, codes),
        };
        // No text is longer than the longest: what is cached need not have room for all positions.
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let (ids, lengths) = pad(rows, longest, 0, device)?;
        let layout = match direction {
            Direction::TextToImage => Layout { direction, text: longest, grid },
            Direction::ImageToText => self.layout(direction),
        };
        let x = match direction {
            Direction::TextToImage => self.embedding.text(&ids, 0)?,
            Direction::ImageToText => self.embedding.image(&ids, 0)?,
        };
        let mask = match lengths.iter().any(|&length| length < longest) {
            true => Some(layout.source_mask(&lengths, device)?),
            false => None,
        };
        let mut state = DecodeState { generator: self, layout, caches: Vec::new(), batch: rows.len(), fed: 0 };
        state.prefill(x, &lengths, mask)?;
        let logits = match source {
            Source::Text(_) => state.step(self.embedding.start(rows.len())?, Place::Dense)?,
            Source::Image { cls, .. } => state.logits_next(&vec![cls; rows.len()])?,
        };
        Ok((state, logits))
    }
}

impl DecodeState<'_> {
    fn prefill(&mut self, mut x: Tensor, lengths: &[usize], mask: Option<Tensor>) -> Result<()> {
        let layout = self.layout;
        let (image, dense) = match layout.direction {
            Direction::TextToImage => (true, layout.text + 1),
            Direction::ImageToText => (false, layout.positions()),
        };
        let heads = self.generator.heads;
        let sizes = Sizes { batch: self.batch, heads, dims: x.dim(2)? / heads, dense };
        for layer in &self.generator.layers {
            let image = image.then_some((layer.pattern, layout.grid));
            let mut cache = Cache::new(sizes, image, mask.clone(), x.dtype(), x.device())?;
            x = layer.block.prefill(&x, &layout.source_keys(layer.pattern, lengths), &mut cache)?;
            self.caches.push(cache);
        }
        Ok(())
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Appends one token to each sequence and returns the logits (b, vocabulary) of the next.
    ///
    /// # Errors
    /// The number of tokens is not that of the sequences, or the sequences are full.
    pub fn logits_next(&mut self, tokens: &[u32]) -> Result<Tensor> {
        ensure!(tokens.len() == self.batch, "{} tokens for {} sequences", tokens.len(), self.batch);
        ensure!(self.fed < self.layout.target(), "a sequence has only {} target positions", self.layout.target());
        let embedding = &self.generator.embedding;
        let ids = Tensor::from_slice(tokens, (self.batch, 1), embedding.device())?;
        match self.layout.direction {
            Direction::TextToImage => self.step(embedding.image(&ids, self.fed - 1)?, Place::Image(self.fed - 1)),
            Direction::ImageToText => self.step(embedding.text(&ids, self.fed)?, Place::Dense),
        }
    }

    /// x (b, 1, hidden) → logits (b, vocabulary).
    fn step(&mut self, mut x: Tensor, place: Place) -> Result<Tensor> {
        for (layer, cache) in self.generator.layers.iter().zip(&mut self.caches) {
            x = layer.block.step(&x, place, cache)?;
        }
        self.fed += 1;
        self.generator.head.logits(&x.squeeze(1)?, self.layout.direction)
    }

    /// Sequence `i` goes on as a copy of what was sequence `index[i]`; the number of sequences may change.
    ///
    /// # Errors
    /// An index is not below the number of sequences, or there is none.
    pub fn reorder(&mut self, index: &[usize]) -> Result<()> {
        ensure!(!index.is_empty() && index.iter().all(|&i| i < self.batch), "no such sequence in {index:?}");
        let rows: Vec<u32> = index.iter().map(|&i| i as u32).collect();
        let rows = Tensor::new(rows, self.generator.embedding.device())?;
        for cache in &mut self.caches {
            cache.reorder(&rows)?;
        }
        self.batch = index.len();
        Ok(())
    }
}
