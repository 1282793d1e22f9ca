//! The task `end-to-end` with an image tokenizer that image → text trains too, on tiny data.

use super::{
    end_to_end_tests::{bits, end_to_end_config, first_step},
    ranks_tests::{distance, live},
    sizes::Sizes,
    task_tests::{resumes_bit_by_bit, step_in_parts, tokenizer_config},
    tasks::{GeneratorTask, ImageTokenizerTask},
    *,
};
use crate::{
    bundle::Bundle,
    config::{ImageTokenizer, QuantizerKind},
    dist::Group,
    error::hint_of,
    nn::weights::of_params,
};
use std::fs;

/// End-to-end training that trains the image tokenizer, whose settings `change` changes.
fn joint_config(folder: &Path, change: impl FnOnce(&mut ImageTokenizer)) -> Config {
    let mut config = end_to_end_config(folder);
    let mut tokenizer = tokenizer_config(folder);
    change(&mut tokenizer.image_tokenizer);
    let task = ImageTokenizerTask::new(&tokenizer, &Group::alone()).unwrap();
    task.publisher()(of_params(task.params()).unwrap(), Path::new(&config.image_tokenizer.path)).unwrap();
    let settings = &mut config.end_to_end;
    (settings.tokenizer_gradient_scale, settings.tokenizer_gradient_warmup) = (0.5, 3);
    settings.tokenizer_temperature = 0.2;
    config
}

#[test]
fn it_resumes_bit_by_bit_and_publishes_the_tokenizer_that_it_trained() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = joint_config(folder.path(), |tokenizer| tokenizer.codebook_decay = 0.9);
    config.train.ema_decay = 0.5;
    resumes_bit_by_bit(config.clone(), folder.path());
    let run = folder.path().join("whole/runs/end-to-end");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().all(|line| line.contains("tokenizer_psnr") && line.contains("perplexity")), "{metrics}");

    let model = Bundle::open(run.join("model").to_str().unwrap()).unwrap();
    model.generator().unwrap();
    assert!(model.weights().unwrap().keys().all(|name| !name.starts_with("image_tokenizer.")));
    let trained = model.image_tokenizer_folder().unwrap();
    trained.image_tokenizer().unwrap();
    let before = Bundle::open(&config.image_tokenizer.path).unwrap();
    assert_ne!(trained.digest().unwrap(), before.digest().unwrap());
    assert_eq!(trained.digest().unwrap(), model.digest().unwrap());
    let (after, before) = (trained.weights().unwrap(), before.weights().unwrap());
    assert_eq!(after.len(), before.len());
    for name in ["encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.weight"] {
        assert_ne!(bits(&after[name]), bits(&before[name]), "{name}");
    }

    // A run that goes on from both.
    config.train.init_from = run.join("model").display().to_string();
    config.image_tokenizer.path = run.join("model/image-tokenizer").display().to_string();
    let task = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap().0;
    for (name, tensor) in &after {
        assert_eq!(bits(&task.params()[&format!("image_tokenizer.{name}")]), bits(tensor), "{name}");
    }
}

/// Two ranks equal one rank with two micro-batches.
#[test]
fn every_stage_trains_as_one_rank_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = joint_config(folder.path(), |tokenizer| tokenizer.codebook_decay = 0.9);
    (config.train.batch_size, config.train.caption_batch_size) = (6, 6);
    (config.train.accumulation, config.train.zero_stage) = (2, 0);
    let alone = live(&folder.path().join("alone"), &config, 1).unwrap();
    config.train.accumulation = 1;
    for stage in 0..4 {
        config.train.zero_stage = stage;
        let ranks = live(&folder.path().join(stage.to_string()), &config, 2).unwrap();
        let distance = distance(&alone, &ranks);
        // As without it: rounding is amplified, a lost gradient shows at 1e-2.
        assert!(distance < 1e-3, "stage {stage}: {distance:e}");
    }
}

#[test]
fn parts_of_a_step_add_up_to_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    for quantizer in [QuantizerKind::Nearest, QuantizerKind::Gumbel] {
        let folder = folder.path().join(format!("{quantizer:?}"));
        let mut config = joint_config(&folder, |tokenizer| tokenizer.quantizer = quantizer);
        config.train.vqa_batch_size = 3;
        step_in_parts(config, |c| Box::new(GeneratorTask::new(c, &Group::alone()).unwrap()));
    }
}

/// The gradients of all other parameters in the first step are, bit by bit, those with a frozen tokenizer.
#[test]
fn the_rest_trains_as_with_a_frozen_tokenizer_and_all_is_planned() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = joint_config(folder.path(), |_| ());
    let (mut on, losses) = first_step(&config);
    let count = on.len();
    on.retain(|(name, _)| !name.starts_with("image_tokenizer."));
    assert!(count > on.len() + 20, "the tokenizer has no gradients");
    let planned = |config: &Config| -> u64 { Sizes::of(config).unwrap().parts().iter().map(|(_, count)| count).sum() };
    let trained = |config: &Config| -> usize {
        let task = GeneratorTask::new(config, &Group::alone()).unwrap();
        task.params().values().map(|param| param.elem_count()).sum()
    };
    assert_eq!(planned(&config), trained(&config) as u64);
    config.end_to_end.tokenizer_gradient_scale = 0.0;
    assert!(first_step(&config) == (on, losses));
    assert_eq!(planned(&config), trained(&config) as u64);
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |config: &Config| {
        let error = GeneratorTask::new(config, &Group::alone()).err().unwrap();
        assert!(hint_of(&error).is_some_and(|hint| hint.contains("tokenizer_gradient_scale = 0")), "{error:#}");
        error.to_string()
    };
    let mut config = joint_config(folder.path(), |_| ());
    config.train.caption_batch_size = 0;
    assert!(refusal(&config).contains("image → text"));
    let levels = joint_config(folder.path(), |tokenizer| {
        (tokenizer.quantizer, tokenizer.fsq_levels, tokenizer.code_dim) = (QuantizerKind::Fsq, vec![3, 4], 2);
    });
    assert!(refusal(&levels).contains("fsq"));
}
