//! The configuration: one file describes a run, and the same file lies in every model folder.
//!
//! Order of precedence: defaults < file < `--set key=value`. Unknown keys are errors.

mod flat;
mod load;
mod renamed;
mod train;
mod validate;

pub use flat::values;
pub use load::{Loaded, Origin};
pub use renamed::rename_stored_keys;
pub use train::{Decay, LossReduction, MatrixOptimizer, Offload, Precision, Spike, Train, begins_with};
pub use validate::Problem;

use serde::{Deserialize, Serialize};

/// A whole configuration (`configs/*.toml`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the run; its folder is `runs/NAME`.
    pub name: String,
    /// What is trained.
    pub task: Task,
    /// Seed of every random number of the run.
    pub seed: u64,
    /// Where the samples come from.
    pub data: Data,
    /// The text side.
    pub text: Text,
    /// The image tokenizer (paper §2.1).
    pub image_tokenizer: ImageTokenizer,
    /// The transformer (paper §2.2).
    pub model: Model,
    /// The training loop.
    pub train: Train,
    /// Defaults of `vilg t2i` and of the sample images drawn while training.
    pub sample: Sample,
}

impl Config {
    /// Whether a resumed run may change the key `section.key` (or `key`, or all of a `section`): no result of a finished
    /// step depends on it. Of vocabulary and image tokenizer, digests are compared instead of paths.
    pub fn is_free_at_resume(name: &str) -> bool {
        match name.split_once('.') {
            None => ["name", "sample"].contains(&name),
            Some(("data", key)) => Data::FREE_AT_RESUME.contains(&key),
            Some(("text", key)) => key == "vocab",
            Some(("image_tokenizer", key)) => key == "path",
            Some(("train", key)) => Train::FREE_AT_RESUME.contains(&key),
            Some(_) => false,
        }
    }
}

/// What `vilg train` trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// The VQGAN: pixels to codes and back.
    ImageTokenizer,
    /// The bidirectional transformer over text tokens and image codes.
    Generator,
}

/// Where samples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Sources that are mixed.
    pub sources: Vec<Source>,
    /// Batches to read ahead.
    pub prefetch: usize,
    /// Reader threads.
    pub workers: usize,
    /// The run ends when more than this share of the samples read so far was bad.
    pub max_bad_ratio: f64,
}

impl Data {
    /// Keys that a resumed run may change: the order of the samples does not depend on them.
    const FREE_AT_RESUME: &[&str] = &["prefetch", "workers", "max_bad_ratio"];
}

/// One source of samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Tar shards (`dir/{00000..00012}.tar`, `dir/*.tar`), a folder of shards, or a folder of
    /// image + `.txt` pairs.
    pub path: String,
    /// How often an epoch shows each of its samples (0.25: a different quarter of them each epoch).
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// The text side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Text {
    /// WordPiece vocabulary file with one token a line, or `demo`: that of the embedded model.
    pub vocab: String,
    /// Text positions: `[CLS]`, tokens, `[SEP]`; longer captions are cut.
    pub max_tokens: usize,
}

/// The image tokenizer: a VQGAN with the names and shapes of taming-transformers, or DALL-E's dVAE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageTokenizer {
    /// Model folder of a trained tokenizer, or `demo` (task `generator` only; the other keys are then read from there).
    pub path: String,
    /// Encoder and decoder.
    pub architecture: Architecture,
    /// Side of the square image in pixels.
    pub image_size: usize,
    /// Channels of the first level.
    pub channels: usize,
    /// Channel multiplier of each level; each level but the last halves the side, so f = 2^(levels-1).
    pub channel_multipliers: Vec<usize>,
    /// Residual blocks a level in the encoder (one more in the decoder).
    pub residual_blocks: usize,
    /// Sides (in feature pixels) at which each residual block is followed by self-attention.
    pub attention_sides: Vec<usize>,
    /// Channels between encoder and quantiser.
    pub latent_channels: usize,
    /// How latents become codes.
    pub quantizer: QuantizerKind,
    /// Number of codes.
    pub codebook_size: usize,
    /// Dimensions of a code.
    pub code_dim: usize,
    /// Levels of each dimension (quantiser `fsq`); their product is the number of codes.
    pub fsq_levels: Vec<u32>,
    /// Compare codes by cosine: both sides are l2-normalised.
    pub l2_normalize: bool,
    /// Weight of the commitment term (beta; eq. 2).
    pub commitment: f64,
    /// taming's `legacy` quantiser: beta weighs the codebook term instead of the commitment term.
    pub legacy_beta: bool,
    /// Each code is the mean of the latents that chose it, weighed down by this factor a step (quantiser `nearest`); 0: the
    /// codebook's gradients move it.
    pub codebook_decay: f64,
    /// Weight of the codes' entropy (MaskGIT's and MAGVIT-2's, arXiv 2310.05737, eq. 4): each latent is to be sure of its
    /// code, and all codes are to be chosen alike. Its memory is latents × codes.
    pub entropy_weight: f64,
    /// Weight of the absolute pixel error.
    pub l1_weight: f64,
    /// Weight of the squared pixel error (eq. 1).
    pub l2_weight: f64,
    /// A code unused for this many steps is replaced by an encoder output; 0 turns it off.
    pub restart_after: u64,
    /// Weight of the divergence from codes that are all as likely (quantiser `gumbel`).
    pub kl_weight: f64,
    /// First and last temperature of the relaxed choice (quantiser `gumbel`).
    pub temperature: [f64; 2],
    /// Steps over which the temperature falls, as half a cosine.
    pub temperature_steps: u64,
    /// Steps over which `kl_weight` rises linearly from 0 (DALL-E: 5000); 0: as many as `temperature_steps`.
    pub kl_steps: u64,
    /// Folder of the perceptual network (`vilg import lpips`).
    pub perceptual: String,
    /// Weight of the perceptual distance LPIPS; 0: none.
    pub perceptual_weight: f64,
    /// Step after which the perceptual distance counts: pixels alone are several times faster.
    pub perceptual_start: u64,
    /// Weight of the adversary before it is adapted (arXiv 2012.09841, eq. 7); 0: no discriminator.
    pub adversarial_weight: f64,
    /// Step after which the discriminator trains and takes part.
    pub adversarial_start: u64,
    /// The discriminator's loss.
    pub adversarial_loss: AdversarialLoss,
    /// Channels of the discriminator's first layer.
    pub discriminator_channels: usize,
    /// Layers of the discriminator that halve the side.
    pub discriminator_layers: usize,
    /// A discriminator that told more than this share of a step's patches rightly does not train in the next; 1: it always
    /// trains.
    pub discriminator_ceiling: f64,
    /// Weight of LeCam's regularisation of the discriminator (arXiv 2104.03310); 0: none.
    pub lecam_weight: f64,
}

