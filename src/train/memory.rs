//! GPU memory, traffic and time per step by ZeRO stage, with and without offload, by formula (paper §3.2).
//!
//! With Ψ parameters, N GPUs and g bytes a gradient (4), bytes a parameter are `2 + g + 12/N` at stage 1,
//! `2 + (g + 12)/N` at stage 2 and `(2 + g + 12)/N` at stage 3: bf16 weights, gradients, and 12 of fp32 master weights and
//! two moments (arXiv 1910.02054). Offload moves the 12 to the host. Stages 2 and 3 also need a working set for one
//! segment: its gradients, the copy that is sent, and (stage 3) its gathered weights. The moving average and activations
//! are added.

use super::sizes::{Shares, Sizes};
use crate::{
    config::{Config, Offload, Precision},
    runtime::Kernels,
};
use serde::Serialize;

/// Bytes per gradient: gradients are summed in fp32.
const GRADIENT: u64 = 4;

/// Bytes reserved on each GPU for the driver, libraries and fragmentation.
pub const RESERVE: u64 = 1_000_000_000;

/// The GPUs of a plan.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cluster {
    pub gpus: usize,
    /// Memory of one GPU.
    pub memory_bytes: u64,
    /// Peak of one GPU in TFLOP/s.
    pub tflops: f64,
    /// Model FLOPs utilisation (MFU).
    pub mfu: f64,
}

/// Bytes on one GPU by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Kinds {
    /// Weights that matrix products read.
    pub weights: u64,
    pub gradients: u64,
    /// fp32 master weights and moments.
    pub optimizer: u64,
    /// One segment's gathered weights and gradients.
    pub working_set: u64,
    /// Buffers in flight, which ZeRO's formulas leave out: the weights of the next segment (stage 3), and copies of the
    /// gradients of one segment as they are sent and received (stages 0 and 1).
    pub under_way: u64,
    /// fp32 moving average of the weights.
    pub average: u64,
    /// Of the largest micro-batch; `None` for tasks without a formula (image tokenizers).
    pub activations: Option<u64>,
}

impl Kinds {
    /// The model states that ZeRO counts: without buffers in flight, moving average and activations.
    pub fn states(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.working_set
    }

    /// All of them: the states, buffers in flight, the moving average and the activations.
    pub fn total(&self) -> u64 {
        self.states() + self.under_way + self.average + self.activations.unwrap_or(0)
    }
}

/// One stage with or without offload.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub stage: u8,
    /// Whether optimizer state and moving average are in host memory.
    pub offload: bool,
    /// On the GPU with the largest shard.
    pub kinds: Kinds,
    pub states_bytes: u64,
    pub total_bytes: u64,
    /// Host memory per GPU.
    pub host_bytes: u64,
    /// Bytes that one GPU sends per step.
    pub traffic_bytes: u64,
    /// Whether they fit beside [`RESERVE`].
    pub fits: bool,
}

/// The training settings that a row depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub stage: u8,
    pub offload: bool,
    pub activation_checkpointing: usize,
    pub accumulation: usize,
}

impl Settings {
    /// Those of the configuration.
    pub fn of(config: &Config) -> Self {
        let train = &config.train;
        Self {
            stage: train.zero_stage,
            offload: train.offload != Offload::None,
            activation_checkpointing: train.activation_checkpointing,
            accumulation: train.accumulation,
        }
    }
}

/// A configuration, its sizes, and the shards of each GPU.
pub struct Memory<'a> {
    config: &'a Config,
    sizes: &'a Sizes,
    shares: Shares,
}

impl<'a> Memory<'a> {
    /// A configuration on this number of GPUs, one rank each.
    pub fn new(config: &'a Config, sizes: &'a Sizes, gpus: usize) -> Self {
        Self { config, sizes, shares: sizes.shares(config, gpus) }
    }

    /// How many elements each GPU owns if everything is sharded.
    pub fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Bytes per weight that matrix products read.
    fn weight(&self) -> u64 {
        match self.config.train.precision {
            Precision::Bf16 | Precision::F16 => 2,
            Precision::F32 => 4,
        }
    }

    /// Elements that a GPU owns, those of them whose optimizer state it holds, and how many of these Muon updates.
    fn owned(&self, stage: u8) -> (u64, u64, u64) {
        let Shares { largest, largest_trained, muons, all_muons, .. } = self.shares;
        match stage {
            0 => (self.shares.total(), self.shares.trained(), all_muons),
            _ => (largest, largest_trained, muons),
        }
    }

