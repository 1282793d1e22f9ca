//! The tokenizer as a chain of segments for the training engine: encoder → quantiser, decoder and loss.

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
    /// Share of the step's loss that this batch makes up: its images / the step's images.
    pub share: f64,
    /// What losses are multiplied by so that f16 keeps small gradients; a power of two, which costs no bit.
    pub loss_scale: f64,
    /// The training step, from 1.
    pub step: u64,
    /// Where the adversary takes part: how it did before.
    pub logit_ema: Option<LogitEma>,
    /// How codes are drawn, where they are.
    pub relaxation: Relaxation,
    /// Left here by the last segment.
    pub statistics: RefCell<Option<Statistics>>,
}

impl PixelBatch {
    pub fn new(pixels: Tensor, share: f64) -> Self {
        let relaxation = Relaxation { temperature: 1.0, ..Relaxation::default() };
        Self { pixels, share, loss_scale: 1.0, step: 1, logit_ema: None, relaxation, statistics: RefCell::new(None) }
    }
}

/// What a forward pass tells the log and the codebook.
pub struct Statistics {
    /// Means by name.
    pub terms: Vec<(&'static str, f64)>,
    /// Codes chosen.
    pub codes: Vec<u32>,
    /// Encoder outputs `(batch, h, w, code_dim)`, where the codebook follows them.
    pub latents: Option<Tensor>,
}

impl Statistics {
    /// The mean of this name; 0 where there is none.
    pub fn term(&self, name: &str) -> f64 {
        self.terms.iter().find(|term| term.0 == name).map_or(0.0, |term| term.1)
    }

    /// Peak signal-to-noise ratio in dB, from the mean squared error of pixels in \[-1, 1\].
    pub fn psnr(&self) -> f64 {
        10.0 * (4.0 / self.term("l2").max(1e-12)).log10()
    }

    /// Effective number of codes in use: e to the entropy of their frequencies.
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

    /// Scalar loss (eq. 1-2) whose gradient is that of all terms, the adversary's in its adaptive weight.
    fn autograd(&self, z: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        let quantized = self.half.quantize.forward(z, batch.relaxation)?;
        let (last, y) = self.half.decode_to_last(&quantized.z_q)?;
        let computed = self.loss.compute(&y.detach(), batch, |dy| self.half.last_weight_norm(&last, dy))?;
        let mut terms = computed.terms;
        quantized.losses.iter().try_for_each(|(name, loss)| number(loss).map(|loss| terms.push((*name, loss))))?;
        let (codes, latents) = (quantized.codes.to_vec1()?, self.half.quantize.follows_latents().then(|| z.detach()));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes, latents });
        // Terms linear in reconstruction and discriminator: their gradients are those that were found.
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
