//! The tokenizer's two segments as native passes.

use super::{Kept, backward, forward, infer, quantizer};
use crate::{
    error::{Context, Result},
    nn::{
        features::{Buffers, Features},
        gradients::Gradients,
        params::Params,
        segment::{Saved, Segment, Taped},
    },
    ops::{slices::view, with_slice},
    tokenizer::{
        DecoderHalf, EncoderHalf, PixelBatch, Statistics,
        segments::{Decode, Encode},
    },
};
use candle_core::{Device, Tensor};

/// A taped segment run natively.
pub(in crate::tokenizer) struct Native<'a, S> {
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
    /// Pixels → latents.
    fn native(&self, pixels: Features, buffers: &Buffers) -> Result<(Tensor, Vec<Kept>)> {
        let (first, rest) = self.native_layers();
        let mut x = buffers.take(first.output(pixels.shape)?);
        first.run(&pixels, None, &mut x)?;
        let (z, mut kept) = forward(&rest, x, buffers)?;
        kept.insert(0, Kept::one(pixels));
        Ok((tensor(z)?, kept))
    }

    /// Pixels → latents, without a way back.
    pub(in crate::tokenizer) fn infer(&self, pixels: &Tensor) -> Result<Tensor> {
        let buffers = Buffers::default();
        let (first, mut layers) = self.native_layers();
        layers.insert(0, first);
        tensor(infer(&layers, features(pixels, &buffers)?, &buffers)?)
    }
}

impl DecoderHalf {
    /// Code vectors → pixels, without a way back.
    pub(in crate::tokenizer) fn infer(&self, z_q: &Tensor) -> Result<Tensor> {
        let buffers = Buffers::default();
        tensor(infer(&self.native_layers(), features(z_q, &buffers)?, &buffers)?)
    }
}

impl Segment<PixelBatch> for Native<'_, Encode> {
    fn name(&self) -> &str {
        Taped::name(self.segment)
    }

    fn params(&self) -> &Params {
        Taped::params(self.segment)
    }

    fn forward(&self, _: &Tensor, batch: &PixelBatch) -> Result<(Tensor, Saved)> {
        let (z, kept) = self.segment.half.native(features(&batch.pixels, self.buffers)?, self.buffers)?;
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
        let mut kept = *saved.downcast::<Vec<Kept>>().ok().context("what another segment saved")?;
        let (first, rest) = self.segment.half.native_layers();
        let dy = features(&dy.context("the encoder is not the last segment")?, self.buffers)?;
        let pixels = kept.remove(0).take()?;
        let dx = backward(&rest, kept, dy, self.buffers, gradients)?;
        // Nothing trains below the pixels.
        first.gradients(&pixels, &dx, gradients)?;
        [pixels, dx].into_iter().for_each(|features| self.buffers.give(features));
        Ok(None)
    }
}

/// What [`Decode`] keeps.
struct Decoded {
    layers: Vec<Kept>,
    quantized: quantizer::Kept,
    /// Gradient of the loss in the pixels.
    dy: Features,
}

impl Native<'_, Decode> {
    /// Absolute and squared error, both means; turns pixels into the gradient of the loss in them.
    fn compare(&self, y: &mut Features, batch: &PixelBatch) -> Result<(f64, f64)> {
        let pixels = view::<f32>(&batch.pixels)?;
        let count = y.data.len() as f64;
        let factor = |weight: f64| (weight * batch.loss_scale / count) as f32;
        let (of_l1, of_l2) = (factor(self.segment.l1_weight), factor(2.0 * self.segment.l2_weight));
        let (mut l1, mut l2) = (0.0, 0.0);
        for (y, pixel) in y.data.iter_mut().zip(pixels.iter()) {
            let error = *y - pixel;
            l1 += f64::from(error.abs());
            l2 += f64::from(error * error);
            let sign = if error == 0.0 { 0.0 } else { error.signum() };
            *y = of_l1 * sign + of_l2 * error;
        }
        Ok((l1 / count, l2 / count))
    }
}

impl Segment<PixelBatch> for Native<'_, Decode> {
    fn name(&self) -> &str {
        Taped::name(self.segment)
    }

    fn params(&self) -> &Params {
        Taped::params(self.segment)
    }

    fn forward(&self, z: &Tensor, batch: &PixelBatch) -> Result<(Tensor, Saved)> {
        let half = &self.segment.half;
        let z = z.detach();
        let quantized = half.quantize.forward(&z)?;
        let (mut y, layers) = forward(&half.native_layers(), features(&quantized.z_q, self.buffers)?, self.buffers)?;
        let (l1, l2) = self.compare(&mut y, batch)?;
        let number = |t: &Tensor| t.to_scalar::<f32>().map(f64::from);
        let (codebook, commitment) = (number(&quantized.codebook_loss)?, number(&quantized.commitment_loss)?);
        let loss = self.segment.l1_weight * l1 + self.segment.l2_weight * l2 + codebook + commitment;
        let codes = quantized.codes.to_vec1()?;
        let saved = Decoded { layers, quantized: quantizer::Kept::new(&half.quantize, &z, &quantized)?, dy: y };
        *batch.statistics.borrow_mut() = Some(Statistics { l1, l2, codebook, commitment, codes, latents: z });
        let loss = Tensor::new((loss * batch.loss_scale) as f32, &Device::Cpu)?;
        Ok((loss, Box::new(saved)))
    }

    fn backward(
        &self,
        z: &Tensor,
        batch: &PixelBatch,
        saved: Saved,
        _: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let half = &self.segment.half;
        let Decoded { layers, quantized, dy } = *saved.downcast().ok().context("what another segment saved")?;
        let mut dz = backward(&half.native_layers(), layers, dy, self.buffers, gradients)?;
        quantizer::backward(&half.quantize, &quantized, &mut dz.data, batch.loss_scale, gradients)?;
        Ok(Some(tensor(dz)?.reshape(z.shape())?))
    }
}
