//! A lower bound of the time of a step on GPUs: each op takes at least the time of its FLOPs or that of its bytes, whichever
//! is longer (roofline, doi 10.1145/1498765.1498785), and a launch takes some time too.

use super::{
    memory::{Cluster, Memory, Settings},
    sizes::Sizes,
};
use crate::{
    config::Config,
    ops::tape::{Kind, Work},
    runtime::Kernels,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// Seconds of a launch that does nothing, on the device: the launches of a stream follow each other at about this distance.
const LAUNCH: f64 = 3e-6;

/// What a GPU can do at most, beside FLOPs.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Bandwidths {
    /// Of the memory, TB/s.
    pub memory: f64,
    /// To other GPUs, GB/s.
    pub network: f64,
    /// To the host, GB/s.
    pub host: f64,
}

/// The launches of one kind in a step.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct Share {
    pub seconds: f64,
    pub tflops: f64,
    pub gigabytes: f64,
    pub launches: f64,
}

/// A step of one GPU.
#[derive(Debug, Serialize)]
pub struct Roofline {
    pub kernels: &'static str,
    /// By kind of op, the slowest first.
    pub ops: Vec<(&'static str, Share)>,
    /// Of all ops.
    pub compute_seconds: f64,
    /// Traffic with other GPUs, which overlaps computation.
    pub network_seconds: f64,
    /// Gradients to the host and weights back, for optimizer state on the host.
    pub host_seconds: f64,
    pub seconds: f64,
    /// Model FLOPs utilization.
    pub mfu: f64,
}

impl Roofline {
    /// Of a configuration on a cluster; `None` for tasks without a formula.
    pub fn of(
        config: &Config,
        sizes: &Sizes,
        cluster: &Cluster,
        bandwidths: Bandwidths,
        kernels: Kernels,
    ) -> Option<Self> {
        let memory = Memory::new(config, sizes, cluster.gpus);
        let micro_batches = sizes.micro_batches(config, cluster.gpus);
        let mut kinds: BTreeMap<Kind, Share> = BTreeMap::new();
        for micro in &micro_batches {
            micro.work_on_device(config, kernels, config.train.activation_checkpointing, |times, work| {
                let times = times * config.train.accumulation as f64;
                let share = kinds.entry(work.kind).or_default();
                share.seconds += times * seconds(work, cluster, bandwidths);
                share.tflops += times * work.flops as f64 / 1e12;
                share.gigabytes += times * work.bytes as f64 / 1e9;
                share.launches += times;
            });
        }
        if micro_batches.is_empty() {
            return None;
        }
        let mut ops: Vec<(&str, Share)> = kinds.into_iter().map(|(kind, share)| (kind.name(), share)).collect();
        ops.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        let row = memory.row(Settings::of(config), cluster.memory_bytes);
        let compute_seconds: f64 = ops.iter().map(|(_, share)| share.seconds).sum();
        let network_seconds = row.traffic_bytes as f64 / (bandwidths.network * 1e9);
        // Gradients in f32, and what products read of the weights.
        let moved = if row.offload { row.kinds.gradients + row.kinds.weights } else { 0 };
        let host_seconds = moved as f64 / (bandwidths.host * 1e9);
        let seconds = compute_seconds.max(network_seconds) + host_seconds;
        let mfu = memory.flops() / (cluster.gpus as f64 * cluster.tflops * 1e12 * seconds);
        let kernels = if kernels == Kernels::Fused { "fused" } else { "stock" };
        Some(Self { kernels, ops, compute_seconds, network_seconds, host_seconds, seconds, mfu })
    }
}

fn seconds(work: &Work, cluster: &Cluster, bandwidths: Bandwidths) -> f64 {
    let computing = work.flops as f64 / (cluster.tflops * 1e12);
    computing.max(work.bytes as f64 / (bandwidths.memory * 1e12)).max(LAUNCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roofline(sets: &[&str], kernels: Kernels) -> Roofline {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/10b.toml");
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load(Some(config.as_ref()), &sets).unwrap();
        let cluster = Cluster { gpus: 64, memory_bytes: 80_000_000_000, tflops: 989.0, mfu: 0.4 };
        let bandwidths = Bandwidths { memory: 3.35, network: 50.0, host: 25.0 };
        Roofline::of(&config, &Sizes::of(&config).unwrap(), &cluster, bandwidths, kernels).unwrap()
    }

    #[test]
    fn products_have_the_flops_of_the_model_and_fused_kernels_move_less() {
        let (stock, fused) = (roofline(&[], Kernels::Stock), roofline(&[], Kernels::Fused));
        let config =
            Config::load(Some(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/10b.toml").as_ref()), &[]).unwrap();
        let sizes = Sizes::of(&config).unwrap();
        let model = Memory::new(&config, &sizes, 64).flops() / 64.0 / 1e12;
        for roofline in [&stock, &fused] {
            let products = roofline.ops.iter().find(|(name, _)| *name == "matrix products").unwrap().1;
            // Every layer is computed again, and blocks multiply more keys than a query sees.
            let ratio = products.tflops / model;
            assert!((1.3..1.6).contains(&ratio), "{ratio}");
            assert!(roofline.mfu > 0.0 && roofline.mfu < 1.0 / ratio, "{}", roofline.mfu);
            assert!(
                (roofline.ops.iter().map(|(_, share)| share.seconds).sum::<f64>() - roofline.compute_seconds).abs()
                    < 1e-9
            );
        }
        assert!(fused.compute_seconds < 0.7 * stock.compute_seconds);
        assert!(fused.ops.iter().any(|(name, _)| *name == "fused kernels"));
        let kept = roofline(&["train.activation_checkpointing=0"], Kernels::Stock);
        assert!(kept.compute_seconds < 0.9 * stock.compute_seconds && kept.network_seconds == stock.network_seconds);
    }
}
