//! FLOPs of the benchmark shapes, counted by [`model::flops`](crate::model::flops).

use super::shapes::Shape;
use crate::{
    model::{Layout, flops},
    nn::pattern::Grid,
};

/// Forward and backward of one training step on text→image sequences.
pub fn train(shape: &Shape) -> f64 {
    3.0 * forward(shape)
}

/// Generation of one image for each sequence with the KV cache: like the forward pass, every position is computed once.
pub fn decode(shape: &Shape) -> f64 {
    forward(shape)
}

/// A batch of images through a matcher's encoder, and a share `texts` of as many texts, forward.
pub fn matcher(shape: &Shape, texts: f64) -> f64 {
    let [image, text] = flops::matcher(&shape.config.matcher, shape.config.text.max_tokens);
    shape.batch as f64 * (image + texts * text)
}

fn forward(shape: &Shape) -> f64 {
    shape.batch as f64 * flops::sequence(&shape.config.model, &layout(shape), shape.codebook)
}

/// The text→image sequences of a shape.
pub fn layout(shape: &Shape) -> Layout {
    let grid = Grid { height: shape.grid.0, width: shape.grid.1 };
    Layout::text_to_image(shape.config.text.max_tokens, grid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::ImageTokenizer, model::flops::tokenizer};

    #[test]
    fn a_dense_generator_by_hand() {
        let mut shape = Shape::named("tiny").unwrap();
        shape.config.model.attention = crate::config::AttentionKind::Dense;
        // 2 layers of 12 · 32² weights at 20 positions; head 32 × 32 at 16; pairs: 4 texts see 4, target j sees 4 + j +
        // 1.
        let pairs = 4 * 4 + (0..16).map(|j| 4 + j + 1).sum::<usize>();
        let expected = 2 * 2 * (2 * 12 * 32 * 32 * 20 + 4 * 32 * pairs) + 2 * 2 * 32 * 32 * 16;
        assert_eq!(decode(&shape), expected as f64);
        assert_eq!(train(&shape), 3.0 * expected as f64);
    }

    #[test]
    fn a_tokenizer_of_one_level_by_hand() {
        let config =
            ImageTokenizer { channel_multipliers: vec![1], ..Shape::named("tiny").unwrap().config.image_tokenizer };
        let (c, latent) = (32, 8);
        let three_by_three = 2 * 3 * c + 14 * c * c + 2 * latent * c; // 3 + 4 residual blocks of two
        let attention = 2 * (4 * c * c * 64 * 2 + 4 * 64 * 64 * c);
        let expected = 2 * 64 * (9 * three_by_three + 2 * latent * 4) + attention;
        let nearest = 2 * 64 * 4 * 16;
        assert_eq!(tokenizer(&config, 1), 3.0 * expected as f64 + nearest as f64);
    }
}
