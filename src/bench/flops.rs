//! Floating-point operations of the useful work: two for each multiplication with its addition in matrix products,
//! convolutions and attention over visible keys; nothing else counts.

use super::shapes::Shape;
use crate::{
    config::{ImageTokenizer, Model},
    model::{Direction, Layout},
    nn::pattern::{Grid, Pattern},
    ops::attention::KeyRanges,
};
use std::sync::Arc;

/// Forward and backward of one step of text→image sequences.
pub fn train(shape: &Shape) -> f64 {
    3.0 * forward(shape)
}

/// One picture for each sequence, painted with a cache: as the forward pass, each position once.
pub fn decode(shape: &Shape) -> f64 {
    forward(shape)
}

fn forward(shape: &Shape) -> f64 {
    let model = &shape.config.model;
    let layout = layout(shape);
    let blocks: f64 = (1..=model.layers).map(|layer| block(model, &layout, Pattern::of_layer(layer, model))).sum();
    let head = 2.0 * (model.hidden * shape.codebook * layout.target()) as f64;
    shape.batch as f64 * (blocks + head)
}

/// One block over one sequence, forward.
pub fn block(model: &Model, layout: &Layout, pattern: Pattern) -> f64 {
    let weights = model.hidden * model.hidden * (4 + 2 * model.mlp_ratio);
    2.0 * (weights * layout.positions()) as f64 + attention(model.hidden, &keys(layout, pattern))
}

/// The text→image sequences of a shape.
pub fn layout(shape: &Shape) -> Layout {
    let grid = Grid { height: shape.grid.0, width: shape.grid.1 };
    Layout { direction: Direction::TextToImage, text: shape.config.text.max_tokens, grid }
}

/// What each query of one full-length sequence sees.
pub fn keys(layout: &Layout, pattern: Pattern) -> Arc<KeyRanges> {
    layout.keys(pattern, &[layout.text])
}

/// Attention of one sequence, forward: scores and weighted values.
pub fn attention(hidden: usize, keys: &KeyRanges) -> f64 {
    let pairs: usize = keys.runs.iter().map(|run| run.len).sum();
    4.0 * hidden as f64 * pairs as f64
}

/// Forward and backward of the image tokenizer over `batch` pictures.
pub fn tokenizer(config: &ImageTokenizer, batch: usize) -> f64 {
    let levels = config.channel_multipliers.len();
    let width = |level: usize| config.channel_multipliers[level] * config.channels;
    let side = |level: usize| config.image_size >> level;
    let (lowest, last) = (side(levels - 1), width(levels - 1));
    let middle = 2.0 * residual(last, last, lowest) + self_attention(last, lowest);
    let level_blocks = |level: usize, input: usize, count: usize| -> f64 {
        let own =
            if config.attention_sides.contains(&side(level)) { self_attention(width(level), side(level)) } else { 0.0 };
        let block = |i| residual(if i == 0 { input } else { width(level) }, width(level), side(level)) + own;
        (0..count).map(block).sum()
    };
    let mut total = conv(3, width(0), 3, side(0)) + conv(width(0), 3, 3, side(0)) + 2.0 * middle;
    total += 2.0 * conv(last, config.latent_channels, 3, lowest);
    total += 2.0 * conv(config.latent_channels, config.code_dim, 1, lowest);
    for level in 0..levels {
        total += level_blocks(level, width(level.saturating_sub(1)), config.residual_blocks);
        total += level_blocks(level, width((level + 1).min(levels - 1)), config.residual_blocks + 1);
        if level + 1 < levels {
            total += conv(width(level), width(level), 3, side(level + 1)); // down
            total += conv(width(level + 1), width(level + 1), 3, side(level)); // up
        }
    }
    let nearest = conv(config.code_dim, config.codebook_size, 1, lowest); // has no gradient
    batch as f64 * (3.0 * total + nearest)
}

fn conv(input: usize, output: usize, kernel: usize, side: usize) -> f64 {
    2.0 * (input * output * kernel * kernel) as f64 * (side * side) as f64
}

fn residual(input: usize, output: usize, side: usize) -> f64 {
    let shortcut = if input == output { 0.0 } else { conv(input, output, 1, side) };
    conv(input, output, 3, side) + conv(output, output, 3, side) + shortcut
}

fn self_attention(channels: usize, side: usize) -> f64 {
    let positions = (side * side) as f64;
    4.0 * conv(channels, channels, 1, side) + 4.0 * positions * positions * channels as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_generator_by_hand() {
        let mut shape = Shape::named("tiny").unwrap();
        shape.config.model.attention = crate::config::AttentionKind::Dense;
        // 2 layers of 12 · 32² weights at 20 positions; head 32 × 32 at 16; pairs: 4 texts see 4, target j sees 4 + j + 1.
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
