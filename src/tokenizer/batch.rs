//! A batch of images in training, and what a pass over it measures.

use super::{discriminator::LogitEma, quantizer::gumbel::Relaxation};
use candle_core::Tensor;
use std::cell::RefCell;

/// A batch of images.
#[derive(Debug)]
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
#[derive(Debug)]
pub struct Statistics {
    /// Mean values by name.
    pub terms: Vec<(&'static str, f64)>,
    /// Code indices.
    pub codes: Vec<u32>,
    /// Encoder outputs `(batch, h, w, code_dim)`, if the codebook is updated from them.
    pub latents: Option<Tensor>,
}

/// Peak signal-to-noise ratio in dB, from the mean squared error of pixels in \[-1, 1\].
pub fn psnr(squared_error: f64) -> f64 {
    10.0 * (4.0 / squared_error.max(1e-12)).log10()
}

impl Statistics {
    /// The mean value of this name; 0 if there is none.
    pub fn term(&self, name: &str) -> f64 {
        self.terms.iter().find(|term| term.0 == name).map_or(0.0, |term| term.1)
    }

    /// Peak signal-to-noise ratio in dB, from the mean squared error of pixels in \[-1, 1\].
    pub fn psnr(&self) -> f64 {
        psnr(self.term("l2"))
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
