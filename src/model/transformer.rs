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
    ops::{self, attention::KeyRanges},
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

/// A layer whose linear layers compute in a precision.
pub(super) struct TapedLayer<'a> {
    pub layer: &'a Layer,
    pub precision: Precision,
}

impl Taped<Batch> for TapedLayer<'_> {
    fn name(&self) -> &str {
        &self.layer.name
    }

    fn params(&self) -> &Params {
        &self.layer.params
    }

    fn taped(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.layer.block.forward(self.precision, x, &self.layer.keys(batch)?)
    }
}

/// The head, computed in a precision.
pub(super) struct TapedHead<'a> {
    pub head: &'a Head,
    pub precision: Precision,
}

impl Taped<Batch> for TapedHead<'_> {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    /// → the scalar loss.
    fn taped(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (targets, weights) = batch.outputs()?;
        let logits = self.head.target_logits(self.precision, x, batch)?.flatten_to(1)?;
        ops::cross_entropy(&logits, &targets, &weights)
    }
}

/// Text to image codes and image codes to text, with all parameters shared but embeddings and heads.
pub struct Generator {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) head: Head,
    pub(super) max_text: usize,
    pub(super) heads: usize,
    /// Whether segments written by hand can run.
    pub(super) native: bool,
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
        let table = &embedding.text;
        let native = table.device().is_cpu() && table.dtype() == DType::F32 && scope.precision() == Precision::F32;
        Ok(Self {
            embedding,
            layers,
            head,
            max_text: config.text.max_tokens,
            heads: model.heads,
            precision: config.train.precision,
            native,
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

    /// The chain that training runs; its output is the loss. By hand on a CPU in f32, taped elsewhere; products in
    /// `train.precision`.
    pub fn segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        if !self.native {
            return self.taped_segments(self.precision);
        }
        let precision = self.precision;
        let layers = self.layers.iter().map(|layer| Box::new(NativeLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(NativeEmbedding(&self.embedding)) as Box<dyn Segment<Batch>>)
            .chain(layers)
            .chain([Box::new(NativeHead { head: &self.head, precision }) as Box<_>])
            .collect()
    }

    /// The same chain written with candle's ops, which have no bf16 on a CPU.
    pub fn taped_segments(&self, precision: Precision) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let layers = self.layers.iter().map(|layer| Box::new(TapedLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(&self.embedding) as Box<dyn Segment<Batch>>)
            .chain(layers)
            .chain([Box::new(TapedHead { head: &self.head, precision }) as Box<_>])
            .collect()
    }

    /// What the model predicts at each target position: (b, n, codebook) or (b, m − 1, vocabulary).
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.taped(&batch.codes, batch)?;
        for layer in &self.layers {
            x = layer.block.forward(Precision::F32, &x, &layer.keys(batch)?)?;
        }
        self.head.target_logits(Precision::F32, &x, batch)
    }

    /// The sequences of one direction.
    pub fn layout(&self, direction: Direction) -> Layout {
        Layout { direction, text: self.max_text, grid: self.grid() }
    }
}
