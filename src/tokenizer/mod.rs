//! Image tokenizers (paper §2.1): pixels to a grid of codes and back.

mod batch;
mod decoder_body;
pub mod discriminator;
mod dvae;
mod loss;
mod manual;
pub mod perceptual;
pub mod quantizer;
mod reconstructor;
pub mod segments;
#[cfg(test)]
mod tests;
mod tiles;
mod two_passes;
pub mod vqgan;

pub use batch::{PixelBatch, Statistics, psnr};
pub use loss::ADVERSARIAL_TERMS;
pub use manual::segments::Decoded;
pub use reconstructor::{RECONSTRUCTION, Reconstructor};
pub use tiles::CodeGrid;

use crate::{
    config::{self, Architecture},
    error::{Result, bail, ensure, failed},
    nn::{conv::Conv2d, features::Buffers, params::Scope, segment::Segment},
};
use candle_core::{DType, Device, Tensor};
use decoder_body::DecoderBody;
use loss::Loss;
use manual::{Layer, segments::Manual};
use quantizer::{
    Quantizer,
    ema_codebook::{self, EmaCodebook},
    gumbel::Relaxation,
};
use segments::{Decode, Encode};
use std::rc::Rc;
use vqgan::Encoder;

/// An image tokenizer: a VQGAN with the parameter names of taming-transformers, or a dVAE with those of DALL-E.
pub struct ImageTokenizer {
    encoder: Rc<EncoderHalf>,
    decoder: Rc<DecoderHalf>,
    segments: (Encode, Decode),
    /// The EMA codebook, if the codebook is not trained by gradients.
    average: Option<EmaCodebook>,
    /// As [`manual::is_possible`].
    manual: bool,
    buffers: Buffers,
    grid: usize,
    image_size: usize,
}

/// Encoder: pixels to latents before quantization.
pub(crate) enum EncoderHalf {
    Vqgan { encoder: Box<Encoder>, quant_conv: Conv2d },
    Dvae(dvae::Encoder),
}

impl EncoderHalf {
    fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let at = |name| scope.at(name);
        Ok(match config.architecture {
            Architecture::Vqgan => Self::Vqgan {
                encoder: Box::new(Encoder::new(&at("encoder"), config)?),
                quant_conv: Conv2d::same(&at("quant_conv"), config.latent_channels, config.code_dim, 1)?,
            },
            Architecture::Dvae => Self::Dvae(dvae::Encoder::new(&at("encoder"), config)?),
        })
    }

    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        match self {
            Self::Vqgan { encoder, quant_conv } => quant_conv.forward(&encoder.forward(pixels)?),
            Self::Dvae(encoder) => encoder.forward(pixels),
        }
    }

    /// The first convolution, whose input are the pixels, and all layers after it.
    fn manual_layers(&self) -> Result<(&Conv2d, Vec<&dyn Layer>)> {
        let Self::Vqgan { encoder, quant_conv } = self else { bail!("{NO_MANUAL_PASS}") };
        let (first, mut rest) = encoder.layers();
        rest.push(quant_conv);
        Ok((first, rest))
    }
}

/// Quantizer and decoder: latents to pixels.
pub(crate) struct DecoderHalf {
    quantize: Quantizer,
    body: DecoderBody,
}

const NO_MANUAL_PASS: &str = "a dVAE has no hand-written pass";

/// Whether a parameter is only used in training and is not part of the published model.
pub fn is_of_training(name: &str) -> bool {
    discriminator::is_ours(name) || ema_codebook::is_ours(name)
}

/// Whether a parameter has an influence on the codes of an image (encoder and quantizer, not the decoder).
pub fn makes_codes(name: &str) -> bool {
    ["encoder.", "quant_conv.", "quantize."].iter().any(|part| name.starts_with(part))
}

