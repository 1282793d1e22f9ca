//! Memory of a rank on the CPU in bytes, by kind and by moment of a step, by formula. All numbers are f32.
//!
//! It follows [`shards`](super::shards), [`optimizer`](super::optimizer), [`engine`](super::engine), [`state`](super::state)
//! and [`crate::model::activations`]. After a change there, make the same change here: `tests/it/memory.rs` compares the
//! formulas with the bytes that real steps allocate. Weights sent as bf16 are counted as f32. Not counted are the program
//! itself, prefetched batches and fragmentation: in small runs resident memory was 5 to 21 % above the formulas.

use super::sizes::{Shares, Sizes};
use crate::{
    config::{Config, Precision},
    model::activations::{Micro, Moment, Phase},
};
use serde::Serialize;

/// Bytes of a number.
const F32: u64 = 4;

/// Memory of the rank that holds most, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Held {
    pub stage: u8,
    /// Of all variables (stages 0 to 2) or of the owned part (stage 3).
    pub weights: u64,
    /// Of whole parameters; they stay allocated between steps (stages 0 and 1).
    pub gradients: u64,
    /// Gradients of the owned part, summed over the ranks (stages 1 to 3).
    pub sums: u64,
    pub moments: u64,
    pub average: u64,
    /// Peak within a step beside the above: activations and buffers, the gradients of a segment (stages 2 and 3), its
    /// weights (stage 3) and buffers of the collectives. `None` for tasks without a formula.
    pub working: Option<u64>,
    /// Peak of activations and their buffers alone.
    pub activations: Option<u64>,
    /// When the run starts: each rank makes all weights before they are sharded, unless the task can make only its part.
    pub start: u64,
    /// While a checkpoint is written: in the background a copy of the owned state, otherwise a copy of the owned weights.
    pub checkpoint: u64,
}

impl Held {
    /// Between steps.
    pub fn between_steps(&self) -> u64 {
        self.weights + self.gradients + self.sums + self.moments + self.average
    }

    /// Peak of a step.
    pub fn step(&self) -> u64 {
        self.between_steps() + self.working.unwrap_or(0)
    }

    /// Peak of a run.
    pub fn peak(&self) -> u64 {
        self.step().max(self.start).max(self.checkpoint)
    }
}

/// The memory of a rank at a ZeRO stage, for the number of ranks of `shares`.
pub fn held(config: &Config, sizes: &Sizes, shares: &Shares, stage: u8) -> Held {
    // One rank, or replicas of one: each rank owns everything.
    let stage = if shares.ranks == 1 { 0 } else { stage };
    let total = shares.total();
    let (owned, trained, muons) = match stage {
        0 => (total, shares.trained(), shares.all_muons),
        _ => (shares.largest, shares.largest_trained, shares.muons),
    };
    let averaged = config.train.ema_decay > 0.0;
    let mut held = Held {
        stage,
        weights: F32 * if stage == 3 { owned } else { total },
        gradients: F32 * if stage < 2 { shares.trained() } else { 0 },
        sums: F32 * if stage == 0 { 0 } else { trained },
        moments: F32 * (2 * trained - muons),
        average: F32 * if averaged { trained } else { 0 },
        working: None,
        activations: None,
        start: 0,
        checkpoint: 0,
    };
    let micro: Vec<Micro> = sizes.micro_batches(config, shares.world_size);
    let copied = match config.train.precision {
        Precision::F32 => 0,
        Precision::Bf16 => 2,
        Precision::F16 => 4,
    };
    let moments =
        micro.into_iter().flat_map(|m| Micro { copied, ..m }.moments(config, config.train.activation_checkpointing));
    for moment in moments {
        held.activations = held.activations.max(Some(moment.activations));
        held.working = held.working.max(Some(moment.activations + moved(&moment, shares, stage, config.train.overlap)));
    }
    held.working = held.working.map(|working| working.max(update(shares, stage)));
    held.start = match stage {
        // The owned part, and at most one whole segment.
        3 if sizes.spec.starts_empty(config, shares.world_size) => F32 * (owned + shares.largest_unit()),
        // The whole model, and the copy of the owned part that stage 3 keeps.
        3 => F32 * (total + owned),
        _ => F32 * total,
    };
    // The base of adapters is not in their checkpoints.
    let stored = F32 * if config.lora.is_on() { trained } else { owned };
    let state = stored + held.moments + held.average;
    held.checkpoint = match config.train.background_checkpoints {
        true => held.step() + state,
        false => held.between_steps() + stored,
    };
    held
}

/// Bytes that collectives and sharded segments add to the activations of a moment.
fn moved(moment: &Moment, shares: &Shares, stage: u8, overlap: bool) -> u64 {
    let of = |sizes: &[u64], segment: Option<usize>| segment.and_then(|i| sizes.get(i)).copied().unwrap_or(0);
    let size = |segment| of(&shares.parameter_groups, segment);
    let trained = |segment| of(&shares.trained_groups, segment);
    let part = |elements: u64| elements.div_ceil(shares.ranks.max(1) as u64);
    let (unit, trained_unit) = (size(Some(moment.segment)), trained(Some(moment.segment)));
    let gradients = moment.gradients.min(trained_unit);
    let weights = if stage == 3 { unit } else { 0 };
    let here = match moment.phase {
        // The part that this rank sends, and the gathered weights.
        Phase::Gather => weights + part(weights),
        Phase::Pass if stage >= 2 => weights + gradients,
        Phase::Pass => moment.aside,
        // The weights are freed. Left are the gradients, the copy that is sent and the sum of this rank's part.
        Phase::Reduce if stage >= 2 => 2 * gradients + part(trained_unit),
        Phase::Reduce => 0,
    };
    // In the backward pass: the copy of the gradients of the segment after this one, and this rank's part of the weights
    // of the segment before it.
    let last = trained(moment.segment.checked_add(1));
    let next = if stage == 3 { part(size(moment.segment.checked_sub(1))) } else { 0 };
    let under_way = match moment.phase {
        _ if !overlap || shares.world_size == 1 => 0,
        Phase::Gather => last,
        Phase::Pass => last + next,
        // At stages 0 and 1: its own copy, in the last micro-batch of the step.
        Phase::Reduce if stage < 2 => trained_unit + part(trained_unit),
        Phase::Reduce => next,
    };
    F32 * (here + under_way)
}

