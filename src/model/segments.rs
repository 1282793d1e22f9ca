//! The generator as a chain of segments: embedding → layers → head. The output of the chain is the loss.

use super::{
    batch::Batch,
    embedding::Embedding,
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

/// The embedding with autograd; what comes out, and with it the residual stream of all layers, has the type `stream`, or that
/// of the tables.
struct AutogradEmbedding<'a> {
    embedding: &'a Embedding,
    stream: Option<DType>,
}

impl Autograd<Batch> for AutogradEmbedding<'_> {
    fn name(&self) -> &str {
        Autograd::name(self.embedding)
    }

    fn params(&self) -> &Params {
        Autograd::params(self.embedding)
    }

    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let embedded = self.embedding.autograd(x, batch)?;
        Ok(match self.stream {
            Some(dtype) => embedded.to_dtype(dtype)?,
            None => embedded,
        })
    }
}

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

    /// The same chain with autograd over candle ops, which have no bf16 matrix products on a CPU. In bf16 on a device, hidden
    /// states and saved activations are in bf16, too; norms, softmax and the loss compute in f32.
    pub fn autograd_segments(&self, precision: Precision) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let in_bf16 = precision == Precision::Bf16 && !self.device().is_cpu();
        self.autograd_chain(precision, in_bf16.then_some(DType::BF16))
    }

    /// The same with hidden states of the type `stream`, or of that of the tables.
    pub fn autograd_chain(&self, precision: Precision, stream: Option<DType>) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let mut chain = self.autograd_body(precision, stream);
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

    fn autograd_body(&self, precision: Precision, stream: Option<DType>) -> Vec<Box<dyn Segment<Batch> + '_>> {
        let layers = self.layers.iter().map(|layer| Box::new(AutogradLayer { layer, precision }) as Box<_>);
        let embedding = AutogradEmbedding { embedding: &self.embedding, stream };
        std::iter::once(Box::new(embedding) as Box<dyn Segment<Batch>>).chain(layers).collect()
    }

    /// The hidden states of the last layer, (b, positions, hidden).
    pub(super) fn hidden_states(&self, batch: &Batch) -> Result<Tensor> {
        let chain = if self.manual { self.manual_body() } else { self.autograd_body(Precision::F32, None) };
        // The first segment reads no hidden states.
        let nothing = Tensor::zeros(0, DType::F32, self.device())?;
        chain.iter().try_fold(nothing, |x, segment| Ok(segment.forward(&x, batch)?.0))
    }
}
