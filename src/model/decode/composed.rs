//! Decoding with stock candle ops, on any device.

use super::{Source, input::Input};
use crate::{
    error::Result,
    model::{
        batch::Tokens,
        sequence::{Layout, Modality, Slot},
        transformer::Generator,
    },
    nn::cache::{Cache, Sizes},
};
use candle_core::{DType, Tensor};

/// A batch of sequences that are being decoded.
pub struct Composed<'g> {
    generator: &'g Generator,
    target: Modality,
    caches: Vec<Cache>,
    batch: usize,
    logits: Vec<f32>,
}

impl<'g> Composed<'g> {
    /// Prefill: runs the sources through all layers.
    pub fn new(generator: &'g Generator, layout: &Layout, source: &Source) -> Result<Self> {
        let device = generator.device();
        let mut parts = Vec::new();
        for (span, rows) in layout.sources().iter().zip(source.spans()) {
            generator.embedding.push_span(*span, &Tokens::pad(rows, span.length, 0, device)?.ids, &mut parts)?;
        }
        let mut x = Tensor::cat(&parts, 1)?;
        let (target, lengths) = (layout.target().modality, source.text_lengths());
        // Positions that every later position attends to.
        let dense = match target {
            Modality::Image => layout.source_positions() + 1,
            Modality::Text => layout.positions(),
        };
        let mask = match lengths.iter().any(|&length| length < layout.source_text().len()) {
            true => Some(layout.padding_mask(&lengths, dense, device)?),
            false => None,
        };
        let (batch, heads) = (source.rows(), generator.heads);
        let sizes = Sizes { batch, heads, dims: x.dim(2)? / heads, dense };
        let mut caches = Vec::new();
        for layer in &generator.layers {
            let image = (target == Modality::Image).then_some((layer.pattern, layout.grid()));
            let mut cache = Cache::new(sizes, image, mask.clone(), x.dtype(), x.device())?;
            x = layer.block.prefill(&x, &layout.source_keys(layer.pattern, &lengths), &mut cache)?;
            caches.push(cache);
        }
        Ok(Self { generator, target, caches, batch, logits: Vec::new() })
    }

    /// Decodes one more position of each sequence; returns the logits (sequences, vocabulary).
    pub fn step(&mut self, input: Input) -> Result<&mut [f32]> {
        let embedding = &self.generator.embedding;
        let ids = |ids: &[u32]| Tensor::from_slice(ids, (self.batch, 1), self.generator.device());
        let mut x = match input.slot {
            Slot::Start => embedding.start(self.batch)?,
            Slot::Image(place) => embedding.image(&ids(input.tokens)?, place)?,
            Slot::Text(position) => embedding.text(&ids(input.tokens)?, position)?,
        };
        for (layer, cache) in self.generator.layers.iter().zip(&mut self.caches) {
            x = layer.block.step(&x, input.place(), cache)?;
        }
        let logits = self.generator.head.logits(&x.squeeze(1)?, self.target)?;
        self.logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(&mut self.logits)
    }

    /// Replaces sequence `i` by a copy of the old sequence `index[i]`.
    pub fn reorder(&mut self, index: &[usize]) -> Result<()> {
        let rows: Vec<u32> = index.iter().map(|&i| i as u32).collect();
        let rows = Tensor::new(rows, self.generator.device())?;
        self.caches.iter_mut().try_for_each(|cache| cache.reorder(&rows))?;
        self.batch = index.len();
        Ok(())
    }
}
