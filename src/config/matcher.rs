//! The section `[matcher]` of a configuration.

use super::Model;
use serde::{Deserialize, Serialize};

/// Section `[matcher]`: the image–text matcher, a dual encoder as CLIP (arXiv 2103.00020) and Chinese-CLIP (arXiv
/// 2211.01335).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Matcher {
    /// Image encoder: `vit` (default) or `resnet`, which is not trained but can be imported.
    pub image_encoder: ImageEncoder,
    /// Side length of the square images, in pixels. Default 224.
    pub image_size: usize,
    /// Side length of a patch of the ViT, in pixels. Default 16.
    pub patch_size: usize,
    /// Transformer layers of the ViT. Default 12.
    pub image_layers: usize,
    /// Hidden size of the ViT, or channels of the ResNet's first stage. Default 768.
    pub image_hidden: usize,
    /// Attention heads of the image encoder. Default 12.
    pub image_heads: usize,
    /// Activation of the ViT: `gelu` (default), `gelu-erf` or `quick-gelu`.
    pub image_activation: Activation,
    /// Blocks of each stage of the ResNet. Default: none.
    pub resnet_blocks: Vec<usize>,
    /// Transformer layers of the text encoder. Default 12.
    pub text_layers: usize,
    /// Hidden size of the text encoder. Default 768.
    pub text_hidden: usize,
    /// Attention heads of the text encoder. Default 12.
    pub text_heads: usize,
    /// Activation of the text encoder: `gelu` (default), `gelu-erf` or `quick-gelu`.
    pub text_activation: Activation,
    /// Rows of the text encoder's table of positions; at least `text.max_tokens`. 0 (default): `text.max_tokens`.
    pub text_positions: usize,
    /// Dimensions of the embeddings. Default 512.
    pub embedding: usize,
    /// Contrastive loss: `infonce` (default) or `sigmoid`.
    pub loss: ContrastiveLoss,
    /// Random crops in training: the smallest part of an image's area that they keep. 1 (default): no crops.
    pub min_crop_area: f64,
    /// Flip images at random in training. Captions that say left or right are then wrong. Default false.
    pub flip: bool,
    /// Slope a and offset b of the score, σ(a · cosine + b), as `vilg eval matcher --calibrate` fits them. Default: none.
    pub calibration: Vec<f64>,
}

/// Architecture of a matcher's image encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageEncoder {
    /// Vision transformer (arXiv 2010.11929) with a class token, as in CLIP.
    Vit,
    /// CLIP's ResNet with attention pooling.
    Resnet,
}

/// Activation between the linear layers of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// GELU in its tanh approximation, the fastest here.
    Gelu,
    /// GELU by the error function, as in BERT.
    GeluErf,
    /// x · σ(1.702 x), as in CLIP.
    QuickGelu,
}

/// Contrastive loss over a batch of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContrastiveLoss {
    /// Cross-entropy over the batch, in both directions (arXiv 2103.00020).
    Infonce,
    /// Binary cross-entropy of each image with each text (SigLIP, arXiv 2303.15343).
    Sigmoid,
}

impl Matcher {
    /// The sizes of the image encoder's transformer.
    pub fn image_model(&self) -> Model {
        transformer(self.image_layers, self.image_hidden, self.image_heads)
    }

    /// The sizes of the text encoder's transformer.
    pub fn text_model(&self) -> Model {
        transformer(self.text_layers, self.text_hidden, self.text_heads)
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        let side = self.image_size / self.patch_size.max(1);
        side * side
    }

    /// Slope and offset of the score, if they are known.
    pub fn slope_and_offset(&self) -> Option<[f64; 2]> {
        <[f64; 2]>::try_from(self.calibration.as_slice()).ok()
    }
}

fn transformer(layers: usize, hidden: usize, heads: usize) -> Model {
    Model { layers, hidden, heads, ..Model::default() }
}

impl Default for Matcher {
    fn default() -> Self {
        Self {
            image_encoder: ImageEncoder::Vit,
            image_size: 224,
            patch_size: 16,
            image_layers: 12,
            image_hidden: 768,
            image_heads: 12,
            image_activation: Activation::Gelu,
            resnet_blocks: Vec::new(),
            text_layers: 12,
            text_hidden: 768,
            text_heads: 12,
            text_activation: Activation::Gelu,
            text_positions: 0,
            embedding: 512,
            loss: ContrastiveLoss::Infonce,
            min_crop_area: 1.0,
            flip: false,
            calibration: Vec::new(),
        }
    }
}
