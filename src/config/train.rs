//! The part `[train]` of a configuration.

use serde::{Deserialize, Serialize};

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Model folder (or `demo`) whose weights a new run starts from; empty: random weights.
    pub init_from: String,
    /// Parameters to freeze: full names, or prefixes of names that end before a dot.
    pub freeze: Vec<String>,
    /// Optimizer steps.
    pub steps: u64,
    /// Samples a step: images (image tokenizer) or text→image sequences (generator).
    pub batch_size: usize,
    /// image→text sequences a step (generator).
    pub caption_batch_size: usize,
    /// Gradient accumulation: number of micro-batches a step's samples are split into.
    pub accumulation: usize,
    /// Weight of the text→image loss.
    pub image_loss_weight: f64,
    /// Weight of the image→text loss.
    pub text_loss_weight: f64,
    /// How the losses of a batch's target tokens are combined, for each direction.
    pub loss_reduction: LossReduction,
    /// Share of text→image samples whose text is dropped, for classifier-free guidance.
    pub condition_dropout: f64,
    /// Optimizer of the transformer's matrices; everything else is AdamW's.
    pub matrix_optimizer: MatrixOptimizer,
    /// Peak learning rate of AdamW.
    pub learning_rate: f64,
    /// Peak learning rate of Muon.
    pub muon_learning_rate: f64,
    /// AdamW's decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Decoupled weight decay of matrices; biases, norms and embeddings have none.
    pub weight_decay: f64,
    /// Steps of linear warm-up. Where a file does not give it: 1000, but at most a tenth of `steps`.
    pub warmup_steps: u64,
    /// Shape of the decay.
    pub decay: Decay,
    /// Share of the steps after which the decay begins.
    pub decay_start: f64,
    /// Final learning rate as a share of the peak. With 0, the rate would reach 0 one step after the last.
    pub final_lr_ratio: f64,
    /// The gradient's global norm is clipped to this; 0 turns clipping off.
    pub clip_norm: f64,
    /// Decay a step of the moving average of the weights; 0 turns it off.
    pub ema_decay: f64,
    /// Activation checkpointing: recompute the activations of every k-th segment in the backward pass (0: none, 1: all).
    #[serde(alias = "recompute")]
    pub activation_checkpointing: usize,
    /// ZeRO stage, what is sharded over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.
    #[serde(alias = "shard_stage")]
    pub zero_stage: u8,
    /// Ranks per shard group (HSDP): state is sharded within a group of this many consecutive ranks and replicated across
    /// groups; 0: sharded over all ranks.
    #[serde(alias = "shard_ranks")]
    pub hsdp_shard_size: usize,
    /// Overlap communication with computation; the results are bit-equal either way.
    pub overlap: bool,
    /// Where optimizer state (moments, moving average and, at stage 3, master weights) is stored.
    pub offload: Offload,
    /// Seconds a rank waits for the others before the run ends with an error.
    pub rank_timeout: u64,
    /// Precision of matrix products; weights, gradients and sums stay f32.
    pub precision: Precision,
    /// What to do about a step whose loss or gradient norm is more than 6 standard deviations above the recent mean.
    pub spike: Spike,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Write checkpoints in the background, from a copy of the state in memory; otherwise training waits.
    pub background_checkpoints: bool,
    /// Number of newest checkpoints to keep; at least 2.
    pub keep_checkpoints: usize,
    /// Steps between sample images; 0: none.
    pub sample_every: u64,
    /// Print a line every this many steps; metrics.jsonl has a line for each step.
    pub log_every: u64,
}

impl Train {
    /// Keys that a resumed run may change: no result of a finished step depends on them.
    pub(super) const FREE_AT_RESUME: &[&str] = &[
        "steps",
        "activation_checkpointing",
        "zero_stage",
        "hsdp_shard_size",
        "overlap",
        "offload",
        "rank_timeout",
        "checkpoint_every",
        "background_checkpoints",
        "keep_checkpoints",
        "sample_every",
        "log_every",
    ];

    /// Whether the parameter of this name stays as it is.
    pub fn freezes(&self, name: &str) -> bool {
        self.freeze.iter().any(|part| begins_with(name, part))
    }
}

/// Whether `part` is the name of a parameter, or what it begins with up to a dot.
pub fn begins_with(name: &str, part: &str) -> bool {
    name.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Default for Train {
    fn default() -> Self {
        Self {
            init_from: String::new(),
            freeze: Vec::new(),
            steps: 100_000,
            batch_size: 64,
            caption_batch_size: 64,
            accumulation: 1,
            image_loss_weight: 1.0,
            text_loss_weight: 1.0,
            loss_reduction: LossReduction::Mean,
            condition_dropout: 0.1,
            matrix_optimizer: MatrixOptimizer::Adamw,
            learning_rate: 4.5e-4,
            muon_learning_rate: 0.02,
            betas: [0.9, 0.96],
            weight_decay: 0.045,
            warmup_steps: 1000,
            decay: Decay::Cosine,
            decay_start: 0.0,
            final_lr_ratio: 0.0,
            clip_norm: 4.0,
            ema_decay: 0.999,
            activation_checkpointing: 0,
            zero_stage: 1,
            hsdp_shard_size: 0,
            overlap: true,
            offload: Offload::Cpu,
            rank_timeout: 600,
            precision: Precision::F32,
            spike: Spike::Ignore,
            checkpoint_every: 1000,
            background_checkpoints: true,
            keep_checkpoints: 2,
            sample_every: 1000,
            log_every: 1,
        }
    }
}

/// How the losses of a batch's target tokens are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossReduction {
    /// The mean over all target tokens of the batch (our default).
    Mean,
    /// The sum over each sequence's tokens, averaged over the sequences of the batch (the paper's loss, §2.2).
    Sum,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MatrixOptimizer {
    Adamw,
    /// Momentum, orthogonalised by Newton-Schulz iterations.
    Muon,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offload {
    /// In the host's memory.
    Cpu,
    /// In files of the run's folder, mapped into memory.
    Disk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spike {
    Ignore,
    /// Its update is left out.
    Skip,
    /// The run goes back to the newest checkpoint and on with the samples after it.
    RollBack,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    Cosine,
    Linear,
}

/// The numbers that matrix products multiply; they add up in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    F32,
    /// Rounded to bf16 where the processor multiplies it faster (AVX-512 BF16 of AMD, or AMX with `--amx`); f32 elsewhere.
    Bf16,
    /// Rounded to f16, with the loss scaled so that gradients keep their bits: what GPUs without bf16 want. On the CPU it
    /// is slower than f32, for trying a recipe.
    F16,
}

impl Precision {
    /// As the configuration names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}