impl ImageTokenizer {
    /// A tokenizer for inference, with the parameters of `scope`.
    ///
    /// # Errors
    /// The architecture is impossible, or a checkpoint's tensor is missing or has another shape.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        Self::with_loss(scope, config, Loss::pixels(config))
    }

    /// A tokenizer for training, with perceptual network and discriminator.
    ///
    /// # Errors
    /// As [`ImageTokenizer::new`], or the configured perceptual network does not exist.
    pub fn in_training(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        // Created before the model, whose segments take all parameters in their scopes.
        let average = EmaCodebook::new(&scope.at("quantize"), config)?;
        Ok(Self { average, ..Self::with_loss(scope, config, Loss::new(scope, config)?)? })
    }

    fn with_loss(scope: &Scope, config: &config::ImageTokenizer, loss: Loss) -> Result<Self> {
        let factor = 1usize << config.channel_multipliers.len().saturating_sub(1);
        ensure!(
            config.image_size.is_multiple_of(factor) && config.image_size > 0,
            "a side of {} pixels cannot be reduced by {factor}",
            config.image_size
        );
        let encoder = Rc::new(EncoderHalf::new(scope, config)?);
        let quantize = match config.architecture {
            Architecture::Vqgan => Quantizer::new(&scope.at("quantize"), config)?,
            Architecture::Dvae => Quantizer::of_logits(&scope.at("decoder.blocks.input"), config)?,
        };
        let decoder = Rc::new(DecoderHalf { quantize, body: DecoderBody::new(scope, config)? });
        let segments = segments::of(scope, &encoder, &decoder, loss);
        let (device, dtype) = decoder.quantize.place();
        let manual = manual::is_possible(config, device, dtype);
        let (grid, buffers) = (config.image_size / factor, Buffers::default());
        let image_size = config.image_size;
        Ok(Self { encoder, decoder, segments, average: None, manual, buffers, grid, image_size })
    }

    /// Height and width of the grid of codes.
    pub fn grid(&self) -> (usize, usize) {
        (self.grid, self.grid)
    }

    /// Side of the square images in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Number of codes in the codebook.
    pub fn codebook_size(&self) -> Result<usize> {
        self.decoder.quantize.size()
    }

    /// The chain of segments for training.
    pub fn segments(&self) -> Vec<Box<dyn Segment<PixelBatch> + '_>> {
        self.halves().into()
    }

    /// Its two segments: the encoder, then quantizer and decoder with the loss.
    pub fn halves(&self) -> [Box<dyn Segment<PixelBatch> + '_>; 2] {
        let ((encode, decode), buffers) = (&self.segments, &self.buffers);
        match self.manual {
            true => [Box::new(Manual { segment: encode, buffers }), Box::new(Manual { segment: decode, buffers })],
            false => [Box::new(encode), Box::new(decode)],
        }
    }

    /// The chain with autograd.
    #[cfg(test)]
    fn autograd_segments(&self) -> Vec<Box<dyn Segment<PixelBatch> + '_>> {
        vec![Box::new(&self.segments.0), Box::new(&self.segments.1)]
    }

    /// The quantizer with its codebook.
    pub fn quantizer(&self) -> &Quantizer {
        &self.decoder.quantize
    }

    /// The device of the parameters.
    fn device(&self) -> &Device {
        self.decoder.quantize.place().0
    }

    /// The EMA codebook, if the codebook is not trained by gradients.
    pub fn average(&self) -> Option<&EmaCodebook> {
        self.average.as_ref()
    }

    /// Latents before quantization: pixels `(batch, side, side, 3)` → `(batch, h, w, code_dim)`.
    pub fn latents(&self, pixels: &Tensor) -> Result<Tensor> {
        let pixels = &pixels.to_device(self.device())?;
        if self.manual { self.encoder.infer(pixels) } else { self.encoder.forward(pixels) }
    }

    /// Encodes pixels `(batch, side, side, 3)` in \[-1, 1\] → codes `(batch, h·w)` u32.
    ///
    /// # Errors
    /// The pixels have another shape, or the encoder's output is not finite (damaged weights).
    pub fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        let z = self.latents(pixels)?;
        check_finite(&z, "latents")?;
        Ok(self.decoder.quantize.encode(&z)?.reshape((pixels.dim(0)?, ()))?)
    }

    /// The same as codes are chosen in training ([`Quantizer::draw`]).
    ///
    /// # Errors
    /// As [`ImageTokenizer::encode`].
    pub fn draw(&self, pixels: &Tensor, relaxation: Relaxation) -> Result<Tensor> {
        let z = self.latents(pixels)?;
        check_finite(&z, "latents")?;
        Ok(self.decoder.quantize.draw(&z, relaxation)?.reshape((pixels.dim(0)?, ()))?)
    }

    /// Decodes codes `(batch, h·w)` → pixels `(batch, side, side, 3)`, about in \[-1, 1\].
    ///
    /// # Errors
    /// A code is not in the codebook, their number is not h·w, or the output is not finite (damaged weights).
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let (batch, count) = codes.dims2()?;
        ensure!(count == self.grid * self.grid, "{count} codes for a grid of {0} x {0}", self.grid);
        let z_q = self.decoder.quantize.lookup(&codes.to_device(self.device())?.flatten_all()?)?;
        let z_q = z_q.reshape((batch, self.grid, self.grid, ()))?;
        let body = &self.decoder.body;
        let pixels = if self.manual { body.infer(&z_q)? } else { body.decode(&z_q)? };
        check_finite(&pixels, "pixels")?;
        Ok(pixels)
    }
}

/// Checks that a result is finite: finite but huge weights overflow and would otherwise give codes and images of zeros.
fn check_finite(values: &Tensor, what: &str) -> Result<()> {
    // The sum of absolute values is only finite if every value is.
    let sum = values.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?;
    let hint = "its weights are damaged or diverged in training: use another checkpoint";
    ensure!(sum.is_finite(), failed(format_args!("the image tokenizer gives {what} that are not finite"), hint));
    Ok(())
}
