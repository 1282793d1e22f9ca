//! Training in f16, which candle multiplies on a CPU, too: with weights in f32, and with those of linear layers kept in
//! the precision of their products, as on GPUs.

use super::{
    ranks_tests::{Line, distance, metrics, whole},
    task_tests::{generator_config, lives, tokenizer_config},
    tasks::GeneratorTask,
    *,
};
use crate::config::{MatrixOptimizer, Precision, QuantizerKind};
use candle_core::DType;
use std::collections::BTreeMap;

/// In f16 a run resumes bit by bit, and its losses stay near those of f32 for `steps`.
fn f16_is_near_f32(mut config: Config, folder: &Path, losses: [&str; 2], steps: usize, bound: f64) {
    config.train.decay_start = 1.0;
    let exact = lives(&folder.join("f32"), &config, &[]);
    config.train.precision = Precision::F16;
    let whole = lives(&folder.join("whole"), &config, &[]);
    assert!(whole == lives(&folder.join("cut"), &config, &[1, 3]));
    let mut farthest = 0f64;
    assert!(whole.0.iter().all(|line| line["loss_scale"] == 65536.0));
    for (a, b) in exact.0.iter().zip(&whole.0).take(steps) {
        for loss in losses {
            let [a, b] = [a, b].map(|line| line[loss].as_f64().unwrap());
            farthest = farthest.max((a - b).abs() / a);
        }
    }
    assert!((1e-7..bound).contains(&farthest), "{farthest:e}");
}

#[test]
fn in_f16_runs_resume_bit_by_bit_and_stay_near_f32() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    config.train.steps = 20;
    f16_is_near_f32(config, &folder.path().join("generator"), ["image", "text"], 20, 2e-4);
    let mut config = tokenizer_config(folder.path());
    config.image_tokenizer.quantizer = QuantizerKind::Gumbel;
    f16_is_near_f32(config.clone(), &folder.path().join("gumbel"), ["l1", "l2"], 5, 2e-3);
    // An update that differs by a rounding gives some latents another nearest code, and the losses jump: on some processors
    // in the second step.
    config.image_tokenizer.quantizer = QuantizerKind::Nearest;
    f16_is_near_f32(config, &folder.path().join("nearest"), ["l1", "l2"], 1, 2e-3);
}

/// Trains on `ranks` ranks with weights kept in `kept`; metrics and the last checkpoint.
fn live(parent: &Path, config: &Config, kept: Precision, ranks: usize) -> (Vec<Line>, BTreeMap<String, Vec<u32>>) {
    Ranks::Threads(ranks)
        .run(Duration::from_secs(60), |group| {
            let mut task = GeneratorTask::kept_in(kept, config, group)?;
            let rounded = task.params().iter().filter(|(_, var)| var.dtype() == DType::F16);
            let rounded: Vec<&str> = rounded.map(|(name, _)| name.as_str()).collect();
            assert_eq!(rounded.len(), if kept == Precision::F16 { 4 * config.model.layers } else { 0 });
            assert!(rounded.iter().all(|name| name.starts_with("blocks.") && name.ends_with(".weight")));
            let folder = RunFolder::open(parent, config, group.leads())?;
            train(group, config, &mut task, folder, &Resume::Auto, &Stop::default())
        })
        .unwrap();
    let run = parent.join("runs").join(&config.name);
    (metrics(&run).unwrap(), whole(&run.join(format!("checkpoints/step-{}", config.train.steps))))
}

fn config(folder: &Path) -> Config {
    let mut config = generator_config(folder);
    let settings = &mut config.train;
    (settings.precision, settings.batch_size, settings.caption_batch_size) = (Precision::F16, 6, 6);
    (settings.steps, settings.checkpoint_every, settings.decay_start) = (6, 6, 1.0);
    config
}

#[test]
fn rounded_weights_train_as_those_in_f32_do() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    for kind in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
        config.train.matrix_optimizer = kind;
        let run = |kept: Precision| live(&folder.path().join(format!("{kind:?} {kept:?}")), &config, kept, 1);
        let (exact, rounded) = (run(Precision::F32), run(Precision::F16));
        let distance = distance(&exact.0, &rounded.0);
        assert!((1e-7..5e-3).contains(&distance), "{kind:?}: {distance:e}");
        // What is saved is what the optimizer updates: more of it than f16 has.
        let precise = |(name, bits): (&String, &Vec<u32>)| {
            name.starts_with("weights/blocks.") && bits.iter().any(|bits| bits & 0x1fff != 0)
        };
        assert_eq!(
            rounded.1.iter().filter(|entry| precise(*entry)).count(),
            exact.1.iter().filter(|e| precise(*e)).count()
        );
    }
}

#[test]
fn with_rounded_weights_every_stage_gives_the_same_bits_and_goes_on_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    // One direction and no parts, so that all stages add gradients up in one order.
    (config.train.text_loss_weight, config.train.accumulation, config.train.clip_norm) = (0.0, 1, 0.0);
    let mut run = |(ranks, replica), stage, overlap, stops: &[u64]| {
        (config.train.zero_stage, config.train.hsdp_shard_size, config.train.overlap) = (stage, replica, overlap);
        let parent = folder.path().join(format!("{ranks} {stage} {overlap} {stops:?}"));
        let mut last = None;
        for steps in stops {
            config.train.steps = *steps;
            last = Some(live(&parent, &config, Precision::F16, ranks));
        }
        last.unwrap()
    };
    // Sums over replicas have an order of their own: that of stages 1 to 3.
    for (world, first) in [((2, 0), 0), ((3, 0), 0), ((4, 2), 1)] {
        let expected = run(world, first, false, &[6]);
        for stage in first..=3 {
            assert!(run(world, stage, true, &[2, 6]).1 == expected.1, "{world:?} ranks, stage {stage}");
            assert!(run(world, stage, false, &[6]).1 == expected.1, "{world:?} ranks, stage {stage}, no overlap");
        }
    }
}
