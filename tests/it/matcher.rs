//! Commands that use a matcher, on a tiny one with random weights: score, evaluation, calibration.

use crate::commands::vilg;
use image::RgbImage;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use vilg::{
    bundle::{self, Bundle, Parts},
    config::{Config, Matcher, Precision, Task},
    generate::Matching,
    nn::{params::Scope, weights},
    random::Random,
    text::WordPiece,
};

const WORDS: [&str; 8] = ["苹果", "小狗", "汽车", "月亮", "房子", "小船", "大树", "飞机"];
const COLORS: [&str; 6] = ["红色的", "绿色的", "蓝色的", "黄色的", "白色的", "黑色的"];

/// Writes a matcher's model folder.
pub(crate) fn model(folder: &Path) -> PathBuf {
    let captions: Vec<String> = captions();
    let vocab = vilg::text::train(captions.iter().map(String::as_str), 80).unwrap();
    let mut config = Config { task: Task::Matcher, ..Config::default() };
    config.text.max_tokens = 12;
    config.matcher = Matcher {
        image_size: 16,
        patch_size: 4,
        image_layers: 2,
        image_hidden: 32,
        image_heads: 2,
        text_layers: 2,
        text_hidden: 32,
        text_heads: 2,
        embedding: 16,
        ..Matcher::default()
    };
    let scope = Scope::from_seed(3, candle_core::DType::F32, &candle_core::Device::Cpu);
    let size = WordPiece::parse(&vocab).unwrap().vocab_size();
    vilg::model::Matcher::new(&scope, &config.matcher, (size, 12), Precision::F32).unwrap();
    // Large weights, so that inputs do not look alike.
    let larger = |name: &String, tensor: &candle_core::Tensor| {
        let count = if name.contains("norm") || name == "logit_scale" { 0 } else { tensor.elem_count() as u64 };
        let values: Vec<f32> = (0..count).map(|i| 0.2 * Random::keyed(3, name, 0, i).normal() as f32).collect();
        let random = || candle_core::Tensor::from_vec(values, tensor.shape(), tensor.device()).unwrap();
        let tensor = if count > 0 { random() } else { tensor.clone() };
        weights::of_tensor(&tensor).unwrap()
    };
    let weights = scope.params().iter().map(|(name, param)| (name.clone(), larger(name, param))).collect();
    let attribution = "Ours.".to_owned();
    let parts = Parts { config: &config, weights, vocab: Some(vocab), attribution, image_tokenizer: None };
    let path = folder.join("model");
    bundle::write(&path, &parts, safetensors::Dtype::F32).unwrap();
    path
}

fn captions() -> Vec<String> {
    COLORS.iter().flat_map(|color| WORDS.iter().map(move |word| format!("{color}{word}"))).collect()
}

fn matching(model: &Path) -> Matching {
    Matching::open(&Bundle::open(model.to_str().unwrap()).unwrap()).unwrap()
}

fn image(number: u32) -> RgbImage {
    RgbImage::from_fn(20, 16, |x, y| {
        let wave = |a: u32| ((x * (a + number % 7) + y * (number % 5) + number * 37 * a) % 256) as u8;
        image::Rgb([wave(1), wave(5), wave(11)])
    })
}

/// Cosines of images and texts.
pub(crate) fn cosines(model: &Path, images: &[RgbImage], texts: &[String]) -> Vec<Vec<f32>> {
    let matching = matching(model);
    let (images, texts) = (matching.embed_images(images).unwrap(), matching.embed_texts(texts).unwrap());
    Matching::cosines(&images, &texts).unwrap().to_vec2().unwrap()
}

/// A folder of images, each with the caption that the matcher finds most like it, compared with other captions.
pub(crate) fn data(folder: &Path, model: &Path, count: usize) -> (PathBuf, Vec<RgbImage>, Vec<String>) {
    let path = folder.join("data");
    fs::create_dir_all(&path).unwrap();
    let (images, texts): (Vec<RgbImage>, Vec<String>) = ((0..count as u32).map(image).collect(), captions());
    let cosines = cosines(model, &images, &texts);
    let mean = |column: usize| cosines.iter().map(|row| row[column]).sum::<f32>() / count as f32;
    let means: Vec<f32> = (0..texts.len()).map(mean).collect();
    let best = |row: &Vec<f32>| {
        let over = |column: &usize| row[*column] - means[*column];
        (0..texts.len()).max_by(|a, b| over(a).total_cmp(&over(b))).unwrap()
    };
    let chosen: Vec<String> = cosines.iter().map(|row| texts[best(row)].clone()).collect();
    for (number, (image, text)) in images.iter().zip(&chosen).enumerate() {
        image.save(path.join(format!("{number:03}.png"))).unwrap();
        fs::write(path.join(format!("{number:03}.txt")), text).unwrap();
    }
    (path, images, chosen)
}

