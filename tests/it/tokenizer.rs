//! `vilg tokenize`, `reconstruct`, `import` and `eval recon` on a small random tokenizer.

use candle_core::{DType, Device};
use safetensors::Dtype;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use vilg::{
    bundle::{self, Parts},
    config::{self, Config, Task},
    nn::{
        params::Scope,
        weights::{self, Values},
    },
    tokenizer::ImageTokenizer,
};

/// A tokenizer of images of 16 x 16 pixels.
pub fn tiny() -> config::ImageTokenizer {
    config::ImageTokenizer {
        image_size: 16,
        channels: 32,
        channel_multipliers: vec![1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 8,
        codebook_size: 50,
        code_dim: 4,
        ..config::ImageTokenizer::default()
    }
}

fn model(folder: &Path) -> PathBuf {
    let path = folder.join("model");
    write_random(&path, tiny());
    path
}

/// Writes the model folder of a tokenizer with random weights.
pub fn write_random(path: &Path, image_tokenizer: config::ImageTokenizer) {
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    ImageTokenizer::new(&scope, &image_tokenizer).unwrap();
    write_model(path, image_tokenizer, weights::of_params(&scope.params()).unwrap());
}

/// Writes the model folder of a tokenizer with these weights.
pub fn write_model(path: &Path, image_tokenizer: config::ImageTokenizer, weights: BTreeMap<String, Values>) {
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
fn images_become_codes_and_codes_images() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let image = folder.path().join("wide.png");
    image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, 90])).save(&image).unwrap();
    let image = image.to_str().unwrap();

    let lines = json_lines(&vilg(&["tokenize", image, image, "--json"], &model));
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0], lines[1]);
    assert_eq!(lines[0]["grid"], serde_json::json!([8, 8]));
    let codes: Vec<u64> = lines[0]["codes"].as_array().unwrap().iter().map(|code| code.as_u64().unwrap()).collect();
    assert!(codes.len() == 64 && codes.iter().all(|code| *code < 50));
    let distinct = codes.iter().collect::<std::collections::BTreeSet<_>>().len();

    let output = folder.path().join("new folder/out.png");
    let lines = json_lines(&vilg(&["reconstruct", image, "--json", "-o", output.to_str().unwrap()], &model));
    assert_eq!(lines[0]["codebook_used"], distinct);
    assert!(lines[0]["psnr"].as_f64().unwrap() > 0.0);
    assert_eq!(image::open(output).unwrap().into_rgb8().dimensions(), (16, 16));
}

#[test]
fn a_file_that_is_not_an_image_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let text = folder.path().join("text.png");
    std::fs::write(&text, "not an image").unwrap();
    for file in [text, folder.path().join("missing.png"), folder.path().to_owned()] {
        let output = vilg(&["tokenize", file.to_str().unwrap()], &model);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(file.to_str().unwrap()) && error.contains("hint: "), "{error}");
    }
}

/// A folder with two images and one file that is not an image.
fn images(folder: &Path) -> PathBuf {
    let path = folder.join("images");
    std::fs::create_dir_all(path.join("below")).unwrap();
    for (name, size) in [("a.png", (40, 30)), ("below/b.png", (16, 16))] {
        let colour = |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, 90]);
        image::RgbImage::from_fn(size.0, size.1, colour).save(path.join(name)).unwrap();
    }
    std::fs::write(path.join("bad.png"), "no image").unwrap();
    path
}

#[test]
fn a_folder_is_reconstructed_and_whole_images_keep_their_size() {
    let folder = tempfile::tempdir().unwrap();
    let (model, images) = (model(folder.path()), images(folder.path()));
    let out = folder.path().join("out");
    let args = ["reconstruct", images.to_str().unwrap(), "--whole", "--json", "-o", out.to_str().unwrap()];
    let output = vilg(&args, &model);
    assert_eq!(output.status.code(), Some(1), "one image is bad");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("bad.png") && told.contains("1 of 3 images"), "{told}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 2);
    let size = |name: &str| image::image_dimensions(out.join(name)).unwrap();
    assert_eq!((size("a.png"), size("below/b.png")), ((40, 30), (16, 16)));
}

