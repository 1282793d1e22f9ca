//! `vilg tokenize` and `vilg reconstruct` on a small random tokenizer.

use candle_core::{DType, Device};
use safetensors::Dtype;
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};
use vilg::{
    bundle::{self, Parts},
    config::{self, Config, Task},
    nn::{params::Scope, weights},
    tokenizer::ImageTokenizer,
};

fn model(folder: &Path) -> PathBuf {
    let image_tokenizer = config::ImageTokenizer {
        image_size: 16,
        channels: 32,
        channel_multipliers: vec![1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 8,
        codebook_size: 50,
        code_dim: 4,
        ..config::ImageTokenizer::default()
    };
    let path = folder.join("model");
    write_random(&path, image_tokenizer);
    path
}

/// Writes the model folder of a tokenizer with random weights.
pub fn write_random(path: &Path, image_tokenizer: config::ImageTokenizer) {
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    ImageTokenizer::new(&scope, &image_tokenizer).unwrap();
    let weights = weights::of_params(&scope.params()).unwrap();
    let config = Config { task: Task::ImageTokenizer, image_tokenizer, ..Config::default() };
    let parts = Parts { config: &config, weights, vocab: None, attribution: String::new(), image_tokenizer: None };
    bundle::write(path, &parts, Dtype::F32).unwrap();
}

fn vilg(args: &[&str], model: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vilg")).args(args).arg("--model").arg(model).output().unwrap()
}

fn json_lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn pictures_become_codes_and_codes_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let picture = folder.path().join("wide.png");
    image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, 90])).save(&picture).unwrap();
    let picture = picture.to_str().unwrap();

    let lines = json_lines(&vilg(&["tokenize", picture, picture, "--json"], &model));
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0], lines[1]);
    assert_eq!(lines[0]["grid"], serde_json::json!([8, 8]));
    let codes: Vec<u64> = lines[0]["codes"].as_array().unwrap().iter().map(|code| code.as_u64().unwrap()).collect();
    assert!(codes.len() == 64 && codes.iter().all(|code| *code < 50));
    let distinct = codes.iter().collect::<std::collections::BTreeSet<_>>().len();

    let output = folder.path().join("new folder/out.png");
    let lines = json_lines(&vilg(&["reconstruct", picture, "--json", "-o", output.to_str().unwrap()], &model));
    assert_eq!(lines[0]["codebook_used"], distinct);
    assert!(lines[0]["psnr"].as_f64().unwrap() > 0.0);
    assert_eq!(image::open(output).unwrap().into_rgb8().dimensions(), (16, 16));
}

#[test]
fn a_file_that_is_no_picture_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let text = folder.path().join("text.png");
    std::fs::write(&text, "not a picture").unwrap();
    for file in [text, folder.path().join("missing.png"), folder.path().to_owned()] {
        let output = vilg(&["tokenize", file.to_str().unwrap()], &model);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(file.to_str().unwrap()) && error.contains("hint: "), "{error}");
    }
}
