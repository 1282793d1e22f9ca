//! Several ranks: every stage ≡ one process, any number of ranks goes on from any other's checkpoint, faults end all.

use super::{
    saving::Saving,
    shards::Shards,
    state::RunState,
    task_tests::{TIMING, adversarial_config, generator_config, tokenizer_config},
    tests::{Event, ToyTask, config as toy_config},
    *,
};
use crate::{
    config::{MatrixOptimizer, Offload, Precision},
    dist::launch,
    error::{Exit, exit_of},
    ops::Store,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs};

const PATIENCE: Duration = Duration::from_secs(60);

/// Trains on `ranks` ranks and returns the metrics that do not depend on time.
pub(super) fn live(parent: &Path, config: &Config, ranks: usize) -> Result<Vec<Line>> {
    run_below(parent, config, &Resume::Auto, &Ranks::Threads(ranks), &Stop::default())?;
    metrics(&parent.join("runs").join(&config.name))
}

/// The numbers of a step's line in the metrics that do not depend on time.
pub(super) type Line = Vec<f64>;

/// Those of all steps of a run.
pub(super) fn metrics(run: &Path) -> Result<Vec<Line>> {
    let metrics = fs::read_to_string(run.join("metrics.jsonl"))?;
    let numbers = |line: &str| {
        let line: BTreeMap<String, Value> = serde_json::from_str(line).unwrap();
        let kept = line.into_iter().filter(|(key, _)| !TIMING.contains(&key.as_str()));
        kept.filter_map(|(_, value)| value.as_f64()).collect()
    };
    Ok(metrics.lines().map(numbers).collect())
}

/// Every tensor of a checkpoint, from any number of files.
pub(super) fn whole(checkpoint: &Path) -> BTreeMap<String, Vec<u32>> {
    let mut tensors: BTreeMap<String, BTreeMap<usize, Vec<u32>>> = BTreeMap::new();
    for entry in fs::read_dir(checkpoint).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        for (stored, tensor) in crate::nn::weights::parse(&fs::read(path).unwrap(), "test").unwrap() {
            let (name, start) = match stored.split_once('@') {
                Some((name, range)) => (name, range.split_once("..").unwrap().0.parse().unwrap()),
                None => (stored.as_str(), 0),
            };
            let bits = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
            assert!(tensors.entry(name.to_owned()).or_default().insert(start, bits).is_none(), "{stored} twice");
        }
    }
    tensors.into_iter().map(|(name, parts)| (name, parts.into_values().flatten().collect())).collect()
}

/// Largest distance of two runs' numbers, relative to the first's.
pub(super) fn distance(a: &[Line], b: &[Line]) -> f64 {
    assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.len() == b.len()));
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.fold(0.0, |most: f64, (a, b)| most.max((a - b).abs() / a.abs().max(1e-12)))
}

/// Runs of every stage and several numbers of ranks against one rank alone: losses and gradient norms to `bound`.
pub(super) fn stages_equal_one_rank(config: &Config, stages: &[u8], bound: f64, folder: &Path) {
    let mut config = config.clone();
    (config.train.steps, config.train.checkpoint_every, config.train.sample_every) = (10, 10, 10);
    for accumulation in [1, 2] {
        (config.train.accumulation, config.train.hsdp_shard_size) = (accumulation, 0);
        let alone = live(&folder.join(format!("alone{accumulation}")), &config, 1).unwrap();
        assert_eq!(alone.len(), 10);
        let worlds = [(2, 0), (3, 0)].into_iter().chain((accumulation == 1).then_some((4, 2)));
        for ((ranks, replica), stage) in worlds.flat_map(|world| stages.iter().map(move |stage| (world, *stage))) {
            (config.train.hsdp_shard_size, config.train.zero_stage) = (replica, stage);
            let what = format!("{accumulation} parts, {ranks} ranks, {replica} a replica, stage {stage}");
            let run = |config: &Config| {
                let parent = folder.join(format!("{what}, {}", config.train.overlap));
                let metrics = live(&parent, config, ranks).unwrap();
                let run = parent.join("runs").join(&config.name);
                assert!(run.join("model/model.safetensors").exists());
                assert!(run.join("samples/step-0000010.png").exists());
                (metrics, whole(&run.join("checkpoints/step-10")))
            };
            let together = run(&config);
            let distance = distance(&alone, &together.0);
            assert!(distance < bound, "{what}: {distance:e}");
            let mut after = config.clone();
            after.train.overlap = false;
            assert!(together == run(&after), "{what}: overlap changes bits");
        }
    }
}