pub(crate) fn run(args: &[&str], paths: &[&Path]) -> Output {
    vilg(args).args(paths).output().unwrap()
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(output)))
}

#[test]
fn scores_of_images_and_texts() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, images, _) = data(folder.path(), &model, 3);
    let files: Vec<PathBuf> = (0..3).map(|i| data.join(format!("{i:03}.png"))).collect();
    let texts = ["红色的苹果".to_owned(), "小狗".to_owned()];
    let score = |paths: &[PathBuf]| {
        let mut command = vilg(&["score", "--json", "--model"]);
        command.arg(&model).args(paths).arg("--").args(&texts).output().unwrap()
    };
    let lines = |output: &Output| -> Vec<Value> {
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let output = score(&files);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output).matches("warning:").count(), 1);
    assert!(said(&output).contains("eval matcher"));
    let (found, expected) = (lines(&output), cosines(&model, &images, &texts));
    assert_eq!(found.len(), 3);
    for ((line, expected), file) in found.iter().zip(&expected).zip(&files) {
        assert_eq!(line["image"], file.to_str().unwrap());
        for (i, cosine) in expected.iter().enumerate() {
            let score = &line["scores"][i];
            assert_eq!(score["text"], texts[i].as_str());
            assert!((score["cosine"].as_f64().unwrap() - f64::from(*cosine)).abs() < 1e-5 && score["score"].is_null());
        }
    }
    Bundle::open(model.to_str().unwrap()).unwrap().calibrate([3.0, -0.5]).unwrap();
    let output = score(&[vec![folder.path().join("missing.png")], files[..1].to_vec()].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("missing.png") && !said(&output).contains("warning:"));
    let [line] = &lines(&output)[..] else { panic!("one image can be read") };
    let pair = &line["scores"][1];
    let expected = 1.0 / (1.0 + (0.5 - 3.0 * pair["cosine"].as_f64().unwrap()).exp());
    assert!((pair["score"].as_f64().unwrap() - expected).abs() < 1e-12);
    let table = vilg(&["score", "--model"]).arg(&model).arg(&files[0]).args(["--", "小狗"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.starts_with("image ") && table.lines().count() == 2 && table.contains("小狗"), "{table}");
}

#[test]
fn wrong_models_and_texts_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/sample.png");
    let fails = |model: &str, text: &str| {
        let output = vilg(&["score", "--model", model]).arg(&image).args(["--", text]).output().unwrap();
        assert!(!output.status.success() && said(&output).starts_with("error: "), "{}", said(&output));
        (output.status.code(), said(&output))
    };
    let name = model.to_str().unwrap();
    let (code, text) = fails(name, " ");
    assert!(code == Some(2) && text.contains("a text is empty"), "{text}");
    let generator = folder.path().join("generator");
    assert!(vilg(&["export", "-o"]).arg(&generator).output().unwrap().status.success());
    let (code, text) = fails(generator.to_str().unwrap(), "小狗");
    assert!(code == Some(2) && text.contains("not a matcher"), "{text}");
    let (code, text) = fails("nowhere", "小狗");
    assert!(code == Some(2) && text.contains("no model folder"), "{text}");
    let weights_file = model.join("model.safetensors");
    let whole = fs::read(&weights_file).unwrap();
    let mut damaged = whole.clone();
    let end = damaged.len();
    damaged[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::remove_file(model.join("manifest.json")).unwrap();
    fs::write(&weights_file, damaged).unwrap();
    assert!(fails(name, "小狗").1.contains("not finite"));
    fs::write(&weights_file, whole).unwrap();
    let vocab = fs::read_to_string(model.join("vocab.txt")).unwrap();
    fs::write(model.join("vocab.txt"), format!("{vocab}另\n")).unwrap();
    assert!(fails(name, "小狗").1.contains("does not fit the config.toml and vocab.txt"));
}

/// Recall by sorting, text by text.
fn brute_recall(cosines: &[Vec<f32>], captions: &[String], first: usize) -> [f64; 2] {
    let count = captions.len();
    let among = |by_query: &dyn Fn(usize, usize) -> f32| {
        let hit = |query: &usize| {
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|a, b| by_query(*query, *b).total_cmp(&by_query(*query, *a)));
            order[..first].iter().any(|answer| captions[*answer] == captions[*query])
        };
        (0..count).filter(hit).count() as f64 / count as f64
    };
    [among(&|image, text| cosines[image][text]), among(&|text, image| cosines[image][text])]
}

