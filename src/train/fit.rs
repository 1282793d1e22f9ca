//! Finds settings with which a configuration fits into the memory of a cluster.

use super::{
    memory::{Cluster, Memory, Row, Settings},
    sizes::Sizes,
};
use crate::{config::Config, runtime::Kernels};
use serde::Serialize;

/// A configuration on a cluster.
#[derive(Debug, Serialize)]
pub struct Fit {
    pub cluster: Cluster,
    pub parameters: u64,
    /// FLOPs per step without recomputation.
    pub flops: f64,
    /// Seconds per step, communication not counted.
    pub seconds: f64,
    /// Days for all steps.
    pub days: f64,
    /// Forward and backward passes per step.
    pub micro_steps: u64,
    /// ZeRO stages 0 to 3, each without and with offload.
    pub rows: Vec<Row>,
    /// Bytes of activations without and with full activation checkpointing.
    pub activations_kept: Option<u64>,
    pub activations_recomputed: Option<u64>,
    /// The same with `--kernels fused`.
    pub activations_kept_fused: Option<u64>,
    pub activations_recomputed_fused: Option<u64>,
    /// Whether the settings of the configuration fit.
    pub fits: bool,
    /// Keys to change if they do not; empty if no settings fit.
    pub change: Vec<String>,
    /// If no settings fit: the smallest power-of-two number of these GPUs on which some do.
    pub gpus_needed: Option<usize>,
}

/// Largest number of GPUs that is tried.
const MOST_GPUS: usize = 1 << 16;

impl Fit {
    /// Computes memory and time of a configuration of these sizes on a cluster, and looks for settings that fit.
    pub fn of(config: &Config, sizes: &Sizes, cluster: Cluster) -> Self {
        let memory = Memory::new(config, sizes, cluster.gpus);
        let own = Settings::of(config);
        let row = |(stage, offload)| memory.row(Settings { stage, offload, ..own }, cluster.memory_bytes);
        let seconds = memory.seconds(&cluster);
        let fits = memory.row(own, cluster.memory_bytes).fits;
        let activations = |activation_checkpointing, kernels| {
            memory.activations(Settings { activation_checkpointing, ..own }, kernels)
        };
        let change = if fits { None } else { change(config, &memory, &cluster) };
        Self {
            parameters: memory.shares().total(),
            flops: memory.flops(),
            seconds,
            days: seconds * config.train.steps as f64 / 86_400.0,
            micro_steps: memory.micro_steps(),
            rows: (0..=3).flat_map(|stage| [(stage, false), (stage, true)]).map(row).collect(),
            activations_kept: activations(0, Kernels::Stock),
            activations_recomputed: activations(1, Kernels::Stock),
            activations_kept_fused: activations(0, Kernels::Fused),
            activations_recomputed_fused: activations(1, Kernels::Fused),
            fits,
            gpus_needed: if fits || change.is_some() { None } else { gpus_needed(config, sizes, &cluster) },
            change: change.map(|settings| keys(own, settings)).unwrap_or_default(),
            cluster,
        }
    }
}

/// The fitting settings with the smallest cost: free changes first, then changes that cost time, then traffic.
fn change(config: &Config, memory: &Memory, cluster: &Cluster) -> Option<Settings> {
    candidates(config, cluster.gpus).into_iter().find(|settings| memory.row(*settings, cluster.memory_bytes).fits)
}

fn candidates(config: &Config, gpus: usize) -> Vec<Settings> {
    let own = Settings::of(config);
    let train = &config.train;
    let batches = train.generator_batches().into_iter().filter(|size| *size > 0);
    // At most as many micro-batches as each GPU has samples.
    let most = batches.min().map_or(own.accumulation, |size| size / gpus.max(1)).max(own.accumulation);
    let mut all = Vec::new();
    // The optimizer on the host last: it makes each step wait for the bus.
    for offload in [own.offload, true] {
        for stage in own.stage..=3 {
            for activation_checkpointing in [own.activation_checkpointing, 1] {
                for accumulation in [own.accumulation, most] {
                    all.push(Settings { stage, offload, activation_checkpointing, accumulation });
                }
            }
        }
    }
    all
}

