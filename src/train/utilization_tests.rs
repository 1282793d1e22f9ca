//! What a run logs of its speed: model FLOPs, MFU, time spent waiting.

use super::{
    sizes::Sizes,
    task_tests::{generator_config, tokenizer_config},
    *,
};
use serde_json::Value;
use std::fs;

/// The lines of metrics.jsonl after training on `ranks` ranks.
fn lines(folder: &Path, config: &Config, ranks: usize) -> Vec<Value> {
    run_below(folder, config, &Resume::Never, &Ranks::Threads(ranks), &Stop::default()).unwrap();
    let metrics = fs::read_to_string(folder.join("runs").join(&config.name).join("metrics.jsonl")).unwrap();
    metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// FLOPs of a step by formula, of sequences with texts of `tokens` tokens.
fn formula(config: &Config, tokens: usize) -> f64 {
    let mut config = config.clone();
    config.text.max_tokens = tokens;
    let sizes = Sizes::of(&config).unwrap();
    sizes.spec.flops(&config, &sizes.inputs)
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"))
}

#[test]
fn the_flops_that_are_logged_are_those_of_the_plan() {
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer = tokenizer_config(folder.path());
    (tokenizer.train.steps, tokenizer.train.peak_tflops) = (2, 0.5);
    let expected = formula(&tokenizer, tokenizer.text.max_tokens);
    for line in lines(folder.path(), &tokenizer, 1) {
        let flops = number(&line, "tflops") * number(&line, "seconds") * 1e12;
        assert!((flops / expected - 1.0).abs() < 1e-9, "{flops} {expected}");
        assert!((number(&line, "mfu") / number(&line, "tflops") - 2.0).abs() < 1e-9);
        assert!(number(&line, "data_wait") > 0.0 && line["communication_wait"].is_null(), "{line}");
    }
}

/// A batch of a generator is as long as its longest text; on two ranks each does half of the work.
#[test]
fn a_generator_s_flops_are_those_of_its_batches() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.steps, config.train.accumulation) = (3, 1);
    let all = lines(folder.path(), &config, 2);
    assert_eq!(all.len(), 3);
    for line in all {
        let flops = 2.0 * number(&line, "tflops") * number(&line, "seconds") * 1e12;
        let [least, most] = [2, config.text.max_tokens].map(|tokens| formula(&config, tokens));
        assert!(least < flops && flops <= most * (1.0 + 1e-9), "{least} {flops} {most}");
        assert!(line["mfu"].is_null() && number(&line, "communication_wait") > 0.0, "{line}");
    }
}