#[test]
fn retrieval_is_that_of_brute_force() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, images, captions) = data(folder.path(), &model, 30);
    let found =
        json(&run(&["eval", "matcher", "--candidates", "5", "--json", "--model"], &[&model, "--data".as_ref(), &data]));
    let cosines = cosines(&model, &images, &captions);
    for (key, first) in [("r1", 1), ("r5", 5), ("r10", 10)] {
        let expected = brute_recall(&cosines, &captions, first);
        for (direction, expected) in ["image_to_text", "text_to_image"].iter().zip(expected) {
            let rate = found["retrieval"][direction][key]["rate"].as_f64().unwrap();
            assert!((rate - expected).abs() < 1e-9, "{direction} {key}: {rate}, {expected}");
        }
    }
    assert_eq!(found["candidates"]["image_to_text"]["of"], 30);
    assert!(found["scores"].is_null());
    let few = run(&["eval", "matcher", "--candidates", "31", "--model"], &[&model, "--data".as_ref(), &data]);
    assert!(few.status.code() == Some(2) && said(&few).contains("--candidates 31"));
    let one = run(&["eval", "matcher", "--samples", "1", "--model"], &[&model, "--data".as_ref(), &data]);
    assert!(one.status.code() == Some(1) && said(&one).contains("at least two samples"), "{}", said(&one));
    let none = run(&["eval", "matcher", "--data", "nowhere", "--model"], &[&model]);
    assert!(none.status.code() == Some(2) && said(&none).contains("nowhere"), "{}", said(&none));
}

#[test]
fn a_calibrated_model_scores_pairs_above_others() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, ..) = data(folder.path(), &model, 60);
    let plot = folder.path().join("plot.svg");
    let few =
        run(&["eval", "matcher", "--calibrate", "--samples", "9", "--model"], &[&model, "--data".as_ref(), &data]);
    assert!(few.status.code() == Some(1) && said(&few).contains("at least 20"), "{}", said(&few));
    let early = run(&["eval", "matcher", "--plot"], &[&plot, "--model".as_ref(), &model, "--data".as_ref(), &data]);
    assert!(early.status.code() == Some(2) && said(&early).contains("not calibrated"), "{}", said(&early));
    assert!(!plot.exists());
    let demo = run(&["eval", "matcher", "--calibrate", "--data"], &[&data]);
    assert!(demo.status.code() == Some(2) && said(&demo).contains("part of the program"), "{}", said(&demo));
    let found = json(&run(
        &["eval", "matcher", "--calibrate", "--json", "--plot"],
        &[&plot, "--model".as_ref(), &model, "--data".as_ref(), &data],
    ));
    let found = &found["result"];
    assert_eq!(found["fitted_on"], 30);
    let (slope, bins) = (found["calibration"][0].as_f64().unwrap(), found["reliability"]["bins"].as_array().unwrap());
    assert!(slope > 0.0 && bins.len() == 10, "{found}");
    assert_eq!(bins.iter().map(|bin| bin["count"].as_u64().unwrap()).sum::<u64>(), 60);
    assert!(fs::read_to_string(&plot).unwrap().starts_with("<svg"));
    let bundle = Bundle::open(model.to_str().unwrap()).unwrap();
    assert_eq!(bundle.config.matcher.calibration[0], slope);
    assert_eq!(bundle.attribution(), "Ours.");
    let scores = &json(&run(&["eval", "matcher", "--json", "--model"], &[&model, "--data".as_ref(), &data]))["scores"];
    assert_eq!(scores["pairs"], 120);
    assert!(scores["recall"]["rate"].as_f64().unwrap() > 0.5, "{scores}");
}

#[test]
fn classes_are_found_by_their_texts() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let classes = folder.path().join("classes.txt");
    fs::write(&classes, WORDS.join("\n")).unwrap();
    let texts: Vec<String> = WORDS.iter().map(|word| format!("一张{word}的图片")).collect();
    let images: Vec<RgbImage> = (0..12).map(image).collect();
    let mut right = 0;
    for (number, cosines) in cosines(&model, &images, &texts).iter().enumerate() {
        let best = (0..8).max_by(|a, b| cosines[*a].total_cmp(&cosines[*b])).unwrap();
        // Every third one gets another label.
        let label = if number % 3 == 0 { (best + 1) % 8 } else { best };
        right += usize::from(label == best);
        let place = folder.path().join("images").join(WORDS[label]);
        fs::create_dir_all(&place).unwrap();
        images[number].save(place.join(format!("{number}.png"))).unwrap();
    }
    let (data, arguments) = (folder.path().join("images"), ["eval", "matcher", "--json", "--classes"]);
    let eval = |extra: &[&str]| {
        let mut command = vilg(&arguments);
        command.arg(&classes).arg("--model").arg(&model).arg("--data").arg(&data).args(extra).output().unwrap()
    };
    let found = &json(&eval(&[]))["classification"];
    assert_eq!((found["top1"]["hits"].as_u64(), found["top1"]["of"].as_u64()), (Some(right as u64), Some(12)));
    assert_eq!(found["classes"], 8);
    let none = eval(&["--label", "class"]);
    assert!(none.status.code() == Some(1) && said(&none).contains("no sample has the name"), "{}", said(&none));
    fs::write(&classes, "苹果\n苹果\n").unwrap();
    assert!(said(&eval(&[])).contains("twice"));
}
