//! Model sizes for benchmarks, by name.

use crate::{
    config::{self, Config, ImageTokenizer, Model},
    error::{Result, bail},
};

/// Names accepted by [`Shape::named`].
pub const SHAPES: [&str; 4] = ["perf", "emoji", "10b-layer", "tiny"];

/// A generator, an image tokenizer and a matcher, with their batch sizes.
#[derive(Debug, Clone)]
pub struct Shape {
    pub name: &'static str,
    /// Only `model`, `text.max_tokens`, `train`, `image_tokenizer` and `matcher` are used.
    pub config: Config,
    pub vocabulary: usize,
    /// Codebook size of the generator; the tokenizer has its own.
    pub codebook: usize,
    /// Height and width of the generator's grid of codes.
    pub grid: (usize, usize),
    /// Batch size in sequences or images.
    pub batch: usize,
}

impl Shape {
    /// - `perf`: 8 layers, hidden size 512, 32 + 256 positions, 12,288 codes (38.0 M parameters), batch 16; a tokenizer
    ///   with 4.0 M parameters for 64 × 64 pixels; a matcher with ViT-S/16 at 224 × 224 pixels and 12 text layers.
    /// - `emoji`: the sizes of the demo.
    /// - `10b-layer`: layers of the paper's 10 B model, 64 + 1024 positions, small vocabularies.
    /// - `tiny`: for tests.
    ///
    /// # Errors
    /// The name is not among [`SHAPES`].
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "perf" => Self {
                name: "perf",
                config: config(
                    model(8, 512, 8),
                    32,
                    tokenizer(64, &[1, 2, 2], 64, 1024, 64, 64),
                    matcher(224, 16, model(12, 384, 6)),
                ),
                vocabulary: 128,
                codebook: 12288,
                grid: (16, 16),
                batch: 16,
            },
            "emoji" => Self {
                name: "emoji",
                config: config(
                    model(7, 320, 5),
                    32,
                    tokenizer(32, &[1, 1, 2, 4], 64, 2048, 8, 64),
                    matcher(96, 16, model(5, 128, 2)),
                ),
                vocabulary: 2206,
                codebook: 2048,
                grid: (8, 8),
                batch: 16,
            },
            "10b-layer" => Self {
                name: "10b-layer",
                config: config(
                    model(3, 4096, 64),
                    64,
                    tokenizer(128, &[1, 1, 2, 4], 256, 8192, 256, 256),
                    matcher(224, 16, model(12, 768, 12)),
                ),
                vocabulary: 128,
                codebook: 128,
                grid: (32, 32),
                batch: 1,
            },
            "tiny" => Self {
                name: "tiny",
                config: config(model(2, 32, 2), 4, tokenizer(32, &[1, 1], 8, 16, 4, 8), matcher(8, 4, model(2, 16, 2))),
                vocabulary: 16,
                codebook: 32,
                grid: (4, 4),
                batch: 2,
            },
            _ => bail!("no shape is called `{name}`"),
        })
    }
}

fn model(layers: usize, hidden: usize, heads: usize) -> Model {
    Model { layers, hidden, heads, ..Model::default() }
}

fn tokenizer(
    channels: usize,
    multipliers: &[usize],
    latent_channels: usize,
    codebook_size: usize,
    code_dim: usize,
    image_size: usize,
) -> ImageTokenizer {
    ImageTokenizer {
        image_size,
        channels,
        channel_multipliers: multipliers.to_vec(),
        residual_blocks: 1,
        attention_sides: Vec::new(),
        latent_channels,
        codebook_size,
        code_dim,
        l1_weight: 1.0,
        ..ImageTokenizer::default()
    }
}

/// A matcher with two encoders of the sizes of `model`.
fn matcher(image_size: usize, patch_size: usize, model: Model) -> config::Matcher {
    let Model { layers, hidden, heads, .. } = model;
    config::Matcher {
        image_size,
        patch_size,
        image_layers: layers,
        image_hidden: hidden,
        image_heads: heads,
        text_layers: layers,
        text_hidden: hidden,
        text_heads: heads,
        embedding: hidden,
        ..config::Matcher::default()
    }
}

fn config(model: Model, max_tokens: usize, image_tokenizer: ImageTokenizer, matcher: config::Matcher) -> Config {
    let mut config = Config { model, image_tokenizer, matcher, ..Config::default() };
    config.text.max_tokens = max_tokens;
    // A small learning rate: larger steps on one random batch would leave the range of normal training.
    config.train.learning_rate = 1e-4;
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Generator, nn::params::Scope, tokenizer::ImageTokenizer};
    use candle_core::Device;

    #[test]
    fn every_name_is_a_shape_with_the_documented_number_of_parameters() {
        for name in SHAPES {
            assert_eq!(Shape::named(name).unwrap().name, name);
        }
        assert!(Shape::named("huge").is_err());
        let perf = Shape::named("perf").unwrap();
        let millions = |make: &dyn Fn(&Scope)| {
            let scope = Scope::empty_from_seed(1, &Device::Cpu);
            make(&scope);
            format!("{:.1}", scope.params().values().map(|param| param.elem_count()).sum::<usize>() as f64 / 1e6)
        };
        let generator = millions(&|scope| {
            Generator::new(scope, &perf.config, perf.vocabulary, perf.codebook, perf.grid).unwrap();
        });
        let tokenizer = millions(&|scope| {
            ImageTokenizer::new(scope, &perf.config.image_tokenizer).unwrap();
        });
        assert_eq!([generator, tokenizer], ["38.0", "4.0"]);
    }
}
