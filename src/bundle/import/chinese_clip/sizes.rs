//! The sizes of a Chinese-CLIP by the shapes of its weights, and by the config.json of a Hugging Face folder for what
//! shapes do not show.

use super::layout::Layout;
use crate::{
    bounded_read,
    config::{Activation, ImageEncoder, Matcher},
    error::{Context, Hint, Result, ensure, plain},
    nn::checkpoint_file::CheckpointFile,
};
use serde::Deserialize;
use std::path::Path;

/// Channels of an attention head, in all published models but ViT-H/14.
const HEAD: usize = 64;
/// Hidden size of ViT-H/14, with the channels of its heads.
const HUGE: [usize; 2] = [1280, 80];
/// How much a ResNet divides the side length of images.
const RESNET_REDUCTION: usize = 32;
/// Most layers or blocks that are looked for.
const MAX_LAYERS: usize = 1024;

/// Numbers of heads and activations.
struct Settings {
    image_heads: usize,
    text_heads: usize,
    image_activation: Activation,
    text_activation: Activation,
}

/// The part of a `ChineseCLIPConfig` that shapes do not show.
#[derive(Deserialize)]
struct HuggingFace {
    text_config: Encoder,
    vision_config: Encoder,
}

#[derive(Deserialize)]
#[serde(default)]
struct Encoder {
    num_attention_heads: usize,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
}

impl Default for Encoder {
    /// That of `ChineseCLIPTextConfig` and `ChineseCLIPVisionConfig`.
    fn default() -> Self {
        Self { num_attention_heads: 12, hidden_act: None, layer_norm_eps: None }
    }
}

/// The section `[matcher]` of a checkpoint, and the size of its vocabulary. `config` is the config.json of a Hugging Face
/// folder.
///
/// # Errors
/// A tensor is missing, or the sizes are not those of a Chinese-CLIP.
pub fn sizes(file: &CheckpointFile, layout: Layout, config: Option<&Path>) -> Result<(Matcher, usize)> {
    let find = |ours: &str| layout.forms(ours).iter().find_map(|form| form.shape(file));
    let shape = |ours: &str| {
        let theirs = || layout.forms(ours).first().and_then(|form| form.names().first().cloned()).unwrap_or_default();
        find(ours).with_context(|| format!("it lacks `{}`", theirs()))
    };
    let size = |ours: &str, dimension: usize| -> Result<usize> {
        let shape = shape(ours)?;
        shape.get(dimension).copied().with_context(|| format!("`{ours}` would have the shape {shape:?}"))
    };
    let count = |name: &dyn Fn(usize) -> String| (0..MAX_LAYERS).take_while(|i| find(&name(*i)).is_some()).count();

    let text_hidden = size("text.token", 1)?;
    let mut matcher = Matcher {
        text_layers: count(&|i| format!("text.blocks.{i}.norm1.weight")),
        text_hidden,
        text_positions: size("text.position", 0)?,
        ..Matcher::default()
    };
    ensure!(matcher.text_layers > 0, "it has no layers of a text encoder");
    let resnet = find("image.layer1.0.conv1.weight").is_some();
    if resnet {
        let blocks = |stage: usize| count(&|i| format!("image.layer{stage}.{i}.conv1.weight"));
        matcher.image_encoder = ImageEncoder::Resnet;
        matcher.image_hidden = size("image.layer1.0.conv1.weight", 0)?;
        matcher.resnet_blocks = (1..=4).map(blocks).collect();
        matcher.image_size = side(size("image.attnpool.positional_embedding", 0)?, RESNET_REDUCTION)?;
        matcher.embedding = size("image.attnpool.c_proj.weight", 0)?;
    } else {
        matcher.image_hidden = size("image.patch", 0)?;
        matcher.image_layers = count(&|i| format!("image.blocks.{i}.norm1.weight"));
        matcher.patch_size = (size("image.patch", 1)? / 3).isqrt();
        matcher.image_size = side(size("image.position", 0)?, matcher.patch_size)?;
        matcher.embedding = size("image.proj", 0)?;
        ensure!(matcher.image_layers > 0, "it has no layers of an image encoder");
    }
    let settings = match (layout, config) {
        (Layout::HuggingFace, Some(path)) => read(path)?,
        _ => {
            let reduction = if resnet { RESNET_REDUCTION } else { 1 };
            Settings {
                image_heads: heads(matcher.image_hidden.saturating_mul(reduction))?,
                text_heads: heads(text_hidden)?,
                image_activation: Activation::QuickGelu,
                text_activation: Activation::GeluErf,
            }
        }
    };
    matcher.image_heads = settings.image_heads;
    matcher.text_heads = settings.text_heads;
    matcher.image_activation = settings.image_activation;
    matcher.text_activation = settings.text_activation;
    Ok((matcher, size("text.token", 0)?))
}

/// Side length in pixels of square images with a class token and a position for each `step` × `step` pixels.
fn side(rows: usize, step: usize) -> Result<usize> {
    let positions = rows.saturating_sub(1);
    let side = positions.isqrt();
    ensure!(side > 0 && side * side == positions, "its {rows} image positions are not a square and a class token");
    Ok(side.saturating_mul(step))
}

/// Attention heads of a transformer with this hidden size.
fn heads(hidden: usize) -> Result<usize> {
    let head = if hidden == HUGE[0] { HUGE[1] } else { HEAD };
    ensure!(hidden > 0 && hidden.is_multiple_of(head), "its hidden size {hidden} is not a multiple of {head}");
    Ok(hidden / head)
}

fn read(path: &Path) -> Result<Settings> {
    let text = bounded_read::read_text(path, bounded_read::TEXT)?;
    let hint = "a Hugging Face folder of Chinese-CLIP has a config.json with text_config and vision_config";
    let what = || format!("{} is not the configuration of a ChineseCLIPModel", path.display());
    let HuggingFace { text_config, vision_config } = serde_json::from_str(&text).map_err(plain).hint(what(), hint)?;
    for (encoder, eps) in [(&text_config, 1e-12), (&vision_config, 1e-5)] {
        let theirs = encoder.layer_norm_eps.unwrap_or(eps);
        ensure!(theirs == eps, "{}: layer_norm_eps is {theirs}, only {eps} is supported", path.display());
    }
    Ok(Settings {
        image_heads: vision_config.num_attention_heads,
        text_heads: text_config.num_attention_heads,
        image_activation: activation(vision_config.hidden_act.as_deref().unwrap_or("quick_gelu"), path)?,
        text_activation: activation(text_config.hidden_act.as_deref().unwrap_or("gelu"), path)?,
    })
}

fn activation(name: &str, path: &Path) -> Result<Activation> {
    Ok(match name {
        "quick_gelu" => Activation::QuickGelu,
        "gelu" => Activation::GeluErf,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::Gelu,
        _ => None.with_context(|| format!("{}: the activation `{name}` is not supported", path.display()))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_sides_of_the_published_models() {
        for (hidden, expected) in [(768, 12), (1024, 16), (1280, 16), (2048, 32), (64, 1)] {
            assert_eq!(heads(hidden).unwrap(), expected);
        }
        for (rows, step, expected) in [(197, 16, 224), (257, 14, 224), (577, 14, 336), (50, 32, 224)] {
            assert_eq!(side(rows, step).unwrap(), expected);
        }
        assert!(
            heads(96).is_err()
                && heads(0).is_err()
                && side(196, 16).is_err()
                && side(0, 16).is_err()
                && side(1, 16).is_err()
        );
    }
}