fn gpus_needed(config: &Config, sizes: &Sizes, cluster: &Cluster) -> Option<usize> {
    let more = (0..).map(|power| 1 << power).skip_while(|gpus| *gpus <= cluster.gpus);
    more.take_while(|gpus| *gpus <= MOST_GPUS).find(|&gpus| {
        let cluster = Cluster { gpus, ..*cluster };
        change(config, &Memory::new(config, sizes, gpus), &cluster).is_some()
    })
}

/// The keys in which `new` differs from `own`, as `key = value`.
fn keys(own: Settings, new: Settings) -> Vec<String> {
    let mut keys = Vec::new();
    let mut differs = |differs: bool, key: String| keys.extend(differs.then_some(key));
    differs(own.stage != new.stage, format!("train.zero_stage = {}", new.stage));
    differs(own.accumulation != new.accumulation, format!("train.accumulation = {}", new.accumulation));
    differs(
        own.activation_checkpointing != new.activation_checkpointing,
        format!("train.activation_checkpointing = {}", new.activation_checkpointing),
    );
    differs(own.offload != new.offload, "train.offload = \"cpu\"".to_owned());
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(sets: &[&str], gpus: usize, gigabytes: u64) -> Fit {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/10b.toml");
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load(Some(config.as_ref()), &sets).unwrap();
        let cluster = Cluster { gpus, memory_bytes: gigabytes * 1_000_000_000, tflops: 312.0, mfu: 0.4 };
        Fit::of(&config, &Sizes::of(&config).unwrap(), cluster)
    }

    #[test]
    fn what_does_not_fit_is_told_what_to_change() {
        assert!(fit(&[], 8, 80).fits && fit(&[], 64, 40).fits);
        let stage_1 = fit(&["train.zero_stage=1", "train.accumulation=128"], 8, 60);
        assert!(!stage_1.fits, "61 GB and activations");
        assert_eq!(stage_1.change, ["train.zero_stage = 2"]);
        assert_eq!(fit(&["train.zero_stage=1"], 8, 70).change, ["train.accumulation = 128"], "33 GB of activations");
        assert!(fit(&["train.accumulation=128"], 8, 24).fits);
        let on_gpus = fit(&["train.accumulation=128", "train.offload=none"], 8, 24);
        assert!(!on_gpus.fits, "18 GB of optimizer state");
        assert_eq!(on_gpus.change, ["train.offload = \"cpu\""]);
        let kept = fit(&["train.activation_checkpointing=0", "train.accumulation=16"], 8, 24);
        assert!(!kept.fits && kept.change.contains(&"train.accumulation = 128".to_owned()), "{:?}", kept.change);
    }

    #[test]
    fn what_is_said_to_help_does() {
        for (sets, gpus, gigabytes) in [
            (vec!["train.zero_stage=0"], 16, 60),
            (vec!["train.zero_stage=1", "train.activation_checkpointing=0"], 8, 40),
            (vec!["train.activation_checkpointing=0", "train.accumulation=1"], 64, 24),
        ] {
            let first = fit(&sets, gpus, gigabytes);
            assert!(!first.fits && !first.change.is_empty(), "{sets:?}");
            let all: Vec<&str> = sets.iter().copied().chain(first.change.iter().map(String::as_str)).collect();
            assert!(fit(&all, gpus, gigabytes).fits, "{sets:?}: {:?}", first.change);
        }
    }

    #[test]
    fn where_nothing_fits_more_gpus_are_counted() {
        let none = fit(&[], 1, 16);
        assert!(!none.fits && none.change.is_empty() && none.rows.iter().all(|row| !row.fits));
        let gpus = none.gpus_needed.unwrap();
        let enough = fit(&[], gpus, 16);
        assert!(enough.fits || !enough.change.is_empty());
        let fewer = fit(&[], gpus / 2, 16);
        assert!(!fewer.fits && fewer.change.is_empty());
        assert_eq!(fit(&[], 1, 1).gpus_needed, None);
    }
}
