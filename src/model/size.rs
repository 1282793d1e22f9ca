//! Parameters of each part by formula, so that a configuration of any size can be judged without building it.

use super::listing;
use crate::config::{Architecture, Config, ImageTokenizer, QuantizerKind};

/// A part of a model and its number of parameters.
pub type Part = (&'static str, u64);

/// The generator's parts.
pub fn generator(config: &Config, vocab_size: usize, codebook_size: usize, grid: (usize, usize)) -> Vec<Part> {
    let units = listing::generator(config, vocab_size, codebook_size, grid);
    let count = |prefixes: &[&str]| -> u64 {
        let of_part = units.iter().flatten().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        of_part.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
    };
    vec![
        ("text embedding", count(&["text_embedding."])),
        ("text positions", count(&["text_position."])),
        ("image embedding", count(&["image_embedding."])),
        ("image positions", count(&["image_row.", "image_column.", "image_start"])),
        ("blocks", count(&["blocks."])),
        ("final norm", count(&["norm."])),
        ("text head", count(&["text_head."])),
        ("image head", count(&["image_head."])),
    ]
}

/// The image tokenizer's parts, and the discriminator that is trained beside it.
pub fn image_tokenizer(config: &ImageTokenizer) -> Vec<Part> {
    let mut parts = match config.architecture {
        Architecture::Vqgan => vqgan(config),
        Architecture::Dvae => dvae(config),
    };
    if config.adversarial_weight > 0.0 {
        parts.push(("discriminator", discriminator(config)));
    }
    if config.codebook_is_averaged() {
        parts.push(("moving average", config.codebook_size as u64 * (config.code_dim as u64 + 1)));
    }
    parts
}

fn dvae(config: &ImageTokenizer) -> Vec<Part> {
    let count = |convs: Vec<Convolution>| convs.iter().map(|c| conv(c.inputs, c.outputs, c.kernel)).sum();
    let [encoder, decoder] = dvae_convolutions(config);
    let codebook = (config.codebook_size as u64 + 1) * config.code_dim as u64;
    vec![("encoder", count(encoder)), ("quantiser", codebook), ("decoder", count(decoder))]
}

/// A convolution that keeps the side.
pub(super) struct Convolution {
    pub inputs: u64,
    pub outputs: u64,
    pub kernel: u64,
    pub side: u64,
}

/// Those of a dVAE's encoder and decoder; the decoder's first is the codebook and not among them.
pub(super) fn dvae_convolutions(config: &ImageTokenizer) -> [Vec<Convolution>; 2] {
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

fn vqgan(config: &ImageTokenizer) -> Vec<Part> {
    let (latent, code) = (config.latent_channels as u64, config.code_dim as u64);
    let codes = config.codebook_size as u64;
    let codebook = match config.quantizer {
        QuantizerKind::Nearest => codes * code,
        QuantizerKind::Gumbel => codes * code + conv(code, codes, 1),
        QuantizerKind::Fsq => 0,
    };
    vec![
        ("encoder", encoder(config)),
        ("quantiser", conv(latent, code, 1) + codebook + conv(code, latent, 1)),
        ("decoder", decoder(config)),
    ]
}

fn discriminator(config: &ImageTokenizer) -> u64 {
    let channels = config.discriminator_channels as u64;
    let widths: Vec<u64> = (0..=config.discriminator_layers).map(|i| channels * (1 << i).min(8)).collect();
    // Between first and last, a norm stands for the bias.
    let inner: u64 = widths.windows(2).map(|pair| conv(pair[0], pair[1], 4) - pair[1] + norm(pair[1])).sum();
    conv(3, channels, 4) + inner + conv(widths[widths.len() - 1], 1, 4)
}

/// The image tokenizer's two segments: the encoder with its last convolution, then quantiser and decoder.
pub fn image_tokenizer_segments(config: &ImageTokenizer) -> [u64; 2] {
    let parts = image_tokenizer(config);
    let total: u64 = parts.iter().map(|(_, count)| count).sum();
    let quant_conv = match config.architecture {
        Architecture::Vqgan => conv(config.latent_channels as u64, config.code_dim as u64, 1),
        Architecture::Dvae => 0,
    };
    let first = parts[0].1 + quant_conv;
    [first, total - first]
}

fn encoder(config: &ImageTokenizer) -> u64 {
    let mut channels = config.channels as u64;
    let mut count = conv(3, channels, 3);
    for (level, out) in level_channels(config).into_iter().enumerate() {
        count += level_blocks(config, level, channels, out, config.residual_blocks);
        channels = out;
        let last = level + 1 == config.channel_multipliers.len();
        count += if last { 0 } else { conv(channels, channels, 3) };
    }
    count + middle(channels) + norm(channels) + conv(channels, config.latent_channels as u64, 3)
}

fn decoder(config: &ImageTokenizer) -> u64 {
    let levels = level_channels(config);
    let mut channels = levels.last().copied().unwrap_or_default();
    let mut count = conv(config.latent_channels as u64, channels, 3) + middle(channels);
    for (level, out) in levels.into_iter().enumerate().rev() {
        count += level_blocks(config, level, channels, out, config.residual_blocks + 1);
        channels = out;
        count += if level == 0 { 0 } else { conv(channels, channels, 3) };
    }
    count + norm(channels) + conv(channels, 3, 3)
}

fn level_channels(config: &ImageTokenizer) -> Vec<u64> {
    config.channel_multipliers.iter().map(|m| (m * config.channels) as u64).collect()
}

/// The residual blocks of a level, each with its attention where the level's side has one.
fn level_blocks(config: &ImageTokenizer, level: usize, input: u64, out: u64, blocks: usize) -> u64 {
    let attends = config.attention_sides.contains(&(config.image_size >> level));
    let attention = if attends { attention(out) } else { 0 };
    (0..blocks).map(|i| residual(if i == 0 { input } else { out }, out) + attention).sum()
}

fn middle(channels: u64) -> u64 {
    2 * residual(channels, channels) + attention(channels)
}

fn residual(input: u64, out: u64) -> u64 {
    let shortcut = if input == out { 0 } else { conv(input, out, 1) };
    norm(input) + conv(input, out, 3) + norm(out) + conv(out, out, 3) + shortcut
}

fn attention(channels: u64) -> u64 {
    norm(channels) + 4 * conv(channels, channels, 1)
}

fn conv(input: u64, out: u64, size: u64) -> u64 {
    input * out * size * size + out
}

/// Scale and shift.
fn norm(channels: u64) -> u64 {
    2 * channels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Generator, nn::params::Scope};
    use candle_core::{DType, Device};

    #[test]
    fn formulas_count_what_a_tokenizer_in_training_holds() {
        let config = ImageTokenizer {
            image_size: 32,
            channels: 32,
            channel_multipliers: vec![1, 2],
            attention_sides: vec![16],
            code_dim: 2,
            codebook_size: 12,
            fsq_levels: vec![4, 3],
            codebook_decay: 0.9,
            adversarial_weight: 1.0,
            discriminator_channels: 3,
            ..ImageTokenizer::default()
        };
        let vqgan = |quantizer| (Architecture::Vqgan, quantizer);
        let kinds = [QuantizerKind::Nearest, QuantizerKind::Gumbel, QuantizerKind::Fsq].map(vqgan);
        for (architecture, quantizer) in kinds.into_iter().chain([(Architecture::Dvae, QuantizerKind::Gumbel)]) {
            let config = ImageTokenizer { architecture, quantizer, ..config.clone() };
            let scope = Scope::from_seed(0, DType::F32, &Device::Cpu);
            crate::tokenizer::ImageTokenizer::in_training(&scope, &config).unwrap();
            let held: usize = scope.params().values().map(|p| p.elem_count()).sum();
            let counted: u64 = image_tokenizer(&config).iter().map(|(_, count)| count).sum();
            assert_eq!(counted, held as u64, "{architecture:?} {quantizer:?}");
        }
    }

    #[test]
    fn formulas_count_what_the_generator_holds() {
        for (qk_norm, sandwich_norm) in [(false, false), (true, true)] {
            let mut config = Config::default();
            config.text.max_tokens = 5;
            let model = &mut config.model;
            (model.layers, model.hidden, model.heads, model.mlp_ratio) = (3, 12, 2, 3);
            (model.qk_norm, model.sandwich_norm) = (qk_norm, sandwich_norm);
            let scope = Scope::from_seed(0, DType::F32, &Device::Cpu);
            Generator::new(&scope, &config, 17, 13, (2, 3)).unwrap();
            let held: usize = scope.params().values().map(|p| p.elem_count()).sum();
            let counted: u64 = generator(&config, 17, 13, (2, 3)).iter().map(|(_, count)| count).sum();
            assert_eq!(counted, held as u64);
        }
    }
}
