//! Generation with a trained model: text to image and image to text.
//!
//! Reading order: [`sampling`] turns logits into tokens; `text_to_image` and `caption` (image to text) decode with it;
//! `beam` is beam search for captions; `score` computes the log likelihood of a caption. All are methods of [`Models`].
//! [`Matching`] compares images with texts by a model of its own, and `ranking` chooses among candidates with it.

mod beam;
mod caption;
mod matching;
mod ranking;
pub mod sampling;
mod score;
#[cfg(test)]
mod tests;
mod text_to_image;

pub use caption::{Caption, Decoding};
pub use matching::Matching;
pub use ranking::{BestOf, Ranking, Scores};
pub use sampling::Sampling;
pub use text_to_image::{GeneratedImage, Request};

use crate::{
    bundle::Bundle,
    data::image::to_pixels,
    error::Result,
    model::{Decoder, Generator},
    ops::packed::Format,
    text::WordPiece,
    tokenizer::ImageTokenizer,
};
use image::RgbImage;
use std::sync::Arc;

/// The parts of a loaded model, for both directions: text to image and image to text.
pub struct Models {
    pub generator: Arc<Generator>,
    pub decoder: Decoder,
    pub image_tokenizer: ImageTokenizer,
    pub text: WordPiece,
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
        Self { decoder: Decoder::new(generator.clone(), format), generator, image_tokenizer, text }
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
