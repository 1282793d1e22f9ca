//! The section `[train]` of a configuration.

use serde::{Deserialize, Serialize};

/// Section `[train]`: optimizer, schedule, parallelism and checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Model folder (or `demo`) whose weights a new run starts from. Empty (default): random weights.
    pub init_from: String,
    /// Parameters to freeze: full names, or prefixes of names that end before a dot. Default: none.
    pub freeze: Vec<String>,
    /// Number of optimizer steps. Default 100000.
    pub steps: u64,
    /// Samples per step: images (task `image-tokenizer`), text→image sequences (task `generator`; 0: none) or pairs (task
    /// `matcher`). Default 64.
    pub batch_size: usize,
    /// image→text sequences per step (task `generator`). Default 64.
    pub caption_batch_size: usize,
    /// Visual question answering: image and question→answer sequences per step (task `generator`). 0 (default): none.
    pub vqa_batch_size: usize,
    /// Gradient accumulation: number of micro-batches that a step's samples are split into. Default 1.
    pub accumulation: usize,
    /// Weight of the text→image loss. Default 1.
    pub image_loss_weight: f64,
    /// Weight of the image→text loss. Default 1.
    pub text_loss_weight: f64,
    /// Weight of the loss of answers. Default 1.
    pub answer_loss_weight: f64,
    /// How the losses of a batch's target tokens are combined, for each direction: `mean` (default) or `sum`.
    pub loss_reduction: LossReduction,
    /// Share of text→image samples whose text is dropped, for classifier-free guidance. Default 0.1.
    pub condition_dropout: f64,
    /// Optimizer of the transformer's weight matrices: `adamw` (default) or `muon`. Other parameters always use AdamW.
    pub matrix_optimizer: MatrixOptimizer,
    /// Peak learning rate of AdamW. Default 4.5e-4.
    pub learning_rate: f64,
    /// Peak learning rate of Muon. Default 0.02.
    pub muon_learning_rate: f64,
    /// AdamW's decay rates of the first and second moment. Default [0.9, 0.96].
    pub betas: [f64; 2],
    /// Decoupled weight decay of weight matrices; biases, norms and embeddings have none. Default 0.045.
    pub weight_decay: f64,
    /// Steps of linear warm-up. Default: 1000, but at most a tenth of `steps`.
    pub warmup_steps: u64,
    /// Shape of the learning rate decay: `cosine` (default) or `linear`.
    pub decay: Decay,
    /// Share of the steps after which the decay begins. Default 0.
    pub decay_start: f64,
    /// Final learning rate as a share of the peak. Default 0: the rate would reach 0 one step after the last.
    pub final_lr_ratio: f64,
    /// Maximum global norm of the gradient; larger gradients are clipped. 0: no clipping. Default 4.
    pub clip_norm: f64,
    /// Decay per step of the moving average (EMA) of the weights. 0: no EMA. Default 0.999.
    pub ema_decay: f64,
    /// Activation checkpointing: recompute the activations of every k-th segment in the backward pass (0: none, 1:
    /// all). Default 0.
    #[serde(alias = "recompute")]
    pub activation_checkpointing: usize,
    /// ZeRO stage, what is sharded over the ranks: 0 nothing, 1 (default) optimizer state, 2 also gradients, 3 also
    /// weights.
    #[serde(alias = "shard_stage")]
    pub zero_stage: u8,
    /// Ranks per shard group (HSDP): state is sharded within a group of this many consecutive ranks and replicated
    /// across groups. 0 (default): shard over all ranks.
    #[serde(alias = "shard_ranks")]
    pub hsdp_shard_size: usize,
    /// Overlap communication with computation. Results are bit-equal either way. Default true.
    pub overlap: bool,
    /// Where optimizer state (moments, EMA and, on GPUs and at stage 3, master weights) is stored and updated: `none` (on
    /// the device), `cpu` (default) or `disk`.
    pub offload: Offload,
    /// Timeout of collectives: seconds that a rank waits for the others before the run ends with an error. Default 600.
    pub rank_timeout: u64,
    /// Number format of matrix products: `f32` (default), `bf16` or `f16`. Weights, gradients and sums stay f32.
    pub precision: Precision,
    /// What to do about a step whose loss or gradient norm is more than 6 standard deviations above the recent mean.
    /// Default `ignore`.
    pub spike: Spike,
    /// Steps between checkpoints. Default 1000.
    pub checkpoint_every: u64,
    /// Write checkpoints in the background, from a copy of the state in memory; otherwise training waits. Default true.
    pub background_checkpoints: bool,
    /// Number of newest checkpoints to keep, at least 2. Default 2.
    pub keep_checkpoints: usize,
    /// Steps between sample images. 0: none. Default 1000.
    pub sample_every: u64,
    /// Steps between measurements of the losses of `data.validation`. 0: none. Default 1000.
    pub validate_every: u64,
    /// Number of batches of each measurement, of the sizes of a step's; the same samples each time. Default 8.
    pub validation_batches: u64,
    /// Print progress every this many steps; metrics.jsonl always has a line for each step. Default 1.
    pub log_every: u64,
    /// Peak of a rank's device in TFLOP/s, for the model FLOPs utilization (MFU) in the log. 0 (default): that of the GPU's
    /// model in `precision`; no MFU for other GPUs and on CPUs.
    pub peak_tflops: f64,
    /// Also write the metrics of each step and the sample images to event files of TensorBoard, in the run folder. Default
    /// false.
    pub tensorboard: bool,
}

