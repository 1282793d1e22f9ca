//! The configuration: one file describes a run, and a copy of it is part of every model folder.
//!
//! Order of precedence: defaults < the file that a file extends < file < `--set key=value`. Unknown keys are errors.

mod check;
mod data;
mod end_to_end;
mod extends;
mod flat;
mod load;
mod lora;
mod matcher;
mod parse;
mod renamed;
mod resume;
mod sample;
mod shipped;
mod task;
mod train;
mod validate;
mod validate_matcher;

pub use check::Problem;
pub use data::{Data, Source};
pub use end_to_end::{EndToEnd, HiddenState, ReconstructorInit};
pub use flat::{flatten, values};
pub use load::{Loaded, Origin};
pub use lora::{Lora, LoraTarget};
pub use matcher::{Activation, ContrastiveLoss, ImageEncoder, Matcher};
pub use renamed::rename_stored_keys;
pub use sample::{Sample, Schedule};
pub use shipped::{SHIPPED, shipped};
pub use task::Task;
pub use train::{Decay, LossReduction, MatrixOptimizer, Offload, Precision, Spike, Train, begins_with};

use serde::{Deserialize, Serialize};

/// A whole configuration (`configs/*.toml`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the run; its folder is `runs/NAME`. Default `run`.
    pub name: String,
    /// What to train: `generator` (default), `end-to-end`, `image-tokenizer` or `matcher`.
    pub task: Task,
    /// Seed of every random number of the run. Default 0.
    pub seed: u64,
    /// Section `[data]`: where the samples come from.
    pub data: Data,
    /// Section `[text]`: the text tokenizer.
    pub text: Text,
    /// Section `[image_tokenizer]` (paper §2.1).
    pub image_tokenizer: ImageTokenizer,
    /// Section `[model]`: the transformer (paper §2.2).
    pub model: Model,
    /// Section `[end_to_end]`: generator and reconstructor together (paper §3.1.3).
    pub end_to_end: EndToEnd,
    /// Section `[matcher]`: the image–text matcher (paper §3.2.1).
    pub matcher: Matcher,
    /// Section `[lora]`: low-rank adapters instead of all weights.
    pub lora: Lora,
    /// Section `[train]`: optimizer, schedule, parallelism and checkpoints.
    pub train: Train,
    /// Section `[sample]`: defaults of `vilg t2i` and of the sample images drawn during training.
    pub sample: Sample,
}

/// Section `[text]`: the text tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Text {
    /// WordPiece vocabulary file with one token per line, or `demo` for the vocabulary of the built-in model.
    pub vocab: String,
    /// Number of text positions: `[CLS]`, tokens, `[SEP]`. Longer captions are truncated. Default 64.
    pub max_tokens: usize,
    /// Script that captions and prompts are converted to before they are split into tokens: `none` (default) or
    /// `simplified`.
    pub normalize: Normalization,
}

/// Conversion of a text before it is split into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// Both scripts stay as they are
    None,
    /// Traditional characters become simplified ones
    Simplified,
}