/// Encoder and decoder of an image tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// VQGAN's (arXiv 2012.09841).
    Vqgan,
    /// DALL-E's (arXiv 2102.12092): the encoder gives logits, the decoder a distribution of pixels.
    Dvae,
}

/// How latents become codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizerKind {
    /// The nearest vector of a learned codebook.
    Nearest,
    /// A draw by logits, relaxed by a softmax in training.
    Gumbel,
    /// Each dimension rounded to a few levels; nothing is learned.
    Fsq,
}

/// How wrong a discriminator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdversarialLoss {
    /// Distance from 1 and -1.
    Hinge,
    /// Cross-entropy.
    Vanilla,
}

impl ImageTokenizer {
    /// Height and width of the grid of codes.
    pub fn grid(&self) -> (usize, usize) {
        let side = self.image_size >> self.channel_multipliers.len().saturating_sub(1);
        (side, side)
    }

    /// Whether means of latents move the codebook, and not its gradients.
    pub fn codebook_is_averaged(&self) -> bool {
        self.quantizer == QuantizerKind::Nearest && self.codebook_decay > 0.0
    }
}

/// The bidirectional transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Transformer layers.
    pub layers: usize,
    /// Hidden size.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Inner size of the feed-forward network, in hidden sizes.
    pub mlp_ratio: usize,
    /// `sparse`: row, column and conv layers by the paper's rule; `dense`: every layer dense.
    pub attention: AttentionKind,
    /// What a row layer sees.
    pub row_extent: RowExtent,
    /// What a conv layer sees at the left and right border.
    pub conv_border: ConvBorder,
    /// Side of the conv layer's neighbourhood; odd.
    pub conv_size: usize,
    /// LayerNorm on queries and keys (arXiv 2405.09818).
    pub qk_norm: bool,
    /// A second LayerNorm at the end of each residual branch (CogView, arXiv 2105.13290).
    pub sandwich_norm: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    Sparse,
    Dense,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowExtent {
    /// The `width` codes before the query in raster order, so up to the one straight above.
    Window,
    /// Only the query's own row.
    SameRow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConvBorder {
    /// The neighbourhood is cut at the border.
    Clip,
    /// The neighbourhood goes on in the row above or below, as raster order does.
    RasterWrap,
}

/// Sampling defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sample {
    /// Prompts of the sample images.
    pub prompts: Vec<String>,
    /// Divides the logits; lower is safer and plainer.
    pub temperature: f64,
    /// Only the K most likely codes are drawn; 0: all.
    pub top_k: usize,
    /// Only the most likely codes that make up this probability are drawn; 1: all.
    pub top_p: f64,
    /// Classifier-free guidance scale; 1: none.
    pub guidance: f64,
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
            train: Train::default(),
            sample: Sample::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self { sources: Vec::new(), prefetch: 4, workers: 1, max_bad_ratio: 0.05 }
    }
}

impl Default for Text {
    fn default() -> Self {
        Self { vocab: String::new(), max_tokens: 64 }
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

impl Default for Sample {
    fn default() -> Self {
        Self { prompts: Vec::new(), temperature: 1.0, top_k: 0, top_p: 1.0, guidance: 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_free_at_resume_exist() {
        let known: Vec<String> = values(&Config::default()).unwrap().into_iter().map(|(name, _)| name).collect();
        let keys = Train::FREE_AT_RESUME.iter().map(|key| format!("train.{key}"));
        for name in keys.chain(Data::FREE_AT_RESUME.iter().map(|key| format!("data.{key}"))) {
            assert!(known.contains(&name) && Config::is_free_at_resume(&name), "{name}");
        }
        for name in ["name", "text.vocab", "image_tokenizer.path"] {
            assert!(known.contains(&name.to_owned()) && Config::is_free_at_resume(name), "{name}");
        }
        for name in ["seed", "train.learning_rate", "data.sources", "model.layers", "text.max_tokens"] {
            assert!(!Config::is_free_at_resume(name), "{name}");
        }
    }
}
