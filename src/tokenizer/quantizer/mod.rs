//! The quantizer between encoder and decoder (paper §2.1): latents to codes, codes to vectors. The paper uses
//! [`vector_quantizer`].

pub mod ema_codebook;
pub mod fsq;
pub mod gumbel;
pub mod vector_quantizer;

use crate::{
    config::{self, QuantizerKind},
    error::{Result, bail, ensure},
    nn::params::Scope,
};
use candle_core::{D, DType, Device, Tensor};
use fsq::Fsq;
use gumbel::{Gumbel, Relaxation};
use vector_quantizer::VectorQuantizer;

/// A quantizer of any kind.
pub enum Quantizer {
    Vector(VectorQuantizer),
    Gumbel(Gumbel),
    Fsq(Fsq),
}

/// Result of quantizing a batch.
pub struct Quantized {
    /// The code vectors, `(.., dim)`; gradients flow to the input.
    pub z_q: Tensor,
    /// Code indices `(rows)`.
    pub codes: Tensor,
    /// Weighted mean losses by name; they are added to the loss.
    pub losses: Vec<(&'static str, Tensor)>,
}

impl Quantizer {
    /// The quantizer of a configuration.
    ///
    /// # Errors
    /// The configuration is impossible, or a checkpoint's tensor is missing or has another shape.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        Ok(match config.quantizer {
            QuantizerKind::Nearest => Self::Vector(VectorQuantizer::new(scope, config)?),
            QuantizerKind::Gumbel => Self::Gumbel(Gumbel::new(scope, config)?),
            QuantizerKind::Fsq => Self::Fsq(Fsq::new(config, &scope.device())?),
        })
    }

    /// The quantizer of a dVAE, whose latents are logits; `input` is the scope of the decoder's first convolution.
    pub fn of_logits(input: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        Ok(Self::Gumbel(Gumbel::of_logits(input, config)?))
    }

    /// Number of codes.
    pub fn size(&self) -> Result<usize> {
        match self {
            Self::Vector(nearest) => nearest.size(),
            Self::Gumbel(gumbel) => gumbel.size(),
            Self::Fsq(fsq) => Ok(fsq.size()),
        }
    }

    /// Whether the latents of a step update the codebook besides its gradients: by EMA, or by restarting dead codes.
    pub fn follows_latents(&self) -> bool {
        matches!(self, Self::Vector(_))
    }

    /// Device and dtype of the quantizer.
    pub fn place(&self) -> (&Device, DType) {
        let tensor = match self {
            Self::Vector(nearest) => nearest.codebook(),
            Self::Gumbel(gumbel) => gumbel.codebook(),
            Self::Fsq(fsq) => fsq.levels(),
        };
        (tensor.device(), tensor.dtype())
    }

    /// Codes `(rows)` of latents `(.., dim)`.
    pub fn encode(&self, z: &Tensor) -> Result<Tensor> {
        match self {
            Self::Vector(nearest) => nearest.encode(z),
            Self::Gumbel(gumbel) => gumbel.encode(z),
            Self::Fsq(fsq) => fsq.encode(z),
        }
    }

    /// Codes `(rows)` of latents `(.., dim)` in training: those of [`Quantizer::encode`], but a Gumbel softmax draws them.
    pub fn draw(&self, z: &Tensor, relaxation: Relaxation) -> Result<Tensor> {
        match self {
            Self::Vector(nearest) => nearest.encode(z),
            Self::Gumbel(gumbel) => gumbel.draw(z, relaxation),
            Self::Fsq(fsq) => fsq.encode(z),
        }
    }

    /// Whether it has [`Quantizer::soft_codes`].
    pub fn has_soft_codes(&self) -> bool {
        matches!(self, Self::Vector(_) | Self::Gumbel(_))
    }

    /// Soft codes `(rows, codes)` of latents `(.., dim)`, each row a distribution over the codes that the code of
    /// [`Quantizer::draw`] is the most likely of. The gradient flows to the latents, not to the codebook.
    ///
    /// # Errors
    /// The quantizer has none.
    pub fn soft_codes(&self, z: &Tensor, temperature: f64, relaxation: Relaxation) -> Result<Tensor> {
        match self {
            Self::Vector(nearest) => nearest.soft_codes(z, temperature),
            Self::Gumbel(gumbel) => gumbel.soft_codes(z, temperature, relaxation),
            Self::Fsq(_) => bail!("codes of fixed levels have no soft codes"),
        }
    }

    /// Vectors `(rows, dim)` of codes `(rows)`.
    ///
    /// # Errors
    /// A code is not in the codebook.
    pub fn lookup(&self, codes: &Tensor) -> Result<Tensor> {
        let size = self.size()?;
        let outside = codes.to_vec1::<u32>()?.into_iter().find(|c| *c as usize >= size);
        ensure!(outside.is_none(), "code {} of a codebook of {size}", outside.unwrap_or(0));
        match self {
            Self::Vector(nearest) => nearest.lookup(codes),
            Self::Gumbel(gumbel) => gumbel.lookup(codes),
            Self::Fsq(fsq) => fsq.lookup(codes),
        }
    }

    /// Quantizes latents `(.., dim)` with gradients and losses.
    pub fn forward(&self, z: &Tensor, relaxation: Relaxation) -> Result<Quantized> {
        match self {
            Self::Vector(nearest) => nearest.forward(z),
            Self::Gumbel(gumbel) => gumbel.forward(z, relaxation),
            Self::Fsq(fsq) => fsq.forward(z),
        }
    }
}

/// Softmax over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}