impl Train {
    /// Keys that a resumed run may change: no result of a finished step depends on them.
    pub(super) const FREE_AT_RESUME: &[&str] = &[
        "steps",
        "accumulation",
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
        "validate_every",
        "validation_batches",
        "log_every",
        "peak_tflops",
        "tensorboard",
    ];

    /// Samples per step of each kind of sequence that a generator learns: text→image, image→text, answers.
    pub fn generator_batches(&self) -> [usize; 3] {
        [self.batch_size, self.caption_batch_size, self.vqa_batch_size]
    }

    /// Whether the parameter of this name stays as it is.
    pub fn freezes(&self, name: &str) -> bool {
        self.freeze.iter().any(|part| begins_with(name, part))
    }
}

/// Whether `part` is the full name of a parameter, or a prefix of it that ends before a dot.
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
            vqa_batch_size: 0,
            accumulation: 1,
            image_loss_weight: 1.0,
            text_loss_weight: 1.0,
            answer_loss_weight: 1.0,
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
            validate_every: 1000,
            validation_batches: 8,
            log_every: 1,
            peak_tflops: 0.0,
            tensorboard: false,
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

/// Optimizer of the matrices in transformer blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MatrixOptimizer {
    /// AdamW (arXiv 1711.05101), as for all other parameters.
    Adamw,
    /// Momentum orthogonalized by Newton-Schulz iterations (Muon).
    Muon,
}

/// Where optimizer state is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offload {
    /// In the memory of the device that computes: on a GPU, where it also updates the weights. On a CPU as `cpu`.
    None,
    /// In RAM.
    Cpu,
    /// In memory-mapped files in the run folder.
    Disk,
}

/// What happens to a step whose loss or gradient norm is far above the recent mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spike {
    /// Train on it as on any other step.
    Ignore,
    /// Skip the update of this step.
    Skip,
    /// Go back to the newest checkpoint and continue with the samples after the spike.
    RollBack,
}

/// How the learning rate falls at the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// As half a cosine: flat at its start and at its end.
    Cosine,
    /// In a straight line.
    Linear,
}

/// Number format of the factors of matrix products; sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    F32,
    /// Rounded to bf16 where the processor has fast bf16 instructions (AVX-512 BF16 of AMD, or AMX with `--amx`), else
    /// f32.
    Bf16,
    /// Rounded to f16, with loss scaling so that small gradients do not underflow. For GPUs without bf16; on the CPU it
    /// is slower than f32 and only useful to try a recipe.
    F16,
}

impl Precision {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}
