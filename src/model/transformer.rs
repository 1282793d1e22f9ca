//! The generator: one transformer for every list of spans (paper §2.2).

use super::{batch::Batch, embedding::Embedding, end_to_end::EndToEnd, head::Head, layer::Layer};
use crate::{
    config::{Config, Precision, Task},
    error::{Context, Result, ensure},
    nn::{
        params::{Params, Scope},
        pattern::Grid,
        segment::Autograd,
    },
};
use candle_core::{DType, Device, Tensor};

/// Predicts image codes or text tokens from image codes, text or both. All parameters except embeddings and heads are
/// shared between the modalities.
pub struct Generator {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) head: Head,
    /// Of a model of task `end-to-end`.
    pub(super) end_to_end: Option<EndToEnd>,
    pub(super) max_text: usize,
    pub(super) heads: usize,
    /// Whether the segments with hand-written gradients can be used: f32 on a CPU.
    pub(super) manual: bool,
    pub(super) precision: Precision,
}

impl Generator {
    /// A generator over `vocab_size` text tokens and a (height, width) `grid` of image codes, `codebook_size` codes in
    /// all.
    /// `scope` is the root scope. With `config.lora`, all parameters are a frozen base and low-rank adapters are added.
    pub fn new(
        scope: &Scope,
        config: &Config,
        vocab_size: usize,
        codebook_size: usize,
        grid: (usize, usize),
    ) -> Result<Self> {
        Self::with(EndToEnd::new, scope, config, [vocab_size, codebook_size], grid)
    }

    /// The same for training, with all losses of an end-to-end reconstructor ([`Reconstructor::in_training`]).
    ///
    /// [`Reconstructor::in_training`]: crate::tokenizer::Reconstructor::in_training
    pub fn in_training(
        scope: &Scope,
        config: &Config,
        vocab_size: usize,
        codebook_size: usize,
        grid: (usize, usize),
    ) -> Result<Self> {
        Self::with(EndToEnd::in_training, scope, config, [vocab_size, codebook_size], grid)
    }

    fn with(
        end_to_end: fn(&Scope, &Config, Grid) -> Result<EndToEnd>,
        scope: &Scope,
        config: &Config,
        [vocab_size, codebook_size]: [usize; 2],
        grid: (usize, usize),
    ) -> Result<Self> {
        let grid = Grid { height: grid.0, width: grid.1 };
        let scope = &scope.clone().with_lora(&config.lora);
        let model = &config.model;
        ensure!(!grid.is_empty(), "the grid of image codes is empty");
        ensure!(model.layers > 0 && model.conv_size % 2 == 1, "no layers, or an even conv_size");
        ensure!(config.text.max_tokens >= 2, "text.max_tokens must be at least 2, for [CLS] and [SEP]");
        let embedding = Embedding::new(scope, config, vocab_size, codebook_size, grid)?;
        let layer = |i| Layer::new(scope, model, i, grid);
        let layers = (0..model.layers).map(layer).collect::<Result<_>>()?;
        let head = Head::new(scope, model.hidden, vocab_size, codebook_size)?;
        let end_to_end = match config.task {
            Task::EndToEnd => Some(end_to_end(scope, config, grid)?),
            _ => None,
        };
        let table = &embedding.text;
        let manual = table.device().is_cpu() && table.dtype() == DType::F32 && scope.precision() == Precision::F32;
        Ok(Self {
            embedding,
            layers,
            head,
            end_to_end,
            max_text: config.text.max_tokens,
            heads: model.heads,
            precision: config.train.precision,
            manual,
        })
    }

    /// The grid of image codes.
    pub fn grid(&self) -> Grid {
        self.embedding.grid
    }

    /// Maximum number of tokens of a text, `[CLS]` and `[SEP]` included.
    pub fn max_text(&self) -> usize {
        self.max_text
    }

    /// Logits at each target position: (b, target positions, vocabulary of the target's modality).
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.autograd(&batch.target().1.ids, batch)?;
        for layer in &self.layers {
            x = layer.block.forward(Precision::F32, &x, &layer.keys(batch)?)?;
        }
        self.head.target_logits(Precision::F32, &x, batch)
    }

    /// What end-to-end training adds; `None` for a generator of two-stage training.
    pub fn end_to_end(&self) -> Option<&EndToEnd> {
        self.end_to_end.as_ref()
    }

    /// Text → image sequences as images, without their codes being looked up (paper §3.1.3): pixels
    /// (b, side, side, 3), about in \[-1, 1\].
    ///
    /// # Errors
    /// The model has no end-to-end reconstructor, the target of the batch is no image, or the weights are damaged.
    pub fn reconstruct(&self, batch: Batch) -> Result<Tensor> {
        let end_to_end = self.end_to_end.as_ref().context("a generator without an end-to-end reconstructor")?;
        let batch = end_to_end.arrange(batch);
        end_to_end.pixels(&self.hidden_states(&batch)?, &batch)
    }

    /// The device of the parameters.
    pub(super) fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The parameters of each segment in the order of the chain: embedding, layers, head.
    pub(super) fn params(&self) -> impl Iterator<Item = &Params> {
        let layers = self.layers.iter().map(|layer| &layer.params);
        let end_to_end = self.end_to_end.iter().map(|end_to_end| &end_to_end.params);
        std::iter::once(&self.embedding.params).chain(layers).chain([&self.head.params]).chain(end_to_end)
    }
}