#[test]
fn every_stage_trains_the_generator_as_one_rank_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size) = (7, 6);
    stages_equal_one_rank(&config, &[0, 1, 2, 3], 1e-6, folder.path());
}

#[test]
fn parts_of_a_step_are_ranks_or_micro_batches() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size, config.train.steps) = (8, 8, 10);
    config.train.accumulation = 8;
    let alone = live(&folder.path().join("alone"), &config, 1).unwrap();
    (config.train.accumulation, config.train.zero_stage) = (2, 3);
    let together = live(&folder.path().join("together"), &config, 4).unwrap();
    let distance = distance(&alone, &together);
    assert!(distance < 1e-6, "{distance:e}");
}

#[test]
fn every_stage_trains_the_image_tokenizer_as_one_rank_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tokenizer_config(folder.path());
    // The rates that the bound was measured with: a ratio of 0 ends one step later.
    (config.train.batch_size, config.train.final_lr_ratio) = (6, 1e-12);
    stages_equal_one_rank(&config, &[0, 1, 2, 3], 4e-6, folder.path());
    config.image_tokenizer.codebook_decay = 0.9;
    stages_equal_one_rank(&config, &[0, 2, 3], 4e-6, &folder.path().join("averaged"));
}

/// Each rank has its own norms and GAN loss weight, so two ranks differ from one; but sharding changes nothing.
#[test]
fn an_adversary_is_the_same_at_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adversarial_config(folder.path());
    (config.train.batch_size, config.train.accumulation, config.train.zero_stage) = (6, 1, 0);
    let first = live(&folder.path().join("0"), &config, 2).unwrap();
    for stage in [1, 2, 3] {
        config.train.zero_stage = stage;
        let other = live(&folder.path().join(stage.to_string()), &config, 2).unwrap();
        assert!(distance(&first, &other) < 4e-6, "stage {stage}");
    }
}

/// The toy task on `ranks` ranks; `event` gives what happens on which rank.
fn toys(
    parent: &Path,
    config: &Config,
    ranks: usize,
    event: impl Fn(usize) -> Option<(u64, Event)> + Sync,
) -> Result<()> {
    let stops: Vec<Stop> = (0..ranks).map(|_| Stop::default()).collect();
    launch(ranks, PATIENCE, |group| {
        let stop = &stops[group.rank()];
        let mut task = ToyTask::new(config);
        task.event = event(group.rank());
        if let Some((_, Event::Stop(own))) = &mut task.event {
            *own = stop.clone();
        }
        let folder = RunFolder::open(parent, config, group.leads())?;
        train(group, config, &mut task, folder, &Resume::Auto, stop)
    })?;
    Ok(())
}

#[test]
fn weights_that_products_round_travel_in_bf16_and_cost_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.precision, config.train.clip_norm) = (Precision::Bf16, 0.0);
    // One direction and no parts, so that all stages add gradients up in one order. At stage 0 no weight travels.
    (config.train.text_loss_weight, config.train.batch_size, config.train.sample_every) = (0.0, 6, 0);
    config.train.accumulation = 1;
    (config.train.steps, config.train.checkpoint_every) = (4, 4);
    for kind in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
        config.train.matrix_optimizer = kind;
        let mut end = |stage| {
            config.train.zero_stage = stage;
            let parent = folder.path().join(format!("{kind:?}{stage}"));
            live(&parent, &config, 2).unwrap();
            whole(&parent.join("runs").join(&config.name).join("checkpoints/step-4"))
        };
        let expected = end(0);
        for stage in 1..=3 {
            assert!(end(stage) == expected, "{kind:?}, stage {stage}");
        }
    }
}

