//! The matcher on tiny data, as the other tasks in `task_tests` and `ranks_tests`.

use super::{
    ranks_tests::stages_equal_one_rank,
    task_tests::{generator_config, resumes_bit_by_bit, step_in_parts, tokenizer_config, unsharded, ways},
    *,
};
use crate::{
    bundle::Bundle,
    config::{self, ContrastiveLoss, Text},
    error::hint_of,
};

pub(super) fn matcher_config(folder: &Path) -> Config {
    let generator = generator_config(folder);
    let Config { data, mut train, .. } = tokenizer_config(folder);
    (train.batch_size, train.accumulation) = (7, 1);
    Config {
        name: "matcher".into(),
        task: config::Task::Matcher,
        data,
        text: Text { max_tokens: 9, ..generator.text },
        matcher: config::Matcher {
            image_size: 8,
            patch_size: 4,
            image_layers: 2,
            image_hidden: 16,
            image_heads: 2,
            text_layers: 2,
            text_hidden: 12,
            text_heads: 2,
            embedding: 6,
            min_crop_area: 0.7,
            flip: true,
            ..config::Matcher::default()
        },
        train,
        ..Config::default()
    }
}

#[test]
fn the_matcher_resumes_bit_by_bit() {
    for loss in [ContrastiveLoss::Infonce, ContrastiveLoss::Sigmoid] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = matcher_config(folder.path());
        config.matcher.loss = loss;
        resumes_bit_by_bit(config, folder.path());
        let run = folder.path().join("whole/runs/matcher");
        let sheet = image::open(run.join("samples/step-0000005.png")).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (32 * 17, 32 * 16));
        let model = Bundle::open(run.join("model").to_str().unwrap()).unwrap();
        assert_eq!(model.attribution(), "Drawn by chance.\n");
        model.matcher().unwrap();
        for error in [model.generator().err(), model.image_tokenizer().err()] {
            assert!(format!("{:#}", error.unwrap()).contains("is a matcher"));
        }
    }
}

/// Gradient caching: the loss compares all pairs of a step, in any number of micro-batches.
#[test]
fn parts_of_a_step_are_compared_as_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let config = matcher_config(folder.path());
    step_in_parts(config, |c| tasks::spec(c.task).start(c, &Group::alone()).unwrap());
}

#[test]
fn every_stage_trains_the_matcher_as_one_rank_does() {
    for loss in [ContrastiveLoss::Infonce, ContrastiveLoss::Sigmoid] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = matcher_config(folder.path());
        (config.train.batch_size, config.matcher.loss) = (8, loss);
        stages_equal_one_rank(&config, &[0, 1, 2, 3], 5e-6, folder.path());
    }
}

/// Locked-image tuning (LiT, arXiv 2111.07991), with micro-batches.
#[test]
fn a_frozen_image_encoder_stays_and_the_text_encoder_trains() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = matcher_config(folder.path());
    config.train.freeze = vec!["image".into()];
    for (stage, accumulation) in [(0, 1), (3, 2)] {
        (config.train.zero_stage, config.train.accumulation, config.train.ema_decay) = (stage, accumulation, 0.0);
        let task = tasks::spec(config.task).start(&config, &Group::alone()).unwrap();
        for (name, way) in ways(&folder.path().join(stage.to_string()), &config, task.as_ref()) {
            assert_eq!(way == 0.0, name.starts_with("image."), "{name} went {way}");
        }
    }
}

#[test]
fn the_scale_stays_in_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = matcher_config(folder.path());
    (config.train.learning_rate, config.train.warmup_steps) = (3.0, 0);
    let group = Group::alone();
    let mut task = tasks::spec(config.task).start(&config, &group).unwrap();
    let mut shards = unsharded(&group, task.as_ref());
    let scale = task.params()["logit_scale"].var.clone();
    scale.set(&candle_core::Tensor::new(&[9f32], scale.device()).unwrap()).unwrap();
    task.after_step(1, &mut shards).unwrap();
    assert!((scale.to_vec1::<f32>().unwrap()[0] - 100f32.ln()).abs() < 1e-6);
}

#[test]
fn embeddings_without_length_end_the_training() {
    let folder = tempfile::tempdir().unwrap();
    let config = matcher_config(folder.path());
    let group = Group::alone();
    for (name, factor, what) in [("image.proj", f64::NAN, "image 1 of 7"), ("text.proj", 0.0, "text 1 of 7")] {
        let mut task = tasks::spec(config.task).start(&config, &group).unwrap();
        let mut shards = unsharded(&group, task.as_ref());
        let weight = task.params()[name].var.clone();
        weight.set(&weight.affine(factor, 0.0).unwrap()).unwrap();
        let error = task.gradients(1, 1.0, &mut shards).err().unwrap();
        assert!(format!("{error:#}").contains(what), "{error:#}");
        assert!(hint_of(&error).is_some_and(|hint| hint.contains("learning_rate")));
    }
}

/// A fresh run takes over a matcher, and refuses other models.
#[test]
fn a_run_starts_from_another_matcher() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = matcher_config(folder.path());
    run_below(&folder.path().join("first"), &config, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap();
    config.train.init_from = folder.path().join("first/runs/matcher/model").display().to_string();
    let (task, _) = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap();
    let stored = Bundle::open(&config.train.init_from).unwrap().weights().unwrap();
    let first = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (name, param) in task.params() {
        assert_eq!(first(param.as_tensor()), first(&stored[name]), "{name}");
    }
    let vocab = std::fs::read_to_string(&config.text.vocab).unwrap();
    let other = folder.path().join("other.txt");
    std::fs::write(&other, format!("{vocab}龘\n")).unwrap();
    let mut changed = config.clone();
    changed.text.vocab = other.display().to_string();
    let error = prepare_task(folder.path(), &changed, &Resume::Auto, &Group::alone()).err().unwrap();
    assert!(format!("{error:#}").contains("another vocabulary") && hint_of(&error).is_some(), "{error:#}");
    config.matcher.text_heads = 3;
    let error = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).err().unwrap();
    assert!(format!("{error:#}").contains("matcher.text_heads"), "{error:#}");
    config.train.init_from = folder.path().join("tokenizer-model").display().to_string();
    let error = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).err().unwrap();
    assert!(format!("{error:#}").contains("is an image tokenizer, not a matcher"), "{error:#}");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = matcher_config(folder.path());
    let start = |change: &dyn Fn(&mut Config)| {
        let mut config = config.clone();
        change(&mut config);
        tasks::spec(config.task).start(&config, &Group::alone()).map(|_| ())
    };
    let error = start(&|config| config.train.batch_size = 1).unwrap_err();
    assert!(error.to_string().contains("a single pair") && hint_of(&error).is_some(), "{error}");
    start(&|config| (config.train.batch_size, config.matcher.loss) = (1, ContrastiveLoss::Sigmoid)).unwrap();
    let error = start(&|config| config.matcher.image_encoder = config::ImageEncoder::Resnet).unwrap_err();
    assert!(error.to_string().contains("ResNet cannot be trained"), "{error}");
}
