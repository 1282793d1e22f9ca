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
        EncoderHalf, PixelBatch, Statistics,
        decoder_body::{DecoderBody, Terms},
        loss::{Loss, number},
        quantizer::Quantized,
        segments::{Decode, Encode},
        two_passes::{self, DecoderGradients},
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

/// What the decoder keeps for its backward pass.
pub struct Decoded(Pending);

enum Pending {
    Activations {
        layers: Vec<Kept>,
        /// Gradient of the loss with respect to the pixels.
        dy: Features,
        /// Gradients of the discriminator's loss with respect to its parameters.
        own: Vec<(String, Tensor)>,
    },
    /// The passes ran already.
    Gradients(DecoderGradients),
}

impl DecoderBody {
    /// Code vectors → pixels, for inference.
    pub(in crate::tokenizer) fn infer(&self, z_q: &Tensor) -> Result<Tensor> {
        let buffers = Buffers::default();
        tensor(infer(&self.manual_layers()?.0, features(z_q, &buffers)?, &buffers)?)
    }

    /// The loss of the pixels that code vectors decode to, and its terms.
    pub(in crate::tokenizer) fn manual_loss(
        &self,
        z_q: &Tensor,
        batch: &PixelBatch,
        loss: &Loss,
        buffers: &Buffers,
    ) -> Result<(f64, Terms, Decoded)> {
        let (manual, head) = self.manual_layers()?;
        let (y, layers) = forward(&manual, features(z_q, buffers)?, buffers)?;
        // Only a GAN loss asks for the norm, for which the largest features of the decoder are computed again.
        let mut input = None;
        let computed = loss.compute(&tensor(y)?, batch, |dy| {
            if input.is_none() {
                input = Some(head.input(layers.last().context("a decoder without layers")?, buffers)?);
            }
            self.last_weight_norm(input.as_ref().context("the last layer has no input")?, dy)
        })?;
        let dy = features(&(computed.gradient * batch.share)?, buffers)?;
        let pending = Pending::Activations { layers, dy, own: computed.own };
        Ok((computed.loss, computed.terms, Decoded(pending)))
    }

    /// The same with the adaptive weight of the GAN loss measured before the decoder, by `input_norm`
    /// ([`two_passes::with_weight_before`]). The activations exist twice until the first of two backward passes ends.
    pub(in crate::tokenizer) fn manual_adversarial_loss(
        &self,
        z_q: &Tensor,
        batch: &PixelBatch,
        loss: &Loss,
        buffers: &Buffers,
        input_norm: impl Fn(&Tensor) -> Result<f64>,
    ) -> Result<(f64, Terms, Decoded)> {
        let manual = self.manual_layers()?.0;
        let (y, layers) = forward(&manual, features(z_q, buffers)?, buffers)?;
        let copy = layers.iter().map(|kept| kept.copy(buffers)).collect();
        let mut kept = vec![layers, copy];
        let pass = |dy: &Tensor| {
            let (layers, mut gradients) = (kept.pop().context("a third backward pass")?, Gradients::default());
            let input = tensor(backward(&manual, layers, features(dy, buffers)?, buffers, &mut gradients)?)?;
            let params = gradients.iter().map(|(name, gradient)| (name.clone(), gradient.clone())).collect();
            Ok(DecoderGradients { input, params })
        };
        let (computed, gradients) = two_passes::with_weight_before(loss, (&tensor(y)?, batch), pass, input_norm)?;
        Ok((computed.loss, computed.terms, Decoded(Pending::Gradients(gradients))))
    }

    /// Adds the parameters' gradients; returns that of the code vectors.
    pub(in crate::tokenizer) fn manual_backward(
        &self,
        decoded: Decoded,
        share: f64,
        buffers: &Buffers,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let mut add = |params: Vec<(String, Tensor)>| -> Result<()> {
            params.into_iter().try_for_each(|(name, gradient)| gradients.add(&name, (gradient * share)?))
        };
        match decoded.0 {
            Pending::Activations { layers, dy, own } => {
                add(own)?;
                tensor(backward(&self.manual_layers()?.0, layers, dy, buffers, gradients)?)
            }
            Pending::Gradients(DecoderGradients { input, params }) => {
                add(params)?;
                Ok((input * share)?)
            }
        }
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
struct Reconstructed {
    decoded: Decoded,
    /// Input of the quantizer's autograd graph, which only covers the step from latents to code vectors and its losses.
    z: Var,
    quantized: Quantized,
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
        let (mut loss, mut terms, decoded) =
            half.body.manual_loss(&quantized.z_q, batch, &self.segment.loss, self.buffers)?;
        for (name, term) in &quantized.losses {
            terms.push((name, number(term)?));
            loss += number(term)?;
        }
        let (codes, latents) = (quantized.codes.to_vec1()?, half.quantize.follows_latents().then(|| z.detach()));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes, latents });
        let loss = Tensor::new((loss * batch.share * batch.loss_scale) as f32, &Device::Cpu)?;
        Ok((loss, Box::new(Reconstructed { decoded, z, quantized })))
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
        let Reconstructed { decoded, z, quantized } =
            *saved.downcast().ok().context("the saved state belongs to another segment")?;
        let dz_q = half.body.manual_backward(decoded, batch.share, self.buffers, gradients)?;
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