    /// Bytes by kind on the GPU with the largest shard.
    pub fn kinds(&self, settings: Settings) -> Kinds {
        let (total, (owned, trained, muons)) = (self.shares.total(), self.owned(settings.stage));
        let (weight, unit, trained_unit) =
            (self.weight(), self.shares.largest_unit(), self.shares.largest_trained_unit());
        let (split, whole) = (settings.stage, settings.stage < 3);
        // Variables are copies of them, in f32 too.
        let master = 4 * trained;
        let average = if self.config.train.ema_decay > 0.0 { 4 * trained } else { 0 };
        let on_gpu = |bytes: u64| if settings.offload { 0 } else { bytes };
        let under_way = match split {
            _ if self.shares.world_size == 1 => 0,
            0 | 1 => 2 * GRADIENT * trained_unit,
            3 if self.config.train.overlap => weight * unit,
            _ => 0,
        };
        let gradients_of_unit = if split >= 2 { 2 * GRADIENT * trained_unit } else { 0 };
        Kinds {
            weights: weight * if whole { total } else { owned },
            gradients: GRADIENT * if split >= 2 { trained } else { self.shares.trained() },
            optimizer: on_gpu(master + 8 * trained - 4 * muons),
            working_set: gradients_of_unit + if whole { 0 } else { weight * unit },
            under_way,
            average: on_gpu(average),
            // The default: the others have not run on a GPU yet.
            activations: self.activations(settings, Kernels::Stock),
        }
    }

    /// Of the largest micro-batch of any GPU, with these kernels.
    pub fn activations(&self, settings: Settings, kernels: Kernels) -> Option<u64> {
        let mut config = self.config.clone();
        config.train.accumulation = settings.accumulation;
        let all = self.sizes.micro_batches(&config, self.shares.world_size);
        all.iter().map(|micro| micro.most_on_device(&config, kernels, settings.activation_checkpointing)).max()
    }

    /// Host memory per GPU: fp32 master weights, their bf16 copy, moments and moving average.
    fn host(&self, settings: Settings) -> u64 {
        let (owned, trained, muons) = self.owned(settings.stage);
        let average = if self.config.train.ema_decay > 0.0 { 4 } else { 0 };
        let rounded = self.sizes.rounds_weights() && self.config.train.precision == Precision::Bf16;
        let copy = if rounded { 2 } else { 0 };
        // Where weights are freed after use, those of a frozen model are kept too.
        let frozen = if settings.stage == 3 { (4 + copy) * (owned - trained) } else { 0 };
        if settings.offload { (12 + copy + average) * trained - 4 * muons + frozen } else { 0 }
    }

    /// Forward and backward passes per step.
    pub fn micro_steps(&self) -> u64 {
        self.sizes.micro_steps(self.config, self.shares.world_size)
    }

    /// Bytes that a GPU sends per step. Of N parts it keeps its own. With replicas (HSDP) it also sends the gradients it
    /// owns to the other replicas. Gradients are sent as fp32, and weights as bf16 if linear layers round them.
    fn traffic(&self, stage: u8) -> u64 {
        // Reduce-scatters of gradients, and all-gathers of weights (stage 0: of gradients).
        let (sums, weights) = match stage {
            0 | 1 => (1, 1),
            2 => (self.micro_steps(), 1),
            _ => (self.micro_steps(), 2 * self.micro_steps()),
        };
        let weight = match self.config.train.precision {
            Precision::Bf16 if stage > 0 && self.sizes.rounds_weights() => 2,
            _ => 4,
        };
        let product = |each: u64, elements: u64| u128::from(each) * u128::from(elements);
        let bytes = |of_all: u128, ranks: usize| of_all * (ranks as u128 - 1) / ranks as u128;
        let Shares { world_size, ranks, largest_trained, .. } = self.shares;
        let (world_size, ranks) = (world_size.max(1), ranks.max(1));
        let trained = self.shares.trained();
        let gathered = if stage == 3 { self.shares.total() } else { trained };
        let of_all = product(GRADIENT * sums, trained) + product(weight * weights, gathered);
        let all = match stage {
            0 => bytes(of_all, world_size),
            _ => {
                let replicas = (world_size / ranks).max(1);
                bytes(of_all, ranks) + bytes(product(2 * GRADIENT * sums, largest_trained), replicas)
            }
        };
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    /// Bytes, traffic and whether they fit.
    pub fn row(&self, settings: Settings, memory_bytes: u64) -> Row {
        let kinds = self.kinds(settings);
        Row {
            stage: settings.stage,
            offload: settings.offload,
            kinds,
            states_bytes: kinds.states(),
            total_bytes: kinds.total(),
            host_bytes: self.host(settings),
            traffic_bytes: self.traffic(settings.stage),
            fits: kinds.total() + RESERVE <= memory_bytes,
        }
    }

    /// FLOPs per step without recomputation.
    pub fn flops(&self) -> f64 {
        self.sizes.spec.flops(self.config, &self.sizes.inputs)
    }

    /// Seconds per step, communication not counted.
    pub fn seconds(&self, cluster: &Cluster) -> f64 {
        self.flops() / (cluster.gpus as f64 * cluster.tflops * 1e12 * cluster.mfu)
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
