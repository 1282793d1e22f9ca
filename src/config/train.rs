//! The part `[train]` of a configuration.

use serde::{Deserialize, Serialize};

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Model folder (or `demo`) whose weights a new run starts from; empty: random weights.
    pub init_from: String,
    /// Parameters that stay as they are: names, or what names begin with, up to a dot.
    pub freeze: Vec<String>,
    /// Optimizer steps.
    pub steps: u64,
    /// Samples a step: pictures (image tokenizer) or text→image sequences (generator).
    pub batch_size: usize,
    /// image→text sequences a step (generator).
    pub caption_batch_size: usize,
    /// Parts into which a step's samples are cut; their gradients add up to the whole batch's.
    pub accumulation: usize,
    /// Weight of the text→image loss.
    pub image_loss_weight: f64,
    /// Weight of the image→text loss.
    pub text_loss_weight: f64,
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
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Shape of the decay.
    pub decay: Decay,
    /// Share of the steps after which the decay begins.
    pub decay_start: f64,
    /// Final learning rate as a share of the peak.
    pub final_lr_ratio: f64,
    /// The gradient's global norm is clipped to this; 0 turns clipping off.
    pub clip_norm: f64,
    /// Decay a step of the moving average of the weights; 0 turns it off.
    pub ema_decay: f64,
    /// Every so-manieth segment forgets its activations and runs forward again in the backward pass: 1 all, 0 none.
    pub recompute: usize,
    /// What several ranks split among them: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights.
    pub shard_stage: u8,
    /// So many ranks after another split a replica among them, and the replicas are alike; 0: all ranks split one.
    pub shard_ranks: usize,
    /// Move weights and gradients between ranks while segments compute; the bits are the same either way.
    pub overlap: bool,
    /// Where the state lies that only the optimizer touches: moments, moving average and, at stage 3, the weights.
    pub offload: Offload,
    /// Seconds that a rank waits for the others before the run ends.
    pub rank_timeout: u64,
    /// Of matrix products; weights, gradients and sums stay f32.
    pub precision: Precision,
    /// What is done about a step whose loss or gradient norm is far above those before (6 standard deviations).
    pub spike: Spike,
    /// A checkpoint every so many steps.
    pub checkpoint_every: u64,
    /// Write checkpoints beside training, from a copy of the state in memory; otherwise training waits.
    pub background_checkpoints: bool,
    /// Newest checkpoints that are kept; at least 2.
    pub keep_checkpoints: usize,
    /// Sample pictures every so many steps; 0 turns them off.
    pub sample_every: u64,
}

impl Train {
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
            recompute: 0,
            shard_stage: 1,
            shard_ranks: 0,
            overlap: true,
            offload: Offload::Cpu,
            rank_timeout: 600,
            precision: Precision::F32,
            spike: Spike::Ignore,
            checkpoint_every: 1000,
            background_checkpoints: true,
            keep_checkpoints: 2,
            sample_every: 1000,
        }
    }
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
