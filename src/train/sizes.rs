//! The size of a run without its weights in memory: vocabulary, tokenizer, segments, shards, micro-batches.

use super::{
    inputs::Inputs,
    layout::{Entry, layout},
    optimizer,
    tasks::{self, Sequences, TaskSpec},
};
use crate::{
    config::Config,
    error::{Result, ensure, usage},
    model::activations::Micro,
    nn::{
        params::{Param, Params},
        pattern::Pattern,
    },
    ops::attention::blockwise,
};
use std::collections::BTreeSet;

/// A part of a model and its number of parameters.
pub type Part = (&'static str, u64);

/// The size of a model, with what a configuration takes from other files.
#[derive(Debug, Clone)]
pub struct Sizes {
    pub spec: &'static dyn TaskSpec,
    pub inputs: Inputs,
    /// The parameters of each segment, empty.
    groups: Vec<Params>,
}

impl Sizes {
    /// # Errors
    /// The tokenizer's folder exists and holds a bad configuration, or the sizes are impossible.
    pub fn of(config: &Config) -> Result<Self> {
        Self::of_task(tasks::spec(config.task), config)
    }

    /// The same for any task.
    ///
    /// # Errors
    /// As [`Sizes::of`].
    pub fn of_task(spec: &'static dyn TaskSpec, config: &Config) -> Result<Self> {
        Self::with_inputs(spec, config, Inputs::of(config, &spec.files(config))?)
    }

    fn with_inputs(spec: &'static dyn TaskSpec, config: &Config, inputs: Inputs) -> Result<Self> {
        let groups = spec.parameter_groups(config, &inputs)?;
        Ok(Self { spec, inputs, groups })
    }

    /// The same with a vocabulary of this size.
    ///
    /// # Errors
    /// The sizes are impossible.
    pub fn with_vocabulary(&self, config: &Config, vocabulary: usize) -> Result<Self> {
        Self::with_inputs(self.spec, config, Inputs { vocabulary, ..self.inputs.clone() })
    }

    /// Parameters by part of what the configuration trains; parts without any are left out.
    pub fn parts(&self) -> Vec<Part> {
        let parts = self.spec.parts();
        let (mut counts, mut adapters) = (vec![0; parts.len()], 0);
        let adapted = self.groups.iter().flatten().any(|(_, param)| param.attributes.base);
        for (name, param) in self.groups.iter().flatten() {
            let fit = |(part, prefixes): (usize, &&[&str])| {
                prefixes.iter().filter(|prefix| name.starts_with(**prefix)).map(|prefix| (prefix.len(), part)).max()
            };
            let prefixes = parts.iter().map(|(_, prefixes)| prefixes).enumerate();
            if adapted && !param.attributes.base {
                adapters += param.elem_count() as u64;
            } else if let Some((_, part)) = prefixes.filter_map(fit).max() {
                counts[part] += param.elem_count() as u64;
            }
        }
        let parts = parts.iter().map(|(name, _)| *name).zip(counts).chain([("low-rank adapters", adapters)]);
        parts.filter(|(_, count)| *count > 0).collect()
    }

    /// Whether linear layers round their weights to the compute precision.
    pub fn rounds_weights(&self) -> bool {
        self.groups.iter().flatten().any(|(_, param)| param.attributes.block_matrices.is_some())
    }

    /// The parameters of each segment as the shard layout sees them.
    fn parameter_groups(&self, config: &Config) -> Vec<Vec<Entry>> {
        let entry = |(name, param): (&String, &Param)| Entry {
            name: name.clone(),
            len: param.elem_count(),
            whole: optimizer::uses_muon(&config.train, param.attributes),
        };
        self.groups.iter().map(|group| group.iter().map(entry).collect()).collect()
    }

    /// The shards of each of `world_size` ranks, within a shard group (`train.hsdp_shard_size`).
    pub fn shares(&self, config: &Config, world_size: usize) -> Shares {
        let ranks = if config.train.hsdp_shard_size == 0 { world_size } else { config.train.hsdp_shard_size };
        let parameter_groups = self.parameter_groups(config);
        let all = self.groups.iter().flatten();
        let frozen = all.filter(|(name, p)| optimizer::handling(&config.train, false, name, p.attributes).frozen);
        let frozen: BTreeSet<&str> = frozen.map(|(name, _)| name.as_str()).collect();
        let lengths = |counts: &dyn Fn(&Entry) -> bool| -> Vec<u64> {
            let length = |unit: &Vec<Entry>| unit.iter().filter(|e| counts(e)).map(|e| e.len as u64).sum();
            parameter_groups.iter().map(length).collect()
        };
        let (mut owned, mut trained, mut muons) = (vec![0; ranks], vec![0; ranks], vec![0; ranks]);
        let whole = |unit: &[Entry], name: &str| unit.iter().any(|entry| entry.whole && entry.name == name);
        for (unit, pieces) in parameter_groups.iter().zip(layout(&parameter_groups, ranks)) {
            for (rank, piece) in pieces.iter().enumerate().flat_map(|(rank, p)| p.iter().map(move |p| (rank, p))) {
                let len = piece.range.len() as u64;
                owned[rank] += len;
                if !frozen.contains(piece.name.as_str()) {
                    trained[rank] += len;
                    muons[rank] += if whole(unit, &piece.name) { len } else { 0 };
                }
            }
        }
        let largest_whole =
            parameter_groups.iter().flatten().filter(|entry| entry.whole).map(|entry| entry.len as u64).max();
        let most = (0..ranks).max_by_key(|&rank| trained[rank]).unwrap_or(0);
        Shares {
            world_size,
            ranks,
            parameter_groups: lengths(&|_| true),
            trained_groups: lengths(&|entry| !frozen.contains(entry.name.as_str())),
            smallest: owned.iter().copied().min().unwrap_or(0),
            largest: owned.iter().copied().max().unwrap_or(0),
            largest_trained: trained.get(most).copied().unwrap_or(0),
            muons: muons.get(most).copied().unwrap_or(0),
            all_muons: muons.iter().sum(),
            largest_muon: largest_whole.unwrap_or(0),
        }
    }

    /// The largest micro-batch of a rank for each of [`TaskSpec::sequences`] that has a loss.
    pub fn micro_batches(&self, config: &Config, ranks: usize) -> Vec<Micro> {
        let accumulation = config.train.accumulation;
        let trained = self.spec.sequences(config, &self.inputs).into_iter().filter(|all| all.weight > 0.0);
        let micro = |Sequences { layout, outputs, batch_size, .. }: Sequences| {
            let samples = samples(batch_size, ranks, accumulation).1;
            Micro { layout, samples, outputs, bytes: 4, copied: 0, again: accumulation > 1 }
        };
        trained.map(micro).filter(|micro| micro.samples > 0).collect()
    }

    /// Bytes of the largest tensor of attention on a GPU, the f32 scores of a micro-batch, and of the n×n matrix that attention
    /// over all keys would need; `None` for tasks without sequences.
    pub fn attention_scores(&self, config: &Config, ranks: usize) -> Option<[u64; 2]> {
        let model = &config.model;
        let of_micro = |Micro { layout, samples, .. }: Micro| {
            let positions = layout.positions();
            let text = [layout.source_text().len()];
            let scores = |layer| {
                let keys = layout.keys(Pattern::of_layer(layer, model), &text);
                blockwise::scores(&keys.lists, positions)
            };
            let bytes = |scores: usize| (samples * model.heads * scores * 4) as u64;
            [bytes((1..=model.layers).map(scores).max().unwrap_or(0)), bytes(positions * positions)]
        };
        self.micro_batches(config, ranks).into_iter().map(of_micro).max()
    }

    /// Forward and backward passes of a rank in a step.
    pub fn micro_steps(&self, config: &Config, ranks: usize) -> u64 {
        let kinds = match self.micro_batches(config, ranks).len() {
            0 => self.spec.batch_sizes(&config.train).len(),
            kinds => kinds,
        };
        (config.train.accumulation * kinds) as u64
    }
}

/// How many elements ranks own if everything is sharded.
#[derive(Debug, Clone)]
pub struct Shares {
    pub world_size: usize,
    /// Ranks per shard group.
    pub ranks: usize,
    /// Elements of each segment.
    pub parameter_groups: Vec<u64>,
    /// Those among them that are not frozen.
    pub trained_groups: Vec<u64>,
    /// Elements of the rank that owns fewest, and of the one that owns most.
    pub smallest: u64,
    pub largest: u64,
    /// Elements that are not frozen, of the rank that owns most of these.
    pub largest_trained: u64,
    /// Elements that Muon updates, on that rank.
    pub muons: u64,
    /// Elements that Muon updates, on all ranks.
    pub all_muons: u64,
    /// Elements of the largest matrix that Muon updates.
    pub largest_muon: u64,
}

impl Shares {
    /// All elements.
    pub fn total(&self) -> u64 {
        self.parameter_groups.iter().sum()
    }

    /// All elements that are not frozen.
    pub fn trained(&self) -> u64 {
        self.trained_groups.iter().sum()
    }

    /// Elements that are not frozen, of the segment that has most of these.
    pub fn largest_trained_unit(&self) -> u64 {
        self.trained_groups.iter().copied().max().unwrap_or(0)
    }

    /// Elements of the largest segment.
    pub fn largest_unit(&self) -> u64 {
        self.parameter_groups.iter().copied().max().unwrap_or(0)
    }
}

/// The smallest and the largest micro-batch of any rank, of a batch of `size`.
pub fn samples(size: usize, ranks: usize, accumulation: usize) -> (usize, usize) {
    let (least, most) = (size / ranks.max(1), size.div_ceil(ranks.max(1)));
    let parts = |samples: usize| accumulation.min(samples).max(1);
    (least / parts(least), most.div_ceil(parts(most)))
}

/// Checks that every rank gets a sample of each micro-batch and belongs to a whole shard group.
///
/// # Errors
/// A batch is too small, or replicas do not come out even.
pub fn check_ranks(spec: &dyn TaskSpec, config: &Config, ranks: usize) -> Result<()> {
    let settings = &config.train;
    let replica = settings.hsdp_shard_size;
    let what = format!("train.hsdp_shard_size = {replica} does not divide {ranks} ranks");
    ensure!(replica == 0 || ranks.is_multiple_of(replica), usage(what, "use a divisor, or 0: all ranks"));
    let parts = ranks.saturating_mul(settings.accumulation);
    for (key, size) in spec.batch_sizes(settings).into_iter().filter(|(_, size)| ranks > 1 && *size > 0) {
        let what = format!("{key} = {size} is less than {ranks} ranks x {} micro-batches", settings.accumulation);
        ensure!(size >= parts, usage(what, format!("use fewer ranks, or make it at least {parts}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{MatrixOptimizer, Model, Task},
        dist,
    };

    #[test]
    fn micro_batches_are_those_of_the_loop() {
        for (size, ranks, accumulation) in [(1024, 64, 16), (7, 2, 2), (10, 3, 4), (5, 1, 1), (64, 3, 7)] {
            let each = |rank: usize| {
                let mine = dist::part(size, rank, ranks).len();
                let parts = accumulation.min(mine);
                (0..parts).map(move |i| dist::part(mine, i, parts).len())
            };
            let all: Vec<usize> = (0..ranks).flat_map(each).collect();
            let expected = (*all.iter().min().unwrap(), *all.iter().max().unwrap());
            assert_eq!(samples(size, ranks, accumulation), expected, "{size} {ranks} {accumulation}");
        }
    }

    #[test]
    fn shares_add_up_and_differ_by_one_a_segment() {
        let mut config =
            Config { model: Model { layers: 3, hidden: 12, heads: 2, ..Model::default() }, ..Config::default() };
        config.image_tokenizer.image_size = 32;
        let sizes = Sizes::of(&config).unwrap();
        let total: u64 = sizes.parts().iter().map(|(_, count)| count).sum();
        for ranks in [1, 2, 7, 64] {
            let shares = sizes.shares(&config, ranks);
            assert_eq!((shares.total(), shares.parameter_groups.len(), shares.all_muons), (total, 5, 0));
            assert!(shares.largest - shares.smallest <= 5 && shares.largest >= total / ranks as u64);
        }
        config.train.hsdp_shard_size = 2;
        let shares = sizes.shares(&config, 6);
        assert_eq!((shares.world_size, shares.ranks), (6, 2));
        assert!(shares.largest >= total / 2);
        config.train.matrix_optimizer = MatrixOptimizer::Muon;
        let shares = sizes.shares(&config, 2);
        assert_eq!((shares.all_muons, shares.largest_muon), (3 * 12 * 12 * 12, 4 * 12 * 12));
        assert!(shares.muons > 0 && shares.muons < shares.all_muons);
    }

    #[test]
    fn a_tokenizer_s_segments_make_up_all_of_it() {
        let config = Config { task: Task::ImageTokenizer, ..Config::default() };
        let sizes = Sizes::of(&config).unwrap();
        let total: u64 = sizes.parts().iter().map(|(_, count)| count).sum();
        assert_eq!(sizes.shares(&config, 3).total(), total);
        assert!(sizes.micro_batches(&config, 3).is_empty());
    }
}
