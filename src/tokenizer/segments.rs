//! The tokenizer as a chain of segments for training: encoder → quantizer, decoder and loss.

use super::{
    DecoderHalf, EncoderHalf,
    batch::{PixelBatch, Statistics},
    discriminator,
    loss::{Loss, number},
};
use crate::{
    error::Result,
    nn::{
        params::{Params, Scope},
        segment::Autograd,
    },
};
use candle_core::Tensor;
use std::rc::Rc;

pub(super) struct Encode {
    pub(super) half: Rc<EncoderHalf>,
    params: Params,
}

impl Autograd<PixelBatch> for Encode {
    fn name(&self) -> &str {
        "encoder"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn autograd(&self, _x: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        self.half.forward(&batch.pixels)
    }
}

pub(super) struct Decode {
    pub(super) half: Rc<DecoderHalf>,
    params: Params,
    pub(super) loss: Loss,
}

impl Autograd<PixelBatch> for Decode {
    fn name(&self) -> &str {
        "quantizer and decoder"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// Scalar loss (eq. 1-2) whose gradient is that of all terms, with the adaptive weight of the adversarial term.
    fn autograd(&self, z: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        let quantized = self.half.quantize.forward(z, batch.relaxation)?;
        let (last, y) = self.half.decode_to_last(&quantized.z_q)?;
        let computed = self.loss.compute(&y.detach(), batch, |dy| self.half.last_weight_norm(&last, dy))?;
        let mut terms = computed.terms;
        quantized.losses.iter().try_for_each(|(name, loss)| number(loss).map(|loss| terms.push((*name, loss))))?;
        let (codes, latents) = (quantized.codes.to_vec1()?, self.half.quantize.follows_latents().then(|| z.detach()));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes, latents });
        // Terms linear in reconstruction and discriminator parameters, so that their gradients are the computed ones.
        let mut linear = (&y * computed.gradient.detach())?.sum_all()?;
        for (name, gradient) in computed.own {
            if let Some(var) = self.params.get(&name) {
                linear = (linear + (var.as_tensor() * gradient.detach())?.sum_all()?)?;
            }
        }
        let value = (linear.detach().neg()? + computed.loss * batch.loss_scale)?;
        let add = |sum: Tensor, (_, loss): &(_, Tensor)| sum + (loss * batch.loss_scale)?;
        Ok((quantized.losses.iter().try_fold((linear + value)?, add)? * batch.share)?)
    }
}

pub(super) fn of(scope: &Scope, encoder: &Rc<EncoderHalf>, decoder: &Rc<DecoderHalf>, loss: Loss) -> (Encode, Decode) {
    let params = |names: &[&str]| names.iter().flat_map(|name| scope.at(name).params()).collect::<Params>();
    let encode = Encode { half: encoder.clone(), params: params(&["encoder", "quant_conv"]) };
    let params = params(&["quantize", "post_quant_conv", "decoder", discriminator::SCOPE]);
    (encode, Decode { half: decoder.clone(), params, loss })
}
