//! The generator as a chain of segments: embedding → layers → head. The output of the chain is the loss.

use super::{
    batch::Batch,
    end_to_end::{EndToEndHead, ManualEndToEndHead},
    head::AutogradHead,
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
};
use candle_core::{DType, Tensor};

/// A layer with autograd; its linear layers compute in `precision`.
pub(super) struct AutogradLayer<'a> {
    pub layer: &'a Layer,
    pub precision: Precision,
}

impl Autograd<Batch> for AutogradLayer<'_> {
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

impl Generator {
    /// The chain for training, whose output is the loss: with hand-written gradients on a CPU in f32, with autograd
    /// elsewhere. Matrix products use `train.precision`.
    pub fn segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        if !self.manual {
            return self.autograd_segments(self.precision);
        }
        let mut chain = self.manual_body();
        let (head, precision) = (&self.head, self.precision);
        chain.push(match &self.end_to_end {
            None => Box::new(ManualHead { head, precision }),
            Some(end_to_end) => {
                let last = EndToEndHead::new(head, end_to_end, precision);
                if end_to_end.is_manual() { Box::new(ManualEndToEndHead(last)) } else { Box::new(last) }
            }
        });
        chain
    }

    /// The same chain with autograd over candle ops, which have no bf16 matrix products on a CPU.
    pub fn autograd_segments(&self, precision: Precision) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let mut chain = self.autograd_body(precision);
        let head = &self.head;
        chain.push(match &self.end_to_end {
            None => Box::new(AutogradHead { head, precision }),
            Some(end_to_end) => Box::new(EndToEndHead::new(head, end_to_end, precision)),
        });
        chain
    }

    /// The segments before the last one: embedding and layers.
    fn manual_body(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let precision = self.precision;
        let layers = self.layers.iter().map(|layer| Box::new(ManualLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(ManualEmbedding(&self.embedding)) as Box<dyn Segment<Batch>>).chain(layers).collect()
    }

    fn autograd_body(&self, precision: Precision) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let layers = self.layers.iter().map(|layer| Box::new(AutogradLayer { layer, precision }) as Box<_>);
        std::iter::once(Box::new(&self.embedding) as Box<dyn Segment<Batch>>).chain(layers).collect()
    }

    /// The hidden states of the last layer, (b, positions, hidden).
    pub(super) fn hidden_states(&self, batch: &Batch) -> Result<Tensor> {
        let chain = if self.manual { self.manual_body() } else { self.autograd_body(Precision::F32) };
        // The first segment reads no hidden states.
        let nothing = Tensor::zeros(0, DType::F32, self.device())?;
        chain.iter().try_fold(nothing, |x, segment| Ok(segment.forward(&x, batch)?.0))
    }
}
