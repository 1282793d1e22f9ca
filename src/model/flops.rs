//! Floating-point operations of the useful work: two for each multiplication with its addition in matrix products,
//! convolutions and attention over visible keys; nothing else counts.

use super::Layout;
use crate::{
    config::{self, Architecture, Config, ImageEncoder, ImageTokenizer, Model},
    nn::{block::BlockLayers, pattern::Pattern},
    ops::attention::KeyRanges,
};
use std::sync::Arc;

/// One sequence, forward: all blocks, and a head that chooses among `outputs` at each target position.
pub fn sequence(model: &Model, layout: &Layout, outputs: usize) -> f64 {
    // The keys of a pattern are thousands of lists, and layers share a few patterns.
    let mut counts: Vec<(Pattern, usize)> = Vec::new();
    for pattern in (1..=model.layers).map(|layer| Pattern::of_layer(layer, model)) {
        match counts.iter_mut().find(|(known, _)| *known == pattern) {
            Some((_, count)) => *count += 1,
            None => counts.push((pattern, 1)),
        }
    }
    let blocks: f64 = counts.iter().map(|&(pattern, count)| count as f64 * block(model, layout, pattern)).sum();
    blocks + 2.0 * (model.hidden * outputs * layout.predicted()) as f64
}

/// One sequence, forward and backward. Low-rank adapters are trained instead of the weights: these have no gradients then.
pub fn training(config: &Config, layout: &Layout, outputs: usize) -> f64 {
    let (model, lora, positions) = (&config.model, &config.lora, layout.positions());
    let all = 3.0 * sequence(model, layout, outputs);
    if !lora.is_on() {
        return all;
    }
    let layers = BlockLayers::of(model);
    let linears = || layers.linears().into_iter().zip(["qkv", "proj", "fc1", "fc2"]);
    let weights: usize = linears().map(|(linear, _)| linear.weight()).sum();
    let adapted = linears().filter(|(_, name)| lora.adapts(name));
    let adapters: usize = adapted.map(|(linear, _)| lora.rank * (linear.inputs + linear.outputs)).sum();
    let gradients = 2.0 * (model.layers * weights * positions + model.hidden * outputs * layout.predicted()) as f64;
    all - gradients + 6.0 * (model.layers * adapters * positions) as f64
}

/// One block over one sequence, forward.
pub fn block(model: &Model, layout: &Layout, pattern: Pattern) -> f64 {
    let weights: usize = BlockLayers::of(model).linears().iter().map(|linear| linear.weight()).sum();
    2.0 * (weights * layout.positions()) as f64 + attention(model.hidden, &keys(layout, pattern))
}

/// What each query of one full-length sequence sees.
pub fn keys(layout: &Layout, pattern: Pattern) -> Arc<KeyRanges> {
    layout.keys(pattern, &[layout.source_text().len()])
}

/// Attention of one sequence, forward: scores and weighted values.
pub fn attention(hidden: usize, keys: &KeyRanges) -> f64 {
    let pairs: usize = keys.lists.runs.iter().map(|run| run.len).sum();
    4.0 * hidden as f64 * pairs as f64
}

/// One image, and one text of `tokens` tokens, through the encoders of a matcher, forward. A ResNet is left out: it is not
/// trained.
pub fn matcher(config: &config::Matcher, tokens: usize) -> [f64; 2] {
    let encoder = |model: &Model, positions: usize| {
        let weights: usize = BlockLayers::of(model).linears().iter().map(|linear| linear.weight()).sum();
        let attention = 4 * model.hidden * positions * positions;
        model.layers as f64 * (2 * weights * positions + attention) as f64
            + 2.0 * (model.hidden * config.embedding) as f64
    };
    let image = match config.image_encoder {
        ImageEncoder::Vit => {
            let patch = 2 * config.patches() * config.patch_size.pow(2) * 3 * config.image_hidden;
            patch as f64 + encoder(&config.image_model(), config.patches() + 1)
        }
        ImageEncoder::Resnet => 0.0,
    };
    [image, encoder(&config.text_model(), tokens)]
}

/// Forward and backward of the image tokenizer over `batch` images.
pub fn tokenizer(config: &ImageTokenizer, batch: usize) -> f64 {
    let side = config.grid().0;
    let [encoder, decoder] = halves(config);
    let codebook = conv(config.code_dim, config.codebook_size, 1, side);
    // Looking for the nearest code has no gradient; the codebook of a dVAE is a layer.
    let codebook = if config.architecture == Architecture::Dvae { 3.0 * codebook } else { codebook };
    batch as f64 * (3.0 * (encoder + decoder) + codebook)
}