/// Section `[image_tokenizer]`: a VQGAN with the tensor names and shapes of taming-transformers, or DALL-E's dVAE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageTokenizer {
    /// Model folder of a trained tokenizer, or `demo`. Only for the tasks `generator` and `end-to-end`: the other keys are
    /// read from that folder, except, for `end-to-end`, `perceptual` and those of the GAN loss.
    pub path: String,
    /// Architecture of encoder and decoder: `vqgan` (default) or `dvae`.
    pub architecture: Architecture,
    /// Side length of the square images, in pixels. Default 256.
    pub image_size: usize,
    /// Channels at the first resolution. Default 128.
    pub channels: usize,
    /// Channels at each resolution, as multiples of `channels`. Each resolution after the first halves the side length,
    /// so f = 2^(number of entries - 1). Default [1, 1, 2, 4] (f = 8).
    pub channel_multipliers: Vec<usize>,
    /// Residual blocks per resolution in the encoder; the decoder has one more. Default 2.
    pub residual_blocks: usize,
    /// Side lengths of the feature maps (in positions) at which self-attention follows each residual block. Default
    /// `[32]`.
    pub attention_sides: Vec<usize>,
    /// Channels between encoder and quantizer. Default 256.
    pub latent_channels: usize,
    /// Quantizer: how latents become codes. Default `nearest`.
    pub quantizer: QuantizerKind,
    /// Codebook size: number of codes. Default 8192.
    pub codebook_size: usize,
    /// Number of dimensions of a code vector. Default 256.
    pub code_dim: usize,
    /// Number of levels of each dimension (quantizer `fsq`); their product is the codebook size. Default: none.
    pub fsq_levels: Vec<u32>,
    /// L2-normalize latents and codes before they are compared, as ViT-VQGAN does (arXiv 2110.04627). Default false.
    pub l2_normalize: bool,
    /// Weight of the commitment loss (beta; arXiv 2012.09841, eq. 2). Default 0.25.
    pub commitment: f64,
    /// `legacy` quantizer of taming-transformers: beta weights the codebook loss instead of the commitment loss.
    /// Default false.
    pub legacy_beta: bool,
    /// Decay per step of an EMA codebook (quantizer `nearest`; arXiv 1711.00937, appendix A.1): each code is the moving
    /// average of the latents assigned to it. 0 (default): the codebook is trained by gradients.
    pub codebook_decay: f64,
    /// Weight of the entropy loss (MAGVIT-2, arXiv 2310.05737, eq. 4): low entropy of each latent's code distribution,
    /// high entropy of their mean. Needs memory for latents × codes numbers. Default 0.
    pub entropy_weight: f64,
    /// Weight of the L1 pixel loss. Default 0.
    pub l1_weight: f64,
    /// Weight of the L2 pixel loss (arXiv 2012.09841, eq. 1). Default 1.
    pub l2_weight: f64,
    /// Steps after which an unused code is replaced by an encoder output (dead code restart). 0 (default): never.
    pub restart_after: u64,
    /// Share of the training images whose color channels are permuted at random (augmentation): in most data some hues
    /// are rare, and a tokenizer then shows them as gray. Default 0.
    pub channel_permutation: f64,
    /// Weight of the KL divergence from the uniform distribution over codes (quantizer `gumbel`). Default 5e-4.
    pub kl_weight: f64,
    /// First and last temperature of the Gumbel softmax (quantizer `gumbel`). Default [1.0, 0.0625].
    pub temperature: [f64; 2],
    /// Steps over which the temperature is annealed, as half a cosine. Default 100000.
    pub temperature_steps: u64,
    /// Steps over which `kl_weight` rises linearly from 0 (DALL-E: 5000). 0 (default): `temperature_steps`.
    pub kl_steps: u64,
    /// Folder of the perceptual network, written by `vilg import lpips`. Needed with `perceptual_weight` above 0. For task
    /// `end-to-end`: with it, the reconstruction loss includes the tokenizer's perceptual loss.
    pub perceptual: String,
    /// Weight of the perceptual loss LPIPS (arXiv 1801.03924). 0 (default): none.
    pub perceptual_weight: f64,
    /// Step after which the perceptual loss is added; steps before it are several times faster. Default 0.
    pub perceptual_start: u64,
    /// Weight of the adversarial loss before the adaptive weight (arXiv 2012.09841, eq. 7). 0 (default): no
    /// discriminator. For task `end-to-end`: of the reconstructor, as are the six keys below.
    pub adversarial_weight: f64,
    /// Step after which the discriminator is trained and its loss is added. Default 0.
    pub adversarial_start: u64,
    /// Loss of the discriminator: `hinge` (default) or `vanilla`.
    pub adversarial_loss: AdversarialLoss,
    /// Channels of the discriminator's first layer. Default 64.
    pub discriminator_channels: usize,
    /// Number of layers of the discriminator that halve the side length. Default 3.
    pub discriminator_layers: usize,
    /// Skip the discriminator's update while its accuracy on the patches of the last step is above this share. 1
    /// (default): never skip.
    pub discriminator_ceiling: f64,
    /// Weight of the LeCam regularization of the discriminator (arXiv 2104.03310). 0 (default): none.
    pub lecam_weight: f64,
}

/// Architecture of an image tokenizer's encoder and decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// VQGAN (arXiv 2012.09841).
    Vqgan,
    /// DALL-E's dVAE (arXiv 2102.12092): the encoder outputs logits over codes, the decoder a distribution over pixels.
    Dvae,
}

/// How latents become codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizerKind {
    /// The nearest vector of a learned codebook (VQ-VAE, arXiv 1711.00937).
    Nearest,
    /// A sample from the encoder's logits, relaxed by a Gumbel softmax in training (arXiv 1611.01144).
    Gumbel,
    /// Finite scalar quantization (arXiv 2309.15505): each dimension is rounded to a few levels; no codebook is
    /// learned.
    Fsq,
}

/// Loss of the discriminator on its logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdversarialLoss {
    /// Hinge loss: logits of real patches above 1, of reconstructed patches below -1.
    Hinge,
    /// Binary cross-entropy.
    Vanilla,
}

