//! The tokenizer as a chain of segments for the training engine: encoder → quantiser, decoder and loss.

use super::{DecoderHalf, EncoderHalf};
use crate::{
    config,
    error::Result,
    nn::{
        params::{Params, Scope},
        segment::Taped,
    },
};
use candle_core::Tensor;
use std::{cell::RefCell, rc::Rc};

/// A batch of pictures.
pub struct PixelBatch {
    /// `(batch, side, side, 3)` in \[-1, 1\].
    pub pixels: Tensor,
    /// Share of the step's loss that this batch makes up: its pictures / the step's pictures.
    pub loss_scale: f64,
    /// Left here by the last segment.
    pub statistics: RefCell<Option<Statistics>>,
}

impl PixelBatch {
    pub fn new(pixels: Tensor, loss_scale: f64) -> Self {
        Self { pixels, loss_scale, statistics: RefCell::new(None) }
    }
}

/// What a forward pass tells the log and the restart of dead codes.
pub struct Statistics {
    /// Mean absolute pixel error, of pixels in \[-1, 1\].
    pub l1: f64,
    /// Mean squared pixel error.
    pub l2: f64,
    /// Weighted codebook term.
    pub codebook: f64,
    /// Weighted commitment term.
    pub commitment: f64,
    /// Codes chosen.
    pub codes: Vec<u32>,
    /// Encoder outputs `(batch, h, w, code_dim)`.
    pub latents: Tensor,
}

impl Statistics {
    /// Peak signal-to-noise ratio in dB.
    pub fn psnr(&self) -> f64 {
        10.0 * (4.0 / self.l2.max(1e-12)).log10()
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

impl Taped<PixelBatch> for Encode {
    fn name(&self) -> &str {
        "encoder"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn taped(&self, _x: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        self.half.forward(&batch.pixels)
    }
}

pub(super) struct Decode {
    pub(super) half: Rc<DecoderHalf>,
    params: Params,
    pub(super) l1_weight: f64,
    pub(super) l2_weight: f64,
}

impl Taped<PixelBatch> for Decode {
    fn name(&self) -> &str {
        "quantizer and decoder"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// Scalar loss (eq. 1-2); the place where perceptual and adversarial terms join the sum.
    fn taped(&self, z: &Tensor, batch: &PixelBatch) -> Result<Tensor> {
        let quantized = self.half.quantize.forward(z)?;
        let error = (self.half.decode(&quantized.z_q)? - &batch.pixels)?;
        let (l1, l2) = (error.abs()?.mean_all()?, error.sqr()?.mean_all()?);
        let number = |t: &Tensor| t.to_scalar::<f32>().map(f64::from);
        *batch.statistics.borrow_mut() = Some(Statistics {
            l1: number(&l1)?,
            l2: number(&l2)?,
            codebook: number(&quantized.codebook_loss)?,
            commitment: number(&quantized.commitment_loss)?,
            codes: quantized.codes.to_vec1()?,
            latents: z.detach(),
        });
        let reconstruction = ((l1 * self.l1_weight)? + (l2 * self.l2_weight)?)?;
        let loss = ((reconstruction + quantized.codebook_loss)? + quantized.commitment_loss)?;
        Ok((loss * batch.loss_scale)?)
    }
}

pub(super) fn of(
    scope: &Scope,
    config: &config::ImageTokenizer,
    encoder: &Rc<EncoderHalf>,
    decoder: &Rc<DecoderHalf>,
) -> (Encode, Decode) {
    let params = |names: &[&str]| names.iter().flat_map(|name| scope.at(name).params()).collect::<Params>();
    let encode = Encode { half: encoder.clone(), params: params(&["encoder", "quant_conv"]) };
    let decode = Decode {
        half: decoder.clone(),
        params: params(&["quantize", "post_quant_conv", "decoder"]),
        l1_weight: config.l1_weight,
        l2_weight: config.l2_weight,
    };
    (encode, decode)
}