/// Buffers at the end of a step: gradients that are sent once a step (stages 0 and 1), and those of Muon.
fn update(shares: &Shares, stage: u8) -> u64 {
    let unit = shares.largest_trained_unit();
    let sent = match stage {
        0 if shares.world_size > 1 => 2 * unit,
        1 => unit + unit.div_ceil(shares.ranks.max(1) as u64),
        _ => 0,
    };
    // Newton-Schulz: the direction, its square and two powers of that.
    F32 * sent.max(4 * shares.largest_muon)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Lora, MatrixOptimizer, Model, Train},
        dist::{self, Group},
        error::Result,
        model::Generator,
        nn::params::Scope,
        ops::{Buffer, Store},
        train::{
            optimizer::{self, Moments, Optimizer},
            shards::{Shards, names},
        },
    };
    use candle_core::{DType, Device};
    use std::time::Duration;

    fn config(matrix_optimizer: MatrixOptimizer, stage: u8) -> Config {
        let mut config = Config {
            model: Model { layers: 3, hidden: 16, heads: 2, qk_norm: true, ..Model::default() },
            train: Train { matrix_optimizer, zero_stage: stage, ..Train::default() },
            ..Config::default()
        };
        config.text.max_tokens = 6;
        config.image_tokenizer.codebook_size = 11;
        config.image_tokenizer.image_size = 32;
        config
    }

    /// Elements of all weights, and of a real rank's weights, trained weights and moments.
    fn really(config: &Config, sizes: &Sizes, group: &Group) -> Result<[usize; 4]> {
        let scope = Scope::from_seed(0, DType::F32, &Device::Cpu);
        let grid = sizes.inputs.tokenizer.grid();
        let model =
            Generator::new(&scope, config, sizes.inputs.vocabulary, sizes.inputs.tokenizer.codebook_size, grid)?;
        let handling = |name: &str, attributes| optimizer::handling(&config.train, false, name, attributes);
        let shards = Shards::new(
            group,
            config.train.zero_stage,
            Store::Memory,
            &scope.params(),
            &names(&model.segments()),
            handling,
            |_| Ok(None),
        )?;
        let owned: usize = shards.owned().values().map(|range| range.len()).sum();
        let trained: usize = shards.trained().map(|(_, range)| range.len()).sum();
        let moments = Optimizer::new(&shards, &config.train)?.moments;
        let len = |buffer: &Buffer| buffer.values().map_or(0, |values| values.len());
        let moments = moments.values().map(|moments| match moments {
            Moments::AdamW { m, v } => len(m) + len(v),
            Moments::Muon { momentum } => len(momentum),
        });
        let all: usize = scope.params().values().map(|var| var.elem_count()).sum();
        Ok([all, owned, trained, moments.sum()])
    }

    #[test]
    fn what_stays_is_what_ranks_really_keep() {
        for (matrix_optimizer, stage, rank) in [
            (MatrixOptimizer::Adamw, 3, 0),
            (MatrixOptimizer::Muon, 3, 0),
            (MatrixOptimizer::Muon, 1, 0),
            (MatrixOptimizer::Adamw, 0, 0),
            (MatrixOptimizer::Muon, 0, 2),
            (MatrixOptimizer::Muon, 3, 2),
        ] {
            let mut config = config(matrix_optimizer, stage);
            config.lora = Lora { rank, ..Lora::default() };
            let sizes = Sizes::of(&config).unwrap().with_vocabulary(&config, 23).unwrap();
            for ranks in [1, 3] {
                let shares = sizes.shares(&config, ranks);
                let held = held(&config, &sizes, &shares, stage);
                let run = |group: &Group| really(&config, &sizes, group);
                let really = dist::launch(ranks, Duration::from_secs(60), run).unwrap();
                let most = |i: usize| really.iter().max_by_key(|held| held[i]).unwrap().map(|n| F32 * n as u64);
                let ([all, owned, ..], [_, _, trained, moments]) = (most(1), most(2));
                assert_eq!(shares.total() * F32, all);
                assert_eq!(held.weights, if held.stage == 3 { owned } else { all }, "{ranks} {stage}");
                assert_eq!(held.average, trained, "{ranks} {stage}");
                assert!(rank == 0 && trained == owned || rank > 0 && trained < owned / 2, "{ranks} {stage}");
                assert_eq!(held.moments, moments, "{ranks} {stage}");
            }
        }
    }

    #[test]
    fn stages_split_more_and_more() {
        let config = config(MatrixOptimizer::Adamw, 0);
        let sizes = Sizes::of(&config).unwrap();
        let shares = sizes.shares(&config, 4);
        let at = |stage| held(&config, &sizes, &shares, stage);
        let stays: Vec<u64> = (0..4).map(|stage| at(stage).between_steps()).collect();
        assert!(stays[1] < stays[0] && stays[2] < stays[1] && stays[3] < stays[2], "{stays:?}");
        assert!(at(3).working > at(0).activations && at(3).working > at(2).working);
        let alone = sizes.shares(&config, 1);
        assert_eq!(held(&config, &sizes, &alone, 3), held(&config, &sizes, &alone, 0));
    }
}
