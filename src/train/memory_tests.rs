use super::*;
use crate::config::MatrixOptimizer;

fn paper() -> Config {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/10b.toml");
    Config::load(Some(config.as_ref()), &[]).unwrap()
}

/// GB a GPU with fp32 gradients, as worked out by hand from ZeRO's formulas for 10.0 · 10⁹ parameters:
/// (stage, GPUs, without offload, with offload).
const BY_HAND: [(u8, usize, f64, f64); 21] = [
    (1, 1, 180.0, 60.0),
    (1, 2, 120.0, 60.0),
    (1, 4, 90.0, 60.0),
    (1, 8, 75.0, 60.0),
    (1, 16, 67.5, 60.0),
    (1, 32, 63.8, 60.0),
    (1, 64, 61.9, 60.0),
    (2, 1, 182.0, 61.6),
    (2, 2, 102.0, 41.6),
    (2, 4, 62.0, 31.6),
    (2, 8, 41.6, 26.6),
    (2, 16, 31.6, 24.1),
    (2, 32, 26.6, 22.9),
    (2, 64, 24.1, 22.2),
    (3, 1, 182.0, 62.0),
    (3, 2, 92.0, 32.0),
    (3, 4, 47.0, 17.0),
    (3, 8, 24.5, 9.5),
    (3, 16, 13.3, 5.8),
    (3, 32, 7.6, 3.9),
    (3, 64, 4.8, 3.0),
];

#[test]
fn states_of_10_b_are_those_worked_out_by_hand() {
    let config = paper();
    let sizes = Sizes::of(&config).unwrap();
    for (stage, gpus, without, with) in BY_HAND {
        let memory = Memory::new(&config, &sizes, gpus);
        for (offload, expected) in [(false, without), (true, with)] {
            let settings = Settings { stage, offload, ..Settings::of(&config) };
            let row = memory.row(settings, 0);
            let held = row.states_bytes as f64 / 1e9;
            assert!(
                (held / expected - 1.0).abs() < 0.05,
                "stage {stage}, {gpus} GPUs, {offload}: {held} for {expected}"
            );
            // The average is a kind of its own, and goes with the optimizer's state.
            assert_eq!(row.kinds.average, if offload { 0 } else { row.kinds.optimizer / 3 });
            let extra = row.kinds.under_way + row.kinds.average + row.kinds.activations.unwrap();
            assert_eq!(row.total_bytes, row.states_bytes + extra);
            let (unit, alone) = (memory.shares().largest_unit(), gpus == 1);
            assert_eq!(row.kinds.under_way, if alone { 0 } else { [8, 8, 0, 2][usize::from(stage)] * unit });
        }
    }
}

#[test]
fn host_memory_of_a_cluster_is_that_of_the_optimizer_and_the_average() {
    let mut config = paper();
    let sizes = Sizes::of(&config).unwrap();
    let host = |config: &Config| {
        let settings = Settings { stage: 3, offload: true, ..Settings::of(config) };
        8.0 * Memory::new(config, &sizes, 8).row(settings, 0).host_bytes as f64 / 1e9
    };
    assert!((host(&config) / (120.0 + 40.0 + 20.0) - 1.0).abs() < 0.05);
    config.train.ema_decay = 0.0;
    assert!((host(&config) / (120.0 + 20.0) - 1.0).abs() < 0.05);
}

#[test]
fn traffic_counts_collectives() {
    let config = paper();
    let sizes = Sizes::of(&config).unwrap();
    let memory = Memory::new(&config, &sizes, 64);
    // bf16 of all parameters but one's own; a gradient is twice as long.
    let whole = 2.0 * memory.shares().total() as f64 * 63.0 / 64.0;
    // In each of two directions.
    let parts = 2.0 * config.train.accumulation as f64;
    let row = |stage| memory.row(Settings { stage, ..Settings::of(&config) }, 0).traffic_bytes as f64 / whole;
    for (stage, expected) in [(0, 4.0), (1, 3.0), (2, 1.0 + 2.0 * parts), (3, 4.0 * parts)] {
        assert!((row(stage) - expected).abs() < 1e-6, "stage {stage}: {}", row(stage));
    }
    let alone = Memory::new(&config, &sizes, 1);
    assert_eq!(alone.row(Settings { stage: 3, ..Settings::of(&config) }, 0).traffic_bytes, 0);
    // Replicas of 8: the same in each of them, and sums of an eighth over the 8 ranks that own it.
    let mut config = paper();
    config.train.hsdp_shard_size = 8;
    let row = Memory::new(&config, &sizes, 64).row(Settings { stage: 3, ..Settings::of(&config) }, 0);
    let expected = whole * 64.0 / 63.0 * 7.0 / 8.0 * parts * (4.0 + 4.0 / 8.0);
    assert!((row.traffic_bytes as f64 / expected - 1.0).abs() < 1e-3, "{}", row.traffic_bytes as f64 / expected);
}

#[test]
fn operations_are_those_of_the_paper_s_model() {
    let config = paper();
    let sizes = Sizes::of(&config).unwrap();
    let memory = Memory::new(&config, &sizes, 64);
    // Six a weight and position, 9.7e9 weights at 1,088 positions, and what attention adds.
    let sample = memory.flops() / 2048.0;
    assert!((6.3e13..7.1e13).contains(&sample), "{sample:e}");
    let cluster = Cluster { gpus: 64, memory_bytes: 0, tflops: 312.0, mfu: 0.4 };
    let expected = memory.flops() / (64.0 * 312e12 * 0.4);
    assert!((memory.seconds(&cluster) / expected - 1.0).abs() < 1e-12);
}

#[test]
fn other_settings_change_their_kind_only() {
    let mut config = paper();
    let sizes = Sizes::of(&config).unwrap();
    let settings = Settings { stage: 3, offload: false, ..Settings::of(&config) };
    let kinds = |config: &Config, settings| Memory::new(config, &sizes, 8).kinds(settings);
    let before = kinds(&config, settings);
    let kept = kinds(&config, Settings { activation_checkpointing: 0, ..settings });
    assert!(kept.activations.unwrap() > 4 * before.activations.unwrap());
    assert_eq!(kept.states(), before.states());
    let parts = kinds(&config, Settings { accumulation: 128, ..settings });
    assert!(parts.activations < before.activations);
    config.train.matrix_optimizer = MatrixOptimizer::Muon;
    let muon = kinds(&config, settings);
    assert!(muon.optimizer < before.optimizer * 3 / 4 && muon.weights.abs_diff(before.weights) < before.weights / 10);
    config.train.matrix_optimizer = MatrixOptimizer::Adamw;
    config.train.precision = Precision::F32;
    let exact = kinds(&config, settings);
    assert_eq!((exact.weights, exact.optimizer), (2 * before.weights, before.optimizer));
    config.train.overlap = false;
    assert_eq!(kinds(&config, settings), Kinds { under_way: 0, ..exact });
}