#[test]
fn any_number_of_ranks_goes_on_from_any_other_s_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    config.train.steps = 3;
    let worlds = [(1, 0, 0), (2, 1, 0), (3, 3, 0), (4, 2, 0), (8, 3, 0), (6, 3, 2)];
    for (from, stage, replica) in worlds {
        (config.train.zero_stage, config.train.hsdp_shard_size) = (stage, replica);
        let parent = folder.path().join(format!("from{from}"));
        toys(&parent, &config, from, |_| None).unwrap();
        let saved = whole(&parent.join("runs/toy/checkpoints/step-3"));
        assert_eq!(saved.len(), 3 * 3, "weights, momentum and average of three matrices");
        for (to, stage, replica) in worlds {
            let again = parent.join(format!("to{to}"));
            fs::create_dir_all(&again).unwrap();
            launch(to, PATIENCE, |group| {
                group.shard_over(replica)?;
                let mut task = ToyTask::new(&config);
                let handling = |name: &str, attributes| optimizer::handling(&config.train, false, name, attributes);
                let mut shards = Shards::new(
                    group,
                    stage,
                    if to == 3 { Store::Device(candle_core::Device::Cpu) } else { Store::Memory },
                    task.params(),
                    &task.parameter_groups(),
                    handling,
                    |name| task.fresh(name),
                )?;
                let checkpoints = parent.join("runs/toy/checkpoints");
                let run = RunState::start(&config, &mut task, &mut shards, &checkpoints, &Resume::Auto)?;
                let mut saving = Saving::new(group, again.clone(), 2);
                run.save(&config, &task, &shards, &mut saving, false)?;
                saving.finish().map(drop)
            })
            .unwrap();
            assert!(saved == whole(&again.join("step-3")), "from {from} to {to} ranks");
        }
    }
}

#[test]
fn state_on_a_disk_gives_the_bits_of_state_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size) = (7, 6);
    for (ranks, stage) in [(1, 0), (2, 1), (3, 3)] {
        config.train.zero_stage = stage;
        let [memory, disk] = [Offload::Cpu, Offload::Disk].map(|offload| {
            config.train.offload = offload;
            let parent = folder.path().join(format!("{ranks}{offload:?}"));
            let metrics = live(&parent, &config, ranks).unwrap();
            (metrics, whole(&parent.join("runs/generator/checkpoints/step-5")))
        });
        assert!(memory == disk, "{ranks} ranks, stage {stage}");
    }
}

#[test]
fn each_sample_comes_once_an_epoch_through_crashes_at_other_numbers_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    // Ten samples: an epoch of five steps of two.
    (config.train.batch_size, config.train.caption_batch_size) = (2, 0);
    let (mut step, mut seen) = (0, Vec::new());
    for ranks in [2, 1, 2] {
        // Each life ends after two steps and one that its checkpoint does not hold.
        let lives = launch(ranks, PATIENCE, |group| {
            let mut data_loader = data_loader::DataLoader::new(&config, crate::data::Kind::Codes, &[2, 0], group)?;
            let mut names = Vec::new();
            for step in step + 1..=step + 3 {
                data_loader.next(step)?;
                names.push(data_loader.names().to_vec());
            }
            Ok(names)
        })
        .unwrap();
        let kept = if step == 4 { 1 } else { 2 };
        seen.extend((0..kept).flat_map(|i| lives.iter().flat_map(move |rank| rank[i].clone())));
        step += kept as u64;
    }
    assert_eq!(step, 5);
    seen.sort();
    let all: Vec<String> = (0..10).map(|i| i.to_string()).collect();
    assert_eq!(seen, all);
}

#[test]
fn interrupted_at_other_numbers_of_ranks_the_generator_goes_on_alike() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size) = (9, 9);
    (config.train.accumulation, config.train.decay_start, config.train.steps) = (1, 1.0, 8);
    let expected = live(&folder.path().join("alone"), &config, 1).unwrap();
    for stages in [[3, 1, 2, 0], [2, 3, 3, 3]] {
        let parent = folder.path().join(format!("{stages:?}"));
        let mut got = Vec::new();
        for (i, (ranks, stage)) in [3, 1, 4, 2].into_iter().zip(stages).enumerate() {
            (config.train.zero_stage, config.train.steps) = (stage, 2 * (i as u64 + 1));
            got = live(&parent, &config, ranks).unwrap();
        }
        let distance = distance(&expected, &got);
        assert!(distance < 1e-6, "{stages:?}: {distance:e}");
    }
}

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    for stage in 0..=3 {
        config.train.zero_stage = stage;
        let (whole_run, cut) = (folder.path().join(format!("whole{stage}")), folder.path().join(format!("cut{stage}")));
        toys(&whole_run, &config, 3, |_| None).unwrap();
        let event = |rank| (rank == 2).then(|| (4, Event::Stop(Stop::default())));
        let error = toys(&cut, &config, 3, event).unwrap_err();
        assert_eq!(exit_of(&error), Exit::Requeue, "{error:#}");
        assert!(cut.join("runs/toy/checkpoints/step-4").exists());
        toys(&cut, &config, 3, |_| None).unwrap();
        let last = |parent: &Path| whole(&parent.join("runs/toy/checkpoints/step-9"));
        assert!(last(&whole_run) == last(&cut), "stage {stage}: a resume changes bits");
    }
}

