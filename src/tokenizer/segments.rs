//! The tokenizer as a chain of segments for training: encoder → quantizer, decoder and loss.

use super::{
    DecoderHalf, EncoderHalf,
    discriminator::{self, LogitEma},
    loss::{Loss, number},
    quantizer::gumbel::Relaxation,
};
use crate::{
    error::Result,
    nn::{
        params::{Params, Scope},
        segment::Autograd,
    },
};
use candle_core::Tensor;
use std::{cell::RefCell, rc::Rc};

/// A batch of images.
pub struct PixelBatch {
    /// `(batch, side, side, 3)` in \[-1, 1\].
    pub pixels: Tensor,
    /// Share of this batch in the step's loss: its images / the step's images.
    pub share: f64,
    /// Loss scale, so that small gradients do not underflow in f16. A power of two, so that scaling is exact.
    pub loss_scale: f64,
    /// The training step, from 1.
    pub step: u64,
    /// Running statistics of the discriminator, once it is trained.
    pub logit_ema: Option<LogitEma>,
    /// Settings of the Gumbel softmax, for quantizers that use it.
    pub relaxation: Relaxation,
    /// Set by the last segment.
    pub statistics: RefCell<Option<Statistics>>,
}

impl PixelBatch {
    pub fn new(pixels: Tensor, share: f64) -> Self {
        let relaxation = Relaxation { temperature: 1.0, ..Relaxation::default() };
        Self { pixels, share, loss_scale: 1.0, step: 1, logit_ema: None, relaxation, statistics: RefCell::new(None) }
    }
}

/// Results of a forward pass for the log and for codebook updates.
pub struct Statistics {
    /// Mean values by name.
    pub terms: Vec<(&'static str, f64)>,
    /// Code indices.
    pub codes: Vec<u32>,
    /// Encoder outputs `(batch, h, w, code_dim)`, if the codebook is updated from them.
    pub latents: Option<Tensor>,
}

impl Statistics {
    /// The mean value of this name; 0 if there is none.
    pub fn term(&self, name: &str) -> f64 {
        self.terms.iter().find(|term| term.0 == name).map_or(0.0, |term| term.1)
    }

    /// Peak signal-to-noise ratio in dB, from the mean squared error of pixels in \[-1, 1\].
    pub fn psnr(&self) -> f64 {
        10.0 * (4.0 / self.term("l2").max(1e-12)).log10()
    }

    /// Perplexity: effective number of codes in use, e to the entropy of their frequencies.
    pub fn perplexity(&self) -> f64 {
        let mut codes = self.codes.clone();
        codes.sort_unstable();
        let total = codes.len() as f64;
        let entropy: f64 = codes.chunk_by(|a, b| a == b).map(|c| c.len() as f64 / total).map(|p| -p * p.ln()).sum();
        entropy.exp()
    }
}

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
