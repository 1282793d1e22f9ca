//! The tokenizer's two segments with manual gradients.

use super::{Kept, backward, forward, infer};
use crate::{
    error::{Context, Result},
    nn::{
        features::{Buffers, Features},
        gradients::Gradients,
        params::Params,
        segment::{Autograd, Saved, Segment},
    },
    ops::with_slice,
    tokenizer::{
        DecoderHalf, EncoderHalf, PixelBatch, Statistics,
        loss::number,
        quantizer::Quantized,
        segments::{Decode, Encode},
    },
};
use candle_core::{Device, Tensor, Var};

/// An autograd segment run with manual gradients.
pub(in crate::tokenizer) struct Manual<'a, S> {
    pub(in crate::tokenizer) segment: &'a S,
    pub(in crate::tokenizer) buffers: &'a Buffers,
}

fn features(x: &Tensor, buffers: &Buffers) -> Result<Features> {
    let shape = x.dims4()?.into();
    Ok(with_slice(x, |x: &[f32]| buffers.copy(shape, x))?)
}

fn tensor(features: Features) -> Result<Tensor> {
    Ok(Tensor::from_vec(features.data, features.shape.to_vec(), &Device::Cpu)?)
}

impl EncoderHalf {
    /// Pixels → latents, with saved activations.
    fn manual(&self, pixels: Features, buffers: &Buffers) -> Result<(Tensor, Vec<Kept>)> {
        let (first, rest) = self.manual_layers()?;
        let mut x = buffers.take(first.output(pixels.shape)?);
        first.run(&pixels, None, &mut x)?;
        let (z, mut kept) = forward(&rest, x, buffers)?;
        kept.insert(0, Kept::one(pixels));
        Ok((tensor(z)?, kept))
    }

    /// Pixels → latents, for inference.
    pub(in crate::tokenizer) fn infer(&self, pixels: &Tensor) -> Result<Tensor> {
        let buffers = Buffers::default();
        let (first, mut layers) = self.manual_layers()?;
        layers.insert(0, first);
        tensor(infer(&layers, features(pixels, &buffers)?, &buffers)?)
    }
}

impl DecoderHalf {
    /// Code vectors → pixels, for inference.
    pub(in crate::tokenizer) fn infer(&self, z_q: &Tensor) -> Result<Tensor> {
        let buffers = Buffers::default();
        tensor(infer(&self.manual_layers()?.0, features(z_q, &buffers)?, &buffers)?)
    }
}

impl Segment<PixelBatch> for Manual<'_, Encode> {
    fn name(&self) -> &str {
        Autograd::name(self.segment)
    }

    fn params(&self) -> &Params {
        Autograd::params(self.segment)
    }

    fn forward(&self, _: &Tensor, batch: &PixelBatch) -> Result<(Tensor, Saved)> {
        let (z, kept) = self.segment.half.manual(features(&batch.pixels, self.buffers)?, self.buffers)?;
        Ok((z, Box::new(kept)))
    }

    fn backward(
        &self,
        _: &Tensor,
        _: &PixelBatch,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let mut kept = *saved.downcast::<Vec<Kept>>().ok().context("the saved state belongs to another segment")?;
        let (first, rest) = self.segment.half.manual_layers()?;
        let dy = features(&dy.context("the encoder is not the last segment")?, self.buffers)?;
        let pixels = kept.remove(0).take()?;
        let dx = backward(&rest, kept, dy, self.buffers, gradients)?;
        // No parameter comes before the pixels, so the first convolution's input gradient is not needed.
        first.gradients(&pixels, &dx, gradients)?;
        [pixels, dx].into_iter().for_each(|features| self.buffers.give(features));
        Ok(None)
    }
}

/// State saved by [`Decode`].
struct Decoded {
    layers: Vec<Kept>,
    /// Input of the quantizer's autograd graph, which only covers the step from latents to code vectors and its losses.
    z: Var,
    quantized: Quantized,
    /// Gradient of the loss with respect to the pixels.
    dy: Features,
    /// Gradients of the discriminator's loss with respect to its parameters.
    own: Vec<(String, Tensor)>,
}

impl Segment<PixelBatch> for Manual<'_, Decode> {
    fn name(&self) -> &str {
        Autograd::name(self.segment)
    }

    fn params(&self) -> &Params {
        Autograd::params(self.segment)
    }

    fn forward(&self, z: &Tensor, batch: &PixelBatch) -> Result<(Tensor, Saved)> {
        let half = &self.segment.half;
        let z = Var::from_tensor(z)?;
        let quantized = half.quantize.forward(&z, batch.relaxation)?;
        let (manual, head) = half.manual_layers()?;
        let (y, layers) = forward(&manual, features(&quantized.z_q, self.buffers)?, self.buffers)?;
        let input = head.input(layers.last().context("a decoder without layers")?, self.buffers)?;
        let computed = self.segment.loss.compute(&tensor(y)?, batch, |dy| half.last_weight_norm(&input, dy))?;
        let (mut terms, mut loss, own) = (computed.terms, computed.loss, computed.own);
        for (name, term) in &quantized.losses {
            terms.push((name, number(term)?));
            loss += number(term)?;
        }
        let dy = features(&(computed.gradient * batch.share)?, self.buffers)?;
        let (codes, latents) = (quantized.codes.to_vec1()?, half.quantize.follows_latents().then(|| z.detach()));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes, latents });
        let loss = Tensor::new((loss * batch.share * batch.loss_scale) as f32, &Device::Cpu)?;
        let saved = Decoded { layers, z, quantized, dy, own };
        Ok((loss, Box::new(saved)))
    }

    fn backward(
        &self,
        _: &Tensor,
        batch: &PixelBatch,
        saved: Saved,
        _: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let half = &self.segment.half;
        let Decoded { layers, z, quantized, dy, own } =
            *saved.downcast().ok().context("the saved state belongs to another segment")?;
        for (name, gradient) in own {
            gradients.add(&name, (gradient * batch.share)?)?;
        }
        let dz_q = tensor(backward(&half.manual_layers()?.0, layers, dy, self.buffers, gradients)?)?;
        let mut loss = (quantized.z_q * dz_q)?.sum_all()?;
        for (_, term) in &quantized.losses {
            loss = (loss + (term * (batch.share * batch.loss_scale))?)?;
        }
        let mut store = loss.backward()?;
        for (name, var) in Autograd::params(self.segment) {
            if let Some(gradient) = store.remove(var) {
                gradients.add(name, gradient)?;
            }
        }
        Ok(store.remove(&z))
    }
}
