//! Losses of validation data, of all tasks.

use super::{
    answer_tests::answering_config,
    end_to_end_tests::end_to_end_config,
    matcher_tests::matcher_config,
    ranks_tests::stages_equal_one_rank,
    task_tests::{generator_config, lives, resumes_bit_by_bit, tokenizer_config, unsharded},
    *,
};
use crate::{config, dist::Group};
use serde_json::Value;

/// A configuration that validates with its own training data.
fn validating(mut config: Config) -> Config {
    config.data.validation = config.data.sources[0].path.clone();
    (config.train.validate_every, config.train.validation_batches) = (2, 3);
    config
}

/// Without dropout and augmentation, a batch of the same samples has the losses of the training step, and adds nothing to its
/// gradients.
#[test]
fn the_samples_of_a_step_have_its_losses() {
    let folder = tempfile::tempdir().unwrap();
    for make in [tokenizer_config, generator_config, answering_config, end_to_end_config, matcher_config] {
        let folder = tempfile::tempdir_in(&folder).unwrap();
        let mut config = validating(make(folder.path()));
        (config.train.condition_dropout, config.matcher.min_crop_area, config.matcher.flip) = (0.0, 1.0, false);
        config.image_tokenizer.channel_permutation = 0.0;
        let (group, mut task) = (Group::alone(), tasks::spec(config.task).start(&config, &Group::alone()).unwrap());
        let mut shards = unsharded(&group, task.as_ref());
        let trained = task.gradients(1, 1.0, &mut shards).unwrap();
        let sums = |shards: &shards::Shards| -> Vec<f32> {
            let sum = |(_, gradient): (&String, &candle_core::Tensor)| {
                gradient.abs().unwrap().sum_all().unwrap().to_scalar().unwrap()
            };
            shards.reduced().iter().map(sum).collect()
        };
        let before = sums(&shards);
        let measured = task.validate(1, 1, &mut shards).unwrap();
        assert_eq!(before, sums(&shards), "{}", config.name);
        assert!(!measured.losses.is_empty() && measured.losses.len() == trained.losses.len(), "{}", config.name);
        let pairs = measured.losses.iter().chain(&measured.figures).zip(trained.losses.iter().chain(&trained.figures));
        for (ours, theirs) in pairs {
            assert!(ours.0 == theirs.0 && (ours.1 - theirs.1).abs() <= 1e-6 * theirs.1.abs(), "{ours:?} {theirs:?}");
        }
        let other = task.validate(1, 2, &mut shards).unwrap();
        assert_ne!(other.losses, measured.losses, "another batch has other samples");
    }
}

#[test]
fn validation_changes_nothing_but_the_metrics_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    config.train.decay_start = 1.0;
    let plain = lives(&folder.path().join("plain"), &config, &[]);
    let config = validating(config);
    let mut validated = lives(&folder.path().join("validated"), &config, &[]);
    let at: Vec<bool> = validated.0.iter().map(|line| line["validation_image"].is_f64()).collect();
    assert_eq!(at, [false, true, false, true, true], "every second step, and the last one");
    for line in &mut validated.0 {
        line.as_object_mut().unwrap().retain(|name: &String, _: &mut Value| !name.starts_with("validation_"));
    }
    assert!(plain.0 == validated.0 && plain.1 == validated.1, "training is disturbed");
    // Parts of a run end early, with a validation of their own.
    let config = Config { train: config::Train { validate_every: 1, ..config.train.clone() }, ..config };
    resumes_bit_by_bit(config, &folder.path().join("resumed"));
}

#[test]
fn every_rank_and_stage_validates_as_one_rank_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = validating(generator_config(folder.path()));
    (config.train.batch_size, config.train.caption_batch_size) = (7, 6);
    stages_equal_one_rank(&config, &[0, 3], 1e-6, &folder.path().join("ranks"));
}

#[test]
fn validation_codes_of_another_kind_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = validating(generator_config(folder.path()));
    config.data.validation = folder.path().join("images").display().to_string();
    let error = format!("{:#}", tasks::spec(config.task).start(&config, &Group::alone()).err().unwrap());
    assert!(error.contains("data.validation"), "{error}");
}