/// Forward and backward of the tokenizer's decoder alone over `batch` images.
pub fn reconstructor(config: &ImageTokenizer, batch: usize) -> f64 {
    3.0 * batch as f64 * halves(config)[1]
}

/// Encoder and decoder over one image, forward.
fn halves(config: &ImageTokenizer) -> [f64; 2] {
    if config.architecture == Architecture::Dvae {
        let size = |c: &Convolution| conv(c.inputs as usize, c.outputs as usize, c.kernel as usize, c.side as usize);
        return dvae_convolutions(config).map(|convolutions| convolutions.iter().map(size).sum());
    }
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
    let common = middle
        + conv(last, config.latent_channels, 3, lowest)
        + conv(config.latent_channels, config.code_dim, 1, lowest)
        + conv(3, width(0), 3, side(0));
    let (mut encoder, mut decoder) = (common, common);
    for level in 0..levels {
        encoder += level_blocks(level, width(level.saturating_sub(1)), config.residual_blocks);
        decoder += level_blocks(level, width((level + 1).min(levels - 1)), config.residual_blocks + 1);
        if level + 1 < levels {
            encoder += conv(width(level), width(level), 3, side(level + 1));
            decoder += conv(width(level + 1), width(level + 1), 3, side(level));
        }
    }
    [encoder, decoder]
}

/// A convolution that keeps the side.
struct Convolution {
    inputs: u64,
    outputs: u64,
    kernel: u64,
    side: u64,
}

/// Those of a dVAE's encoder and decoder; the decoder's first is the codebook and not among them.
fn dvae_convolutions(config: &ImageTokenizer) -> [Vec<Convolution>; 2] {
    let widths = level_channels(config);
    let side = |level: usize| (config.image_size >> level) as u64;
    let last = widths.len().saturating_sub(1);
    let group = |convs: &mut Vec<Convolution>, inputs: &mut u64, level: usize, kernels: [u64; 4]| {
        let (outputs, side) = (widths[level], side(level));
        for _ in 0..config.residual_blocks {
            let sizes = [*inputs, outputs / 4, outputs / 4, outputs / 4, outputs];
            let path =
                (0..4).map(|i| Convolution { inputs: sizes[i], outputs: sizes[i + 1], kernel: kernels[i], side });
            convs.extend(path);
            if *inputs != outputs {
                convs.push(Convolution { inputs: *inputs, outputs, kernel: 1, side });
            }
            *inputs = outputs;
        }
    };
    let mut inputs = config.channels as u64;
    let mut encoder = vec![Convolution { inputs: 3, outputs: inputs, kernel: 7, side: side(0) }];
    (0..widths.len()).for_each(|level| group(&mut encoder, &mut inputs, level, [3, 3, 3, 1]));
    encoder.push(Convolution { inputs, outputs: config.codebook_size as u64, kernel: 1, side: side(last) });
    let (mut decoder, mut inputs) = (Vec::new(), config.code_dim as u64);
    (0..widths.len()).rev().for_each(|level| group(&mut decoder, &mut inputs, level, [1, 3, 3, 3]));
    decoder.push(Convolution { inputs, outputs: 6, kernel: 1, side: side(0) });
    [encoder, decoder]
}

fn level_channels(config: &ImageTokenizer) -> Vec<u64> {
    config.channel_multipliers.iter().map(|m| (m * config.channels) as u64).collect()
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
    use crate::nn::pattern::Grid;

    #[test]
    fn adapters_save_the_gradients_of_weights() {
        let mut config = Config {
            model: Model { layers: 2, hidden: 4, heads: 1, mlp_ratio: 2, ..Model::default() },
            ..Config::default()
        };
        let layout = Layout::text_to_image(3, Grid { height: 2, width: 2 });
        assert_eq!((layout.positions(), layout.predicted()), (7, 4));
        let all = training(&config, &layout, 5);
        assert_eq!(all, 3.0 * sequence(&config.model, &layout, 5));
        config.lora.rank = 1;
        // A block's weights have 48 + 16 + 32 + 32 elements, its adapters 16 + 8 + 12 + 12; the head has 4 x 5.
        let saved = 2.0 * f64::from(2 * 128 * 7 + 20 * 4) - 6.0 * f64::from(2 * 48 * 7);
        assert_eq!(training(&config, &layout, 5), all - saved);
    }
}
