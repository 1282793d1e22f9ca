//! Captions are converted to one script before the generator learns from them.

use super::{Resume, Stop, run_below, task_tests::generator_config};
use crate::{
    bundle::Bundle,
    config::{Config, Normalization},
    dist::Ranks,
};
use std::{fs, path::Path};

/// Trains; gives the weights and the ids of a text in both scripts.
fn train(parent: &Path, config: &Config) -> (Vec<u8>, [Vec<u32>; 2]) {
    fs::create_dir(parent).unwrap();
    run_below(parent, config, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap();
    let model = parent.join("runs/generator/model");
    let text = Bundle::open(model.to_str().unwrap()).unwrap().text().unwrap();
    let ids = ["红苹果", "紅蘋果"].map(|prompt| text.encode(prompt, 8).unwrap());
    (fs::read(model.join("model.safetensors")).unwrap(), ids)
}

#[test]
fn captions_in_both_scripts_train_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    let (simplified, [ids, traditional]) = train(&folder.path().join("simplified"), &config);
    assert_ne!(ids, traditional);
    // In UTF-8, both scripts have the same number of bytes.
    let shard = folder.path().join("codes/00000.tar");
    let mut bytes = fs::read(&shard).unwrap();
    for (from, to) in [("红苹果", "紅蘋果"), ("轮弯", "輪彎"), ("车与", "車與")] {
        while let Some(at) = bytes.windows(from.len()).position(|window| window == from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    }
    fs::write(&shard, bytes).unwrap();
    let (weights, _) = train(&folder.path().join("traditional"), &config);
    assert!(weights != simplified, "the captions are as before");
    config.text.normalize = Normalization::Simplified;
    let (weights, [ids, traditional]) = train(&folder.path().join("normalized"), &config);
    assert!(weights == simplified, "other weights");
    assert_eq!(ids, traditional);
}
