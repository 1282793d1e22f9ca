//! Painting and describing with a trained model.
//!
//! Reading order: [`sampling`] turns logits into tokens, [`paint`](self) and `caption` decode with them,
//! `beam` searches for the likeliest caption, `score` measures one. All are methods of [`Models`].

mod beam;
mod caption;
mod paint;
pub mod sampling;
mod score;
#[cfg(test)]
mod tests;

pub use caption::{Caption, Decoding};
pub use paint::{Job, Painting};
pub use sampling::Sampling;

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

/// What it takes to go from text to pictures and back.
pub struct Models {
    pub generator: Arc<Generator>,
    pub decoder: Decoder,
    pub image_tokenizer: ImageTokenizer,
    pub text: WordPiece,
}

impl Models {
    /// The parts of an opened model folder; the generator decodes with weights stored in `format`.
    pub fn load(bundle: &Bundle, format: Format) -> Result<Self> {
        Ok(Self::new(bundle.generator()?, format, bundle.image_tokenizer()?, bundle.text()?))
    }

    /// The same from its parts.
    pub fn new(generator: Generator, format: Format, image_tokenizer: ImageTokenizer, text: WordPiece) -> Self {
        let generator = Arc::new(generator);
        Self { decoder: Decoder::new(generator.clone(), format), generator, image_tokenizer, text }
    }

    /// The codes of square pictures of [`ImageTokenizer::image_size`], in raster order.
    pub fn encode(&self, pictures: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.image_tokenizer.encode(&to_pixels(pictures)?)?.to_vec2()?)
    }
}
