//! Runs that diverge or start badly, and what is left of them.

use super::{
    task_tests::{generator_config, lives, tokenizer_config},
    tests::{Event, ToyTask, config},
    *,
};
use crate::config::{LossReduction, MatrixOptimizer, Precision};
use serde_json::Value;
use std::{collections::BTreeSet, fs};

fn live(parent: &Path, config: &Config, event: Option<(u64, Event)>) -> Result<()> {
    let mut task = ToyTask::new(config);
    task.event = event;
    let folder = RunFolder::open(parent, config, true)?;
    train(&Group::alone(), config, &mut task, folder, &Resume::Auto, &Stop::default())
}

/// The names in the folder of checkpoints.
fn checkpoints(parent: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(parent.join("runs/toy/checkpoints")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    (config.train.matrix_optimizer, config.train.checkpoint_every, config.train.steps) =
        (MatrixOptimizer::Adamw, 1, 40);
    // Infinite weights after the first update.
    config.train.learning_rate = 1e300;
    for steps in [3, 40] {
        config.train.steps = steps;
        let parent = folder.path().join(steps.to_string());
        let error = live(&parent, &config, None).unwrap_err();
        assert!(
            format!("{error:#}").contains("step 1: `") && format!("{error:#}").contains("is not finite"),
            "{error:#}"
        );
        assert!(crate::error::hint_of(&error).unwrap().contains("train.learning_rate"));
        assert_eq!(checkpoints(&parent), BTreeSet::from(["step-0".to_owned()]));
        assert!(!parent.join("runs/toy/model").exists());
    }
    // Finite weights without a finite gradient: ten checkpoints of them, and the last good one is still there.
    config.train.learning_rate = 1e-3;
    let parent = folder.path().join("never finite");
    let error = live(&parent, &config, Some((3, Event::NeverFinite))).unwrap_err();
    assert!(format!("{error:#}").contains("the 10th in a row"), "{error:#}");
    assert!(checkpoints(&parent).contains("step-1"), "{:?}", checkpoints(&parent));
    assert!(!checkpoints(&parent).contains("step-0"), "{:?}", checkpoints(&parent));
}

#[test]
fn a_first_step_that_overflows_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    for precision in [Precision::F32, Precision::F16] {
        let mut config = config();
        config.train.precision = precision;
        let parent = folder.path().join(precision.name());
        live(&parent, &config, Some((1, Event::NotFinite))).unwrap();
        let state = fs::read(parent.join("runs/toy/checkpoints/step-9/state.json")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        assert_eq!((state["step"].as_u64(), state["updates"].as_u64()), (Some(9), Some(8)));
    }
}

/// Changes a JSON file of a checkpoint, and its digest in the manifest.
fn edit(checkpoint: &Path, name: &str, change: impl Fn(&mut Value)) {
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(checkpoint.join(name)).unwrap()).unwrap() };
    let (mut value, mut manifest) = (read(name), read("manifest.json"));
    change(&mut value);
    let bytes = serde_json::to_vec_pretty(&value).unwrap();
    manifest["files"][name]["bytes"] = bytes.len().into();
    manifest["files"][name]["blake3"] = blake3::hash(&bytes).to_hex().to_string().into();
    fs::write(checkpoint.join(name), bytes).unwrap();
    fs::write(checkpoint.join("manifest.json"), manifest.to_string()).unwrap();
}

#[test]
fn checkpoints_without_the_newest_keys_go_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.train.decay_start = 1.0;
    let run = |parent: &Path, steps: u64, config: &mut Config| {
        config.train.steps = steps;
        live(parent, config, None).unwrap();
        fs::read(parent.join(format!("runs/toy/checkpoints/step-{steps}/state.safetensors"))).unwrap()
    };
    let (whole, old) = (folder.path().join("whole"), folder.path().join("old"));
    let expected = run(&whole, 9, &mut config);
    run(&old, 4, &mut config);
    let checkpoint = old.join("runs/toy/checkpoints/step-4");
    edit(&checkpoint, "state.json", |state| {
        for key in ["updates", "sources"] {
            state.as_object_mut().unwrap().remove(key).unwrap();
        }
    });
    edit(&checkpoint, "config.json", |config| {
        for key in ["log_every", "loss_reduction"] {
            config["train"].as_object_mut().unwrap().remove(key).unwrap();
        }
        config["image_tokenizer"].as_object_mut().unwrap().remove("kl_steps").unwrap();
    });
    assert!(run(&old, 9, &mut config) == expected);
}

#[test]
fn a_run_goes_on_when_its_data_and_vocabulary_have_moved() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut config = generator_config(folder.path());
    let parent = folder.path().join("run");
    config.train.decay_start = 1.0;
    let go_on = |config: &Config| run_below(&parent, config, &Resume::Auto, &Ranks::Threads(1), &Stop::default());
    config.train.steps = 2;
    go_on(&config).unwrap();
    for (from, to) in [("codes", "moved"), ("vocab.txt", "words.txt")] {
        fs::rename(at(from), at(to)).unwrap();
    }
    config.data.sources[0].path = at("moved");
    config.text.vocab = at("words.txt");
    config.train.steps = 3;
    go_on(&config).unwrap();
    // The same number of sources, but other data.
    let checkpoint = parent.join("runs/generator/checkpoints/step-3");
    edit(&checkpoint, "state.json", |state| state["sources"] = serde_json::json!([11]));
    fs::rename(at("moved"), at("again")).unwrap();
    config.data.sources[0].path = at("again");
    config.train.steps = 4;
    let error = format!("{:#}", go_on(&config).unwrap_err());
    assert!(error.contains("has 10 samples") && error.contains("made with 11"), "{error}");
    config.data.sources[0].weight = 2.0;
    assert!(format!("{:#}", go_on(&config).unwrap_err()).contains("data.sources"));
}

#[test]
fn the_paper_s_loss_is_the_sum_over_a_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    config.train.steps = 1;
    let mut loss = |reduction| {
        config.train.loss_reduction = reduction;
        let line = lives(&folder.path().join(format!("{reduction:?}")), &config, &[]).0.remove(0);
        ["image", "text"].map(|name| line[name].as_f64().unwrap())
    };
    let (mean, sum) = (loss(LossReduction::Mean), loss(LossReduction::Sum));
    // 16 codes a sequence; 4 captions of at most 7 predicted tokens each.
    assert!((sum[0] / mean[0] - 16.0).abs() < 1e-3, "{sum:?} {mean:?}");
    let tokens = sum[1] / mean[1] * 4.0;
    assert!((tokens - tokens.round()).abs() < 1e-3 && (4.0..=28.0).contains(&tokens), "{tokens}");
}

#[test]
fn a_codebook_s_average_starts_at_the_first_update() {
    let folder = tempfile::tempdir().unwrap();
    let config = tokenizer_config(folder.path());
    let task = tasks::ImageTokenizerTask::new(&config, &Group::alone()).unwrap();
    assert_eq!(task.state()["averaging"], false);
}
