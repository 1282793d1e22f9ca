//! The layers of an image tokenizer after its quantizer (paper §2.1): code vectors to pixels, and the loss of the pixels.

use super::{NO_MANUAL_PASS, PixelBatch, dvae, loss::Loss, manual::Layer, vqgan};
use crate::{
    config::{self, Architecture},
    error::{Result, bail},
    nn::{
        conv::Conv2d,
        params::{Params, Scope},
    },
};
use candle_core::Tensor;

/// The layers after the quantizer.
pub(super) enum DecoderBody {
    Vqgan { post_quant_conv: Conv2d, decoder: Box<vqgan::Decoder> },
    Dvae(dvae::Decoder),
}

/// Mean values by name.
pub(super) type Terms = Vec<(&'static str, f64)>;

impl DecoderBody {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let decoder = &scope.at("decoder");
        Ok(match config.architecture {
            Architecture::Vqgan => Self::Vqgan {
                post_quant_conv: Conv2d::same(
                    &scope.at("post_quant_conv"),
                    config.code_dim,
                    config.latent_channels,
                    1,
                )?,
                decoder: Box::new(vqgan::Decoder::new(decoder, config)?),
            },
            Architecture::Dvae => Self::Dvae(dvae::Decoder::new(decoder, config)?),
        })
    }

    /// Code vectors → pixels.
    pub fn decode(&self, z_q: &Tensor) -> Result<Tensor> {
        let output = self.decode_to_last(z_q)?.1;
        match self {
            Self::Vqgan { .. } => Ok(output),
            Self::Dvae(_) => dvae::pixels(&output),
        }
    }

    /// The input of the last convolution, and its output: pixels, or a dVAE's distribution over pixels.
    pub fn decode_to_last(&self, z_q: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Vqgan { post_quant_conv, decoder } => decoder.forward(&post_quant_conv.forward(z_q)?),
            Self::Dvae(decoder) => decoder.forward(z_q),
        }
    }

    /// Norm of the gradient of the last convolution's weight, from its input and the gradient of its output.
    pub fn last_weight_norm(&self, input: &Tensor, dy: &Tensor) -> Result<f64> {
        match self {
            Self::Vqgan { decoder, .. } => decoder.last_weight_norm(input, dy),
            Self::Dvae(decoder) => decoder.last_weight_norm(input, dy),
        }
    }

    /// All layers, and the last of them.
    pub fn manual_layers(&self) -> Result<(Vec<&dyn Layer>, &vqgan::Head)> {
        let Self::Vqgan { post_quant_conv, decoder } = self else { bail!("{NO_MANUAL_PASS}") };
        let mut layers: Vec<&dyn Layer> = vec![post_quant_conv];
        layers.extend(decoder.layers());
        Ok((layers, decoder.head()))
    }

    /// The loss of the pixels that code vectors decode to, times the batch's loss scale, and its terms. Its gradients are
    /// those of all terms, with the adaptive weight of the adversarial one; `params` are those with a gradient.
    pub fn loss(&self, z_q: &Tensor, batch: &PixelBatch, loss: &Loss, params: &Params) -> Result<(Tensor, Terms)> {
        let (last, y) = self.decode_to_last(z_q)?;
        let computed = loss.compute(&y.detach(), batch, |dy| self.last_weight_norm(&last, dy))?;
        // Terms linear in reconstruction and discriminator parameters, so that their gradients are the computed ones.
        let mut linear = (&y * computed.gradient.detach())?.sum_all()?;
        for (name, gradient) in computed.own {
            if let Some(var) = params.get(&name) {
                linear = (linear + (var.as_tensor() * gradient.detach())?.sum_all()?)?;
            }
        }
        let value = (linear.detach().neg()? + computed.loss * batch.loss_scale)?;
        Ok(((linear + value)?, computed.terms))
    }
}