#[test]
fn images_with_the_same_name_are_both_reconstructed_and_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let (model, input) = (model(folder.path()), folder.path().join("in"));
    std::fs::create_dir(&input).unwrap();
    let image = image::RgbImage::from_pixel(16, 16, image::Rgb([1, 2, 3]));
    for name in ["x.jpg", "x.png", "y.v1.png"] {
        image.save(input.join(name)).unwrap();
    }
    let reconstruct = |source: &Path, out: &Path| {
        vilg(&["reconstruct", source.to_str().unwrap(), "-o", out.to_str().unwrap()], &model)
    };
    let out = folder.path().join("out");
    let output = reconstruct(&input, &out);
    assert!(output.status.success(), "{output:?}");
    assert!(["x.png", "x_png.png", "y_v1.png"].iter().all(|name| out.join(name).exists()));

    let before = std::fs::read(input.join("x.png")).unwrap();
    for (source, out) in [(input.clone(), input.clone()), (input.join("x.png"), input.join("x.png"))] {
        let output = reconstruct(&source, &out);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    assert_eq!(std::fs::read(input.join("x.png")).unwrap(), before);
}

#[test]
fn tokenizers_are_compared_on_the_same_images() {
    let folder = tempfile::tempdir().unwrap();
    let (model, images) = (model(folder.path()), images(folder.path()));
    std::fs::remove_file(images.join("bad.png")).unwrap();
    let sheet = folder.path().join("sheet.png");
    let (data, other) = (images.to_str().unwrap(), model.to_str().unwrap());
    let args = ["eval", "recon", "--data", data, "--model", other, "--json", "--sheet", sheet.to_str().unwrap()];
    let lines = json_lines(&vilg(&args, &model));
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["result"], lines[1]["result"]);
    let result = &lines[0]["result"];
    assert!(result["images"] == 2 && result["lpips"].is_null() && result["psnr"].as_f64().unwrap() > 0.0);
    assert!((0.02..=1.0).contains(&result["codebook_used"].as_f64().unwrap()), "{result}");
    assert_eq!(image::image_dimensions(&sheet).unwrap(), (2 * 16 + 4, 3 * 16 + 2 * 4));
    let missing = vilg(&["eval", "recon", "--data", data, "--lpips", data], &model);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no perceptual network"), "{missing:?}");
}

#[test]
fn other_files_are_refused_as_checkpoints_and_no_code_is_run() {
    let folder = tempfile::tempdir().unwrap();
    let (source, trace, out) = (folder.path().join("a.ckpt"), folder.path().join("trace"), folder.path().join("out"));
    let import = |bytes: &[u8], kind: &str| {
        std::fs::write(&source, bytes).unwrap();
        let args = ["import", kind, source.to_str().unwrap(), out.to_str().unwrap()];
        let output = Command::new(env!("CARGO_BIN_EXE_vilg")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let command = format!("touch {}", trace.display());
    let mut hostile = b"\x80\x02cposix\nsystem\nX".to_vec();
    hostile.extend((command.len() as u32).to_le_bytes());
    hostile.extend(command.bytes());
    hostile.extend(b"\x85R.");
    let told = import(&hostile, "taming-vqgan");
    assert!(told.contains("would call `posix.system`") && told.contains("hint: "), "{told}");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let torch = std::fs::read(golden.join("torch_zip.pth")).unwrap();
    assert!(import(&torch[..torch.len() / 2], "lpips").contains("cannot read"));
    assert!(import(&torch, "lpips").contains("lacks 31 of 31 tensors"), "{}", import(&torch, "lpips"));
    assert!(import(&torch, "inception").contains("not an InceptionV3 of pytorch-fid or torchvision"));
    assert!(!trace.exists() && !out.exists());
}