impl ImageTokenizer {
    /// Height and width of the grid of image codes.
    pub fn grid(&self) -> (usize, usize) {
        let side = self.image_size >> self.channel_multipliers.len().saturating_sub(1);
        (side, side)
    }

    /// Whether a term of the loss begins at this step (counted from 1), so that losses before and after are not comparable.
    pub fn loss_changes_at(&self, step: u64) -> bool {
        let starts =
            [(self.perceptual_weight, self.perceptual_start), (self.adversarial_weight, self.adversarial_start)];
        starts.iter().any(|(weight, start)| *weight > 0.0 && *start + 1 == step)
    }

    /// Whether the codebook is updated by moving averages of latents (EMA) instead of gradients.
    pub fn codebook_is_averaged(&self) -> bool {
        self.quantizer == QuantizerKind::Nearest && self.codebook_decay > 0.0
    }
}

/// Section `[model]`: the bidirectional transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Number of transformer layers. Default 24.
    pub layers: usize,
    /// Hidden size. Default 1024.
    pub hidden: usize,
    /// Number of attention heads. Default 16.
    pub heads: usize,
    /// Inner size of the feed-forward network, as a multiple of the hidden size. Default 4.
    pub mlp_ratio: usize,
    /// `sparse` (default): row, column and conv layers in the paper's order; `dense`: every layer dense.
    pub attention: AttentionKind,
    /// Image codes that a row layer attends to: `window` (default) or `same-row`.
    pub row_extent: RowExtent,
    /// How the neighborhood of a conv layer ends at the left and right border: `clip` (default) or `raster-wrap`.
    pub conv_border: ConvBorder,
    /// Side length of the conv layer's neighborhood in codes, odd. Default 11.
    pub conv_size: usize,
    /// LayerNorm on queries and keys (arXiv 2405.09818). Default false.
    pub qk_norm: bool,
    /// A second LayerNorm at the end of each residual branch (CogView, arXiv 2105.13290). Default false.
    pub sandwich_norm: bool,
}

/// Attention of the layers over image codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// Row, column and conv layers in the paper's order (arXiv 2102.12092, appendix B.1).
    Sparse,
    /// All earlier codes, in every layer.
    Dense,
}

/// Image codes that a row layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowExtent {
    /// The `width` codes before the query in raster order, up to the code directly above it.
    Window,
    /// Only the codes of the query's own row.
    SameRow,
}

/// The neighborhood of a conv layer at the left and right border of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConvBorder {
    /// The neighborhood is clipped at the border.
    Clip,
    /// The neighborhood continues in the row above or below, in raster order.
    RasterWrap,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "run".into(),
            task: Task::Generator,
            seed: 0,
            data: Data::default(),
            text: Text::default(),
            image_tokenizer: ImageTokenizer::default(),
            model: Model::default(),
            end_to_end: EndToEnd::default(),
            matcher: Matcher::default(),
            lora: Lora::default(),
            train: Train::default(),
            sample: Sample::default(),
        }
    }
}

impl Default for Text {
    fn default() -> Self {
        Self { vocab: String::new(), max_tokens: 64, normalize: Normalization::None }
    }
}

impl Default for ImageTokenizer {
    fn default() -> Self {
        Self {
            path: String::new(),
            architecture: Architecture::Vqgan,
            image_size: 256,
            channels: 128,
            channel_multipliers: vec![1, 1, 2, 4],
            residual_blocks: 2,
            attention_sides: vec![32],
            latent_channels: 256,
            quantizer: QuantizerKind::Nearest,
            codebook_size: 8192,
            code_dim: 256,
            fsq_levels: Vec::new(),
            l2_normalize: false,
            commitment: 0.25,
            legacy_beta: false,
            codebook_decay: 0.0,
            entropy_weight: 0.0,
            l1_weight: 0.0,
            l2_weight: 1.0,
            restart_after: 0,
            channel_permutation: 0.0,
            kl_weight: 5e-4,
            temperature: [1.0, 0.0625],
            temperature_steps: 100_000,
            kl_steps: 0,
            perceptual: String::new(),
            perceptual_weight: 0.0,
            perceptual_start: 0,
            adversarial_weight: 0.0,
            adversarial_start: 0,
            adversarial_loss: AdversarialLoss::Hinge,
            discriminator_channels: 64,
            discriminator_layers: 3,
            discriminator_ceiling: 1.0,
            lecam_weight: 0.0,
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            layers: 24,
            hidden: 1024,
            heads: 16,
            mlp_ratio: 4,
            attention: AttentionKind::Sparse,
            row_extent: RowExtent::Window,
            conv_border: ConvBorder::Clip,
            conv_size: 11,
            qk_norm: false,
            sandwich_norm: false,
        }
    }
}
