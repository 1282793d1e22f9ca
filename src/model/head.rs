//! The output head: hidden states to logits, and the loss.

use super::{batch::Batch, sequence::Modality};
use crate::{
    config::Precision,
    error::Result,
    nn::{
        linear::Linear,
        norm::LayerNorm,
        params::{Params, Scope},
        segment::Autograd,
    },
    ops,
};
use candle_core::Tensor;

/// The head segment, last in the chain: final norm, one linear layer per modality, cross-entropy over the target.
pub struct Head {
    pub(super) norm: LayerNorm,
    text: Linear,
    image: Linear,
    pub(super) params: Params,
}

impl Head {
    pub fn new(scope: &Scope, hidden: usize, vocab_size: usize, codebook_size: usize) -> Result<Self> {
        let before = scope.params();
        let norm = LayerNorm::new(&scope.at("norm"), hidden)?;
        let text = Linear::new(&scope.at("text_head"), hidden, vocab_size, 0.02)?;
        let image = Linear::new(&scope.at("image_head"), hidden, codebook_size, 0.02)?;
        let mut params = scope.params();
        params.retain(|name, _| !before.contains_key(name));
        Ok(Self { norm, text, image, params })
    }

    /// `x` (.., hidden) at positions of a target of this modality → logits (.., vocabulary of the modality).
    pub fn logits(&self, x: &Tensor, target: Modality) -> Result<Tensor> {
        self.linear(target).forward(&self.norm.forward(x)?)
    }

    /// The output layer of a modality: (.., hidden) → (.., vocabulary of the modality).
    pub(super) fn linear(&self, target: Modality) -> &Linear {
        match target {
            Modality::Text => &self.text,
            Modality::Image => &self.image,
        }
    }

    /// `x` (b, positions, hidden) → logits (b, predicted, vocabulary). The target is the last span.
    pub fn target_logits(&self, precision: Precision, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let target = x.narrow(1, batch.source_positions(), batch.target().0.predicted())?.contiguous()?;
        self.linear(batch.target().0.modality).forward_in(precision, &self.norm.forward(&target)?)
    }
}

/// The head with autograd, computed in `precision`.
pub(super) struct AutogradHead<'a> {
    pub head: &'a Head,
    pub precision: Precision,
}

impl Autograd<Batch> for AutogradHead<'_> {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    /// (b, positions, hidden) → the loss, a scalar.
    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (targets, weights) = batch.outputs()?;
        let logits = self.head.target_logits(self.precision, x, batch)?.flatten_to(1)?;
        ops::cross_entropy(&logits, &targets, &weights)
    }
}
