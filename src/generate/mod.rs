//! Generation with a trained model: text to image and image to text.
//!
//! Reading order: [`sampling`] turns logits into tokens; `text_to_image` and `caption` (image to text) decode with it;
//! `running` generates images that are asked for at any time (continuous batching); `beam` is beam search for captions; `score` computes the log likelihood of a caption. All are methods of [`Models`].
//! [`Matching`] compares images with texts by a model of its own, and `ranking` chooses among candidates with it.

mod beam;
mod caption;
mod matching;
mod ranking;
mod running;
pub mod sampling;
mod score;
#[cfg(test)]
mod tests;
mod text_to_image;

pub use caption::{Caption, Decoding};
pub use matching::Matching;
pub use ranking::{BestOf, Ranking, Scores};
pub use running::{RunningImage, RunningImages};
pub use sampling::Sampling;
pub use text_to_image::{GeneratedImage, Request};

use crate::{
    bundle::Bundle,
    data::image::{from_pixels, to_pixels},
    error::{Result, ensure, usage},
    model::{Batch, Decoder, Generator, Tokens},
    ops::packed::Format,
    runtime,
    text::WordPiece,
    tokenizer::ImageTokenizer,
};
use candle_core::Tensor;
use image::RgbImage;
use std::sync::Arc;

/// The parts of a loaded model, for both directions: text to image and image to text.
pub struct Models {
    pub generator: Arc<Generator>,
    pub decoder: Decoder,
    pub image_tokenizer: ImageTokenizer,
    pub text: WordPiece,
    /// What makes pixels of generated codes.
    pub reconstructor: Reconstructor,
}

/// What makes pixels of codes (paper §3.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reconstructor {
    /// The generator's own, from its hidden states
    EndToEnd,
    /// The image tokenizer's decoder, from the vectors of the codes
    TwoStage,
}

impl Models {
    /// Loads the parts of an opened model folder. The weights used for decoding are stored in `format`.
    ///
    /// # Errors
    /// A part is missing, damaged or does not match the others, or the folder holds no generator.
    pub fn load(bundle: &Bundle, format: Format) -> Result<Self> {
        Ok(Self::new(bundle.generator()?, format, bundle.image_tokenizer()?, bundle.text()?))
    }

    /// Combines loaded parts. The weights used for decoding are stored in `format`.
    pub fn new(generator: Generator, format: Format, image_tokenizer: ImageTokenizer, text: WordPiece) -> Self {
        let generator = Arc::new(generator);
        let reconstructor =
            if generator.end_to_end().is_some() { Reconstructor::EndToEnd } else { Reconstructor::TwoStage };
        Self { decoder: Decoder::new(generator.clone(), format), generator, image_tokenizer, text, reconstructor }
    }

    /// The same with another reconstructor than that of the generator's training.
    ///
    /// # Errors
    /// The generator has none of its own.
    pub fn with_reconstructor(self, reconstructor: Reconstructor) -> Result<Self> {
        let there = reconstructor == Reconstructor::TwoStage || self.generator.end_to_end().is_some();
        let hint = "it comes from a run with task = \"end-to-end\"; leave out --reconstructor";
        ensure!(there, usage("the model has no end-to-end reconstructor", hint));
        Ok(Self { reconstructor, ..self })
    }

    /// Makes images of codes (raster order); `prompts` are the tokens of the text of each, which an end-to-end
    /// reconstructor reads too.
    ///
    /// # Errors
    /// The numbers of images, codes and prompts do not fit, or the weights are damaged.
    pub fn images(&self, prompts: &[&[u32]], codes: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        self.images_by(self.reconstructor, prompts, codes)
    }

    /// The same by a reconstructor of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::images`], or the model has no such reconstructor.
    pub fn images_by(
        &self,
        reconstructor: Reconstructor,
        prompts: &[&[u32]],
        codes: &[Vec<u32>],
    ) -> Result<Vec<RgbImage>> {
        ensure!(prompts.len() == codes.len(), "{} prompts for {} images", prompts.len(), codes.len());
        if codes.is_empty() {
            return Ok(Vec::new());
        }
        let (device, each) = (runtime::device()?, codes[0].len());
        let codes = Tensor::from_vec(codes.concat(), (codes.len(), each), &device)?;
        let pixels = match reconstructor {
            Reconstructor::TwoStage => self.image_tokenizer.decode(&codes)?,
            Reconstructor::EndToEnd => {
                let rows: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.to_vec()).collect();
                let width = rows.iter().map(Vec::len).max().unwrap_or(0);
                let text = Tokens::pad(&rows, width, self.text.pad(), &device)?;
                self.generator.reconstruct(Batch::text_to_image(text, codes)?)?
            }
        };
        from_pixels(&pixels)
    }

    /// Encodes square images with a side of [`ImageTokenizer::image_size`] pixels: the codes of each image in raster
    /// order.
    ///
    /// # Errors
    /// The images differ in size or do not have the size of the image tokenizer.
    pub fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.image_tokenizer.encode(&to_pixels(images)?)?.to_vec2()?)
    }
}
