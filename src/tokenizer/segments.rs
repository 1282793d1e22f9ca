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

    /// Scalar loss (eq. 1-2) whose gradient is that of all terms.
    fn autograd(&self, z: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        let quantized = self.half.quantize.forward(z, batch.relaxation)?;
        let (loss, mut terms) = self.half.body.loss(&quantized.z_q, batch, &self.loss, &self.params)?;
        quantized.losses.iter().try_for_each(|(name, loss)| number(loss).map(|loss| terms.push((*name, loss))))?;
        let (codes, latents) = (quantized.codes.to_vec1()?, self.half.quantize.follows_latents().then(|| z.detach()));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes, latents });
        let add = |sum: Tensor, (_, loss): &(_, Tensor)| sum + (loss * batch.loss_scale)?;
        Ok((quantized.losses.iter().try_fold(loss, add)? * batch.share)?)
    }
}

pub(super) fn of(scope: &Scope, encoder: &Rc<EncoderHalf>, decoder: &Rc<DecoderHalf>, loss: Loss) -> (Encode, Decode) {
    let params = |names: &[&str]| names.iter().flat_map(|name| scope.at(name).params()).collect::<Params>();
    let encode = Encode { half: encoder.clone(), params: params(&["encoder", "quant_conv"]) };
    let params = params(&["quantize", "post_quant_conv", "decoder", discriminator::SCOPE]);
    (encode, Decode { half: decoder.clone(), params, loss })
}
