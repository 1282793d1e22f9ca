//! The generator: one transformer, two directions, as a chain of segments embedding → blocks → head.

use super::{
    decode::Decoding,
    embedding::Embedding,
    head::Head,
    native::{NativeEmbedding, NativeHead, NativeLayer},
    sequence::{Batch, Direction, Layout},
};
use crate::{
    config::{Config, Precision},
    error::{Result, ensure},
    nn::{
        block::Block,
        params::{Params, Scope},
        pattern::{Grid, Pattern},
        segment::{Segment, Taped},
    },
    ops::attention::KeyRanges,
};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// A transformer block and the pattern that its number gives it.
pub struct Layer {
    pub(super) block: Block,
    pub(super) pattern: Pattern,
    grid: Grid,
    pub(super) name: String,
    pub(super) params: Params,
}

impl Layer {
    /// Who sees whom in this layer.
    pub(super) fn keys(&self, batch: &Batch) -> Result<Arc<KeyRanges>> {
        Ok(Layout::of(batch, self.grid)?.keys(self.pattern, &batch.text_lengths))
    }
}

impl Taped<Batch> for Layer {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn taped(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.block.forward(x, &self.keys(batch)?)
    }
}

/// Text to image codes and image codes to text, with all parameters shared but embeddings and heads.
pub struct Generator {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) head: Head,
    pub(super) max_text: usize,
    pub(super) heads: usize,
    pub(super) precision: Precision,
    pub(super) decoding: Decoding,
}

impl Generator {
    /// The generator over `vocab_size` text tokens and a (height, width) `grid` of `codebook_size` codes;
    /// `scope` is the root.
    pub fn new(
        scope: &Scope,
        config: &Config,
        vocab_size: usize,
        codebook_size: usize,
        grid: (usize, usize),
    ) -> Result<Self> {
        let grid = Grid { height: grid.0, width: grid.1 };
        let model = &config.model;
        ensure!(!grid.is_empty(), "the grid of image codes is empty");
        ensure!(model.layers > 0 && model.conv_size % 2 == 1, "no layers, or an even conv_size");
        ensure!(config.text.max_tokens >= 2, "text.max_tokens must have room for [CLS] and [SEP]");
        let embedding = Embedding::new(scope, config, vocab_size, codebook_size, grid)?;
        let layer = |i: usize| -> Result<Layer> {
            let name = format!("blocks.{i}");
            let scope = scope.at(&name);
            let block = Block::new(&scope, model)?;
            Ok(Layer { block, pattern: Pattern::of_layer(i + 1, model), grid, name, params: scope.params() })
        };
        let layers = (0..model.layers).map(layer).collect::<Result<_>>()?;
        let head = Head::new(scope, model.hidden, vocab_size, codebook_size)?;
        Ok(Self {
            embedding,
            layers,
            head,
            max_text: config.text.max_tokens,
            heads: model.heads,
            precision: config.train.precision,
            decoding: Decoding::default(),
        })
    }

    /// The grid of image codes.
    pub fn grid(&self) -> Grid {
        self.embedding.grid
    }

    /// Text positions.
    pub fn max_text(&self) -> usize {
        self.max_text
    }

    /// The chain that training runs; its output is the loss. By hand on a CPU in f32, taped elsewhere.
    pub fn segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let table = &self.embedding.text;
        if !table.device().is_cpu() || table.dtype() != DType::F32 {
            return self.taped_segments();
        }
        let precision = self.precision;
        let layers = self.layers.iter().map(|layer| Box::new(NativeLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(NativeEmbedding(&self.embedding)) as Box<dyn Segment<Batch>>)
            .chain(layers)
            .chain([Box::new(NativeHead { head: &self.head, precision }) as Box<_>])
            .collect()
    }

    /// The same chain written with candle's ops.
    pub fn taped_segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let layers = self.layers.iter().map(|layer| Box::new(layer) as Box<_>);
        std::iter::once(Box::new(&self.embedding) as Box<dyn Segment<Batch>>)
            .chain(layers)
            .chain([Box::new(&self.head) as Box<_>])
            .collect()
    }

    /// What the model predicts at each target position: (b, n, codebook) or (b, m − 1, vocabulary).
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.taped(&batch.codes, batch)?;
        for layer in &self.layers {
            x = layer.taped(&x, batch)?;
        }
        self.head.target_logits(&x, batch)
    }

    /// The sequences of one direction.
    pub fn layout(&self, direction: Direction) -> Layout {
        Layout { direction, text: self.max_text, grid: self.grid() }
    }
}
