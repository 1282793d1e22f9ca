//! The generator: one transformer, two directions, as a chain of segments embedding → blocks → head.

use super::{
    decode::Decoding,
    embedding::Embedding,
    head::Head,
    sequence::{Batch, Direction, Layout},
};
use crate::{
    config::Config,
    error::{Result, ensure},
    nn::{
        block::Block,
        params::{Params, Scope},
        pattern::{Grid, Pattern},
        segment::Segment,
    },
};
use candle_core::Tensor;

/// A transformer block and the pattern that its number gives it.
pub struct Layer {
    pub(super) block: Block,
    pub(super) pattern: Pattern,
    grid: Grid,
    name: String,
    params: Params,
}

impl Segment<Batch> for Layer {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let layout = Layout { direction: batch.direction, text: batch.text.dim(1)?, grid: self.grid };
        self.block.forward(x, &layout.keys(self.pattern, &batch.text_lengths))
    }
}

/// Text to image codes and image codes to text, with all parameters shared but embeddings and heads.
pub struct Generator {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) head: Head,
    pub(super) max_text: usize,
    pub(super) heads: usize,
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

    /// The chain that training runs; its output is the loss.
    pub fn segments(&self) -> Vec<&dyn Segment<Batch>> {
        let layers = self.layers.iter().map(|layer| layer as &dyn Segment<Batch>);
        std::iter::once(&self.embedding as &dyn Segment<Batch>)
            .chain(layers)
            .chain(std::iter::once(&self.head as &dyn Segment<Batch>))
            .collect()
    }

    /// What the model predicts at each target position: (b, n, codebook) or (b, m − 1, vocabulary).
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.forward(&batch.codes, batch)?;
        for layer in &self.layers {
            x = layer.forward(&x, batch)?;
        }
        self.head.target_logits(&x, batch)
    }

    /// The sequences of one direction.
    pub fn layout(&self, direction: Direction) -> Layout {
        Layout { direction, text: self.max_text, grid: self.grid() }
    }
}