#[test]
fn what_is_not_finite_on_one_rank_is_skipped_by_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    // Step 4 is the last, so that its checkpoint shows whether it changed anything.
    for (stage, precision) in (0..=3).flat_map(|stage| [(stage, Precision::F32), (stage, Precision::F16)]) {
        (config.train.zero_stage, config.train.steps, config.train.checkpoint_every) = (stage, 4, 3);
        (config.train.decay_start, config.train.precision) = (1.0, precision);
        let parent = folder.path().join(format!("{stage}{}", precision.name()));
        toys(&parent, &config, 2, |rank| (rank == 1).then_some((4, Event::NotFinite))).unwrap();
        let at = |step| parent.join(format!("runs/toy/checkpoints/step-{step}"));
        assert!(whole(&at(3)) == whole(&at(4)), "stage {stage}: a step that is not finite changed the state");
        let scale = |step| {
            let state: Value = serde_json::from_slice(&fs::read(at(step).join("state.json")).unwrap()).unwrap();
            (state["loss_scale"]["factor"].as_f64(), state["skipped"].as_u64())
        };
        let expected = match precision {
            // Not counted as a bad step: the scale can still fall.
            Precision::F16 => [(Some(65536.0), Some(0)), (Some(32768.0), Some(0))],
            _ => [(None, Some(0)), (None, Some(1))],
        };
        assert_eq!([scale(3), scale(4)], expected);
    }
}

#[test]
fn scaling_the_loss_changes_nothing_where_nothing_rounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    // AdamW with a clip that bites: what is scaled back too little or too late would show.
    (config.train.matrix_optimizer, config.train.clip_norm) = (MatrixOptimizer::Adamw, 0.01);
    let [exact, scaled] = [Precision::F32, Precision::F16].map(|precision| {
        config.train.precision = precision;
        let parent = folder.path().join(precision.name());
        toys(&parent, &config, 2, |_| None).unwrap();
        let metrics = fs::read_to_string(parent.join("runs/toy/metrics.jsonl")).unwrap();
        let norms: Vec<Value> =
            metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["gradient_norm"].clone()).collect();
        assert!(norms.iter().all(|norm| norm.as_f64().is_some_and(|norm| norm > 0.01)), "{norms:?}");
        (norms, whole(&parent.join("runs/toy/checkpoints/step-9")))
    });
    assert!(exact == scaled);
}

#[test]
fn a_loss_scale_that_is_stuck_ends_the_run_with_its_samples() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    (config.train.steps, config.train.precision, config.train.checkpoint_every) = (100, Precision::F16, 100);
    let event = |rank: usize| (rank == 1).then_some((3, Event::NeverFinite));
    let error = toys(folder.path(), &config, 2, event).unwrap_err().to_string();
    // Sixteen halvings down to 1, then ten bad steps.
    assert!(
        error.contains("step 28: the gradient is not finite, the 10th in a row") && error.contains("a row"),
        "{error}"
    );
}

#[test]
fn an_error_or_panic_of_one_rank_ends_all_with_its_message() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = toy_config();
    for stage in 0..=3 {
        config.train.zero_stage = stage;
        for (event, message) in [(false, "the disk is on fire"), (true, "rank 1 panicked: on purpose")] {
            let parent = folder.path().join(format!("{stage}{event}"));
            let what = |rank| (rank == 1).then_some((5, if event { Event::Panic } else { Event::Error }));
            let error = toys(&parent, &config, 3, what).unwrap_err();
            assert!(format!("{error:#}").contains(message), "{error:#}");
            toys(&parent, &config, 3, |_| None).unwrap();
        }
    }
}

#[test]
fn ranks_without_samples_or_a_replica_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size, config.train.accumulation) = (8, 3, 1);
    let error = live(folder.path(), &config, 4).unwrap_err();
    assert!(error.to_string().contains("train.caption_batch_size = 3 is less than 4 ranks"), "{error:#}");
    assert_eq!(exit_of(&error), Exit::Usage);
    config.train.hsdp_shard_size = 2;
    let error = live(folder.path(), &config, 3).unwrap_err();
    assert!(error.to_string().contains("train.hsdp_shard_size = 2 does not divide 3 ranks"), "{error:#}");
}
