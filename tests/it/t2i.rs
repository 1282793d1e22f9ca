//! `vilg t2i`: completion, negative prompts, and prompts that the model does not know.

use crate::{
    commands::vilg,
    generate::{folder, image},
};
use image::{Rgb, RgbImage};
use std::{fs, path::Path};

fn generate(folder: &Path, args: &[&str]) -> Result<Vec<u8>, String> {
    let all = [&["t2i", "红月", "--model", "model", "-o", "out.png"], args].concat();
    let output = vilg(&all).current_dir(folder).output().unwrap();
    match output.status.code() {
        Some(0) => Ok(fs::read(folder.join("out.png")).unwrap()),
        code => Err(format!("{code:?} {}", String::from_utf8(output.stderr).unwrap())),
    }
}

#[test]
fn an_image_is_completed_and_a_negative_prompt_needs_guidance() {
    let folder = folder();
    let at = folder.path();
    image(9).save(at.join("in.png")).unwrap();
    let free = generate(at, &["--seed", "4", "--guidance", "1"]).unwrap();
    let completed = generate(at, &["--seed", "4", "--guidance", "1", "--complete", "in.png", "--rows", "2"]).unwrap();
    let half = generate(at, &["--seed", "4", "--guidance", "1", "--complete", "in.png"]).unwrap();
    assert!(free != completed && completed == half, "half of four rows are two");
    for (args, what) in [
        (&["--complete", "in.png", "--rows", "0"][..], "--rows 0: an image has 4 rows of codes"),
        (&["--complete", "in.png", "--rows", "4"], "keep 1 to 3 rows"),
        (&["--complete", "none.png"], "none.png"),
        (&["--rows", "2"], "--complete"),
        (&["--negative", "星", "--guidance", "1"], "no effect without guidance"),
    ] {
        let error = generate(at, args).unwrap_err();
        assert!(error.contains(what) && error.contains("hint:"), "{args:?}: {error}");
    }
    assert!(generate(at, &["--negative", "星", "--guidance", "2"]).is_ok());
}

/// `tests/golden/demo.png` is from an earlier release, with the same command on a processor with AVX-512. Other processors
/// may round the decoder's sums differently.
#[test]
fn the_demo_generates_the_same_image_as_earlier_versions() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("demo.png");
    let args =
        ["t2i", "立体风格的红苹果", "--seed", "7", "-n", "2", "--precision", "f32", "-o", file.to_str().unwrap()];
    let output = vilg(&args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo.png");
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        assert!(fs::read(&file).unwrap() == fs::read(&golden).unwrap(), "the PNG has other bytes");
    }
    let [ours, golden] = [&file, &golden].map(|path| image::open(path).unwrap().to_rgb8());
    assert_eq!(ours.dimensions(), golden.dimensions());
    let largest = ours.iter().zip(golden.iter()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(largest <= Some(1), "values differ by up to {largest:?}");
}

#[test]
fn guidance_and_temperature_may_change_from_code_to_code() {
    let folder = folder();
    let at = folder.path();
    let drawn = |args: &[&str]| generate(at, &[&["--seed", "4"], args].concat()).unwrap();
    let warm = drawn(&["--guidance", "90", "--temperature", "1"]);
    let constant = ["--guidance-schedule", "constant", "--temperature-schedule", "constant"];
    assert!(drawn(&[&["--guidance", "90", "--temperature", "1"], &constant[..]].concat()) == warm);
    // From 90 to 90 is no change; from 1 to 90 is one.
    let ramp = ["--guidance", "90", "--temperature", "1", "--guidance-schedule", "linear"];
    assert!(drawn(&[&ramp[..], &["--guidance-start", "90"]].concat()) == warm);
    assert!(drawn(&ramp) != warm);
    let cooled = ["--guidance", "3", "--temperature", "0", "--temperature-schedule", "cosine"];
    assert!(drawn(&cooled) != drawn(&cooled[..4]), "the first codes are drawn at temperature 1");
    // Guidance at the beginning alone is guidance too.
    let early = ["--negative", "星", "--guidance", "1", "--guidance-schedule", "linear", "--guidance-start", "4"];
    assert!(generate(at, &early).is_ok());
    for (args, what) in [
        (&["--guidance-start", "2"][..], "--guidance-start has no effect on a constant guidance"),
        (&["--temperature-start", "2"], "--temperature-schedule linear"),
        (&["--guidance-schedule", "quadratic"], "linear"),
        (&["--guidance-schedule", "linear", "--guidance-start", "101"], "from 0 to 100"),
    ] {
        let error = generate(at, args).unwrap_err();
        assert!(error.contains(what) && error.starts_with("Some(2)"), "{args:?}: {error}");
    }
}

#[test]
fn the_demo_says_what_it_does_not_know() {
    let folder = folder();
    let at = folder.path();
    let run = |args: &[&str]| {
        let output = vilg(&[&["t2i", "--json", "-o", "out.png"], args].concat()).current_dir(at).output().unwrap();
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (found["images"].clone(), String::from_utf8(output.stderr).unwrap())
    };
    let (images, said) = run(&["红苹果，立体风格", "-n", "2"]);
    assert!(said.is_empty() && images[0]["match"].as_f64().unwrap() > 0.5, "{said} {images}");
    let (images, said) = run(&["孤舟蓑笠翁，独钓寒江雪", "-n", "2"]);
    assert_eq!(said.matches("warning: the image may not show “孤舟蓑笠翁，独钓寒江雪”").count(), 1, "{said}");
    assert!(images[1]["match"].as_f64().unwrap() < 0.2, "{images}");
    // The built-in matcher knows nothing of another model's images.
    let (images, said) = run(&["红月", "--model", "model"]);
    assert!(said.is_empty() && images[0]["match"].is_null(), "{said} {images}");
}

#[test]
fn the_demo_says_when_a_caption_may_be_wrong() {
    let folder = folder();
    let at = folder.path();
    RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8, (x * 37 % 251) as u8, (y * 91 % 241) as u8]))
        .save(at.join("noise.png"))
        .unwrap();
    let run = |image: &str, more: &[&str]| {
        let output = vilg(&[&["caption", image, "--json"], more].concat()).current_dir(at).output().unwrap();
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (found["match"].clone(), String::from_utf8(output.stderr).unwrap())
    };
    let (score, said) = run("noise.png", &[]);
    assert!(
        said.starts_with("warning: noise.png: the caption may be wrong") && score.as_f64().unwrap() < 0.2,
        "{said}"
    );
    let (score, said) = run(concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/sample.png"), &[]);
    assert!(said.is_empty() && score.as_f64().unwrap() > 0.5, "{said} {score}");
    let (score, said) = run("noise.png", &["--model", "model"]);
    assert!(said.is_empty() && score.is_null(), "{said}");
}
