//! Decoding from stock candle ops, on any device.

use super::{
    decode::Input,
    sequence::{Direction, Layout, pad},
    transformer::Generator,
};
use crate::{
    error::Result,
    nn::cache::{Cache, Sizes},
};
use candle_core::{DType, Tensor};

/// Sequences on the way.
pub struct Composed<'g> {
    generator: &'g Generator,
    layout: Layout,
    caches: Vec<Cache>,
    batch: usize,
    logits: Vec<f32>,
}

impl<'g> Composed<'g> {
    /// Reads the sources: texts or codes by the layout's direction.
    pub fn new(generator: &'g Generator, layout: Layout, sources: &[Vec<u32>]) -> Result<Self> {
        let device = generator.embedding.device();
        let longest = layout.source();
        let (ids, lengths) = pad(sources, longest, 0, device)?;
        let mut x = match layout.direction {
            Direction::TextToImage => generator.embedding.text(&ids, 0)?,
            Direction::ImageToText => generator.embedding.image(&ids, 0)?,
        };
        let mask = match lengths.iter().any(|&length| length < longest) {
            true => Some(layout.source_mask(&lengths, device)?),
            false => None,
        };
        let (image, dense) = match layout.direction {
            Direction::TextToImage => (true, layout.text + 1),
            Direction::ImageToText => (false, layout.positions()),
        };
        let (batch, heads) = (sources.len(), generator.heads);
        let sizes = Sizes { batch, heads, dims: x.dim(2)? / heads, dense };
        let mut caches = Vec::new();
        for layer in &generator.layers {
            let image = image.then_some((layer.pattern, layout.grid));
            let mut cache = Cache::new(sizes, image, mask.clone(), x.dtype(), x.device())?;
            x = layer.block.prefill(&x, &layout.source_keys(layer.pattern, &lengths), &mut cache)?;
            caches.push(cache);
        }
        Ok(Self { generator, layout, caches, batch, logits: Vec::new() })
    }

    /// One more position of each sequence; returns the logits (sequences, vocabulary).
    pub fn step(&mut self, input: Input) -> Result<&mut [f32]> {
        let embedding = &self.generator.embedding;
        let ids = |ids: &[u32]| Tensor::from_slice(ids, (self.batch, 1), embedding.device());
        let mut x = match input {
            Input::Start => embedding.start(self.batch)?,
            Input::Code(codes, place) => embedding.image(&ids(codes)?, place)?,
            Input::Token(tokens, position) => embedding.text(&ids(tokens)?, position)?,
        };
        for (layer, cache) in self.generator.layers.iter().zip(&mut self.caches) {
            x = layer.block.step(&x, input.place(), cache)?;
        }
        let logits = self.generator.head.logits(&x.squeeze(1)?, self.layout.direction)?;
        self.logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(&mut self.logits)
    }

    /// Sequence `i` goes on as a copy of what was sequence `index[i]`.
    pub fn reorder(&mut self, index: &[usize]) -> Result<()> {
        let rows: Vec<u32> = index.iter().map(|&i| i as u32).collect();
        let rows = Tensor::new(rows, self.generator.embedding.device())?;
        self.caches.iter_mut().try_for_each(|cache| cache.reorder(&rows))?;
        self.batch = index.len();
        Ok(())
    }
}
