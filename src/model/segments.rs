//! The generator as a chain of segments embedding → blocks → head, whose output is the loss.

use super::{
    batch::Batch,
    head::Head,
    layer::Layer,
    manual::{ManualEmbedding, ManualHead, ManualLayer},
    transformer::Generator,
};
use crate::{
    config::Precision,
    error::Result,
    nn::{
        params::Params,
        segment::{Autograd, Segment},
    },
    ops,
};
use candle_core::Tensor;

/// A layer whose linear layers compute in a precision.
pub(super) struct TapedLayer<'a> {
    pub layer: &'a Layer,
    pub precision: Precision,
}

impl Autograd<Batch> for TapedLayer<'_> {
    fn name(&self) -> &str {
        &self.layer.name
    }

    fn params(&self) -> &Params {
        &self.layer.params
    }

    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.layer.block.forward(self.precision, x, &self.layer.keys(batch)?)
    }
}

/// The head, computed in a precision.
pub(super) struct TapedHead<'a> {
    pub head: &'a Head,
    pub precision: Precision,
}

impl Autograd<Batch> for TapedHead<'_> {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    /// → the scalar loss.
    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (targets, weights) = batch.outputs()?;
        let logits = self.head.target_logits(self.precision, x, batch)?.flatten_to(1)?;
        ops::cross_entropy(&logits, &targets, &weights)
    }
}

impl Generator {
    /// The chain that training runs; its output is the loss. By hand on a CPU in f32, autograd elsewhere; products in
    /// `train.precision`.
    pub fn segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        if !self.manual {
            return self.taped_segments(self.precision);
        }
        let precision = self.precision;
        let layers = self.layers.iter().map(|layer| Box::new(ManualLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(ManualEmbedding(&self.embedding)) as Box<dyn Segment<Batch>>)
            .chain(layers)
            .chain([Box::new(ManualHead { head: &self.head, precision }) as Box<_>])
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
}
