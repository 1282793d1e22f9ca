//! Wrong use and hostile files from outside: the program's exit code, and what it leaves alone.

use crate::{
    tokenizer::{tiny, write_model},
    train,
};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use vilg::{
    nn::{params::Scope, weights},
    tokenizer::ImageTokenizer,
};

fn vilg(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vilg")).args(args).current_dir(folder).output().unwrap()
}

/// Exit code and stderr; a panic is never right.
fn ended(output: &Output) -> (Option<i32>, String) {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    (output.status.code(), error)
}

fn succeeds(folder: &Path, args: &[&str]) -> String {
    let output = vilg(folder, args);
    assert_eq!(ended(&output).0, Some(0), "{args:?}: {}", ended(&output).1);
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn export_into_the_working_folder_and_with_a_trailing_slash() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().join("here");
    fs::create_dir(&here).unwrap();
    // The second one replaces the first.
    for _ in 0..2 {
        succeeds(&here, &["export", "--model", "demo", "-o", "."]);
        assert!(here.join("model.safetensors").exists() && here.join("image-tokenizer/config.toml").exists());
    }
    let names = |folder: &Path| fs::read_dir(folder).unwrap().count();
    let count = names(&here);
    succeeds(&here, &["export", "--model", ".", "-o", "../there/"]);
    assert_eq!((names(&folder.path().join("there")), names(folder.path())), (count, 2));
    fs::write(here.join("letter.txt"), "dear").unwrap();
    let (code, error) = ended(&vilg(&here, &["export", "--model", "demo", "-o", "."]));
    assert!(code != Some(0) && error.contains("letter.txt") && error.contains("hint: "), "{code:?} {error}");
    assert_eq!((names(&here), fs::read(here.join("letter.txt")).unwrap()), (count + 1, b"dear".to_vec()));
}

#[test]
fn a_reordered_vocabulary_is_refused_unless_a_mismatch_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    succeeds(folder, &["export", "--model", "demo", "-o", "model"]);
    let vocab = folder.join("model/vocab.txt");
    let mut words: Vec<String> = fs::read_to_string(&vocab).unwrap().lines().map(str::to_owned).collect();
    let end = words.len() - 1;
    words.swap(end, end - 1);
    fs::write(&vocab, words.join("\n") + "\n").unwrap();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/sample.png");
    let args = ["tokenize", sample, "--model", "model"];
    let (code, error) = ended(&vilg(folder, &args));
    assert!(code == Some(1) && error.contains("vocab.txt") && error.contains("--allow-mismatch"), "{code:?} {error}");
    let (code, error) = ended(&vilg(folder, &[&args[..], &["--allow-mismatch"]].concat()));
    assert!(code == Some(0) && error.contains("warning: ") && error.contains("vocab.txt"), "{code:?} {error}");
}

/// The model folder of a small tokenizer all of whose weights are `weight`.
fn constant_model(path: &Path, weight: f32) {
    let image_tokenizer = tiny();
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    ImageTokenizer::new(&scope, &image_tokenizer).unwrap();
    let constant = |shape: &candle_core::Shape| Tensor::full(weight, shape, &Device::Cpu).unwrap();
    let params = scope.params();
    let weights = params.iter().map(|(name, var)| {
        let sign = if name.len().is_multiple_of(2) { 1.0 } else { -1.0 };
        (name.clone(), weights::of_tensor(&(constant(var.shape()) * sign).unwrap()).unwrap())
    });
    let weights: BTreeMap<_, _> = weights.collect();
    write_model(path, image_tokenizer, weights);
}

#[test]
fn an_image_tokenizer_that_overflows_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    image::RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8 * 15, y as u8 * 15, 90]))
        .save(folder.join("a.png"))
        .unwrap();
    constant_model(&folder.join("small"), 1e-3);
    succeeds(folder, &["tokenize", "a.png", "--model", "small"]);
    constant_model(&folder.join("large"), 3e38);
    for args in
        [["tokenize", "a.png", "--model", "large", "--json"], ["reconstruct", "a.png", "--model", "large", "-oout.png"]]
    {
        let output = vilg(folder, &args);
        let (code, error) = ended(&output);
        assert!(code == Some(1) && error.contains("not finite") && error.contains("hint: "), "{code:?} {error}");
        assert!(output.stdout.is_empty() && !folder.join("out.png").exists());
    }
}

#[test]
fn a_run_streams_its_steps_and_records_its_start() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    train::prepare(folder);
    let args = ["train", "--config", "tiny.toml", "--json", "--set", "train.steps=6"];
    let text = succeeds(folder, &args);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<u64> = lines.iter().filter_map(|line| line["step"].as_u64()).collect();
    assert!(steps.starts_with(&[1, 2, 3, 4, 5, 6]), "{text}");
    assert!(lines[0]["l1"].is_number() && lines[0]["time"].is_string(), "{text}");

    let launches = fs::read_to_string(folder.join("runs/tiny/launches.jsonl")).unwrap();
    let launch: Value = serde_json::from_str(launches.lines().next().unwrap()).unwrap();
    let version: Value = serde_json::to_value(vilg::report::version()).unwrap();
    assert_eq!(launch["program"], version);
    assert!(version["version"].is_string() && version.get("commit").is_some(), "{version}");
    let command: Vec<&str> = launch["command"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    assert_eq!(command[1..], args);
    assert!(!launch["host"].as_str().unwrap().is_empty() && launch["time"].is_string(), "{launch}");

    // A manifest that would have files of elsewhere read is refused, wherever they are.
    let checkpoint = folder.join("runs/tiny/checkpoints/step-5");
    let manifest = checkpoint.join("manifest.json");
    let whole = fs::read_to_string(&manifest).unwrap();
    fs::copy(checkpoint.join("state.json"), folder.join("runs/tiny/checkpoints/x")).unwrap();
    for name in ["../x", "/etc/passwd", "below/x", "..", "."] {
        let mut listed: Value = serde_json::from_str(&whole).unwrap();
        listed["files"][name] = serde_json::json!({ "bytes": 1, "blake3": "0" });
        fs::write(&manifest, listed.to_string()).unwrap();
        let resume = checkpoint.to_str().unwrap();
        let (code, error) = ended(&vilg(folder, &["train", "--config", "tiny.toml", "--resume", resume]));
        assert!(code == Some(1) && error.contains(&format!("lists `{name}`")), "{name}: {code:?} {error}");
    }
}

/// Numbers beyond all bounds are wrong usage: no panic, no abort for lack of memory.
#[test]
fn extreme_sizes_are_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    train::prepare(folder);
    for extreme in
        ["9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "-1", "0"]
    {
        let sets = ["data.prefetch", "train.batch_size", "data.workers", "image_tokenizer.image_size", "model.layers"];
        let mut all: Vec<Vec<String>> = Vec::new();
        for set in sets {
            let set = format!("--set={set}={extreme}");
            all.push(["config", "check", "--config", "tiny.toml", &set].map(str::to_owned).into());
            all.push(["train", "--config", "tiny.toml", &set].map(str::to_owned).into());
        }
        for args in [
            ["data", "vocab", "images", "-ov.txt", "--size"],
            ["data", "encode", "images", "-mdemo", "-oout"],
            ["t2i", "moon", "-oa.png", "--seed=1", "-n"],
            ["t2i", "moon", "-oa.png", "--seed=1", "--best-of"],
            ["caption", "images/0.png", "--seed=1", "--temperature=1", "--beam"],
            ["caption", "images/0.png", "--seed=1", "--temperature=1", "-n"],
        ] {
            let mut args = args.map(str::to_owned).to_vec();
            match args[1].as_str() {
                "encode" => args.push(format!("--batch={extreme}")),
                _ => {
                    let last = args.pop().unwrap();
                    args.push(if last.starts_with("--") {
                        format!("{last}={extreme}")
                    } else {
                        format!("{last}{extreme}")
                    });
                }
            }
            all.push(args);
        }
        for args in all {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let (code, error) = ended(&vilg(folder, &args));
            assert_eq!(code, Some(2), "{args:?}: {error}");
        }
    }
    assert!(!folder.join("out").exists() && !folder.join("runs").exists());
}

#[test]
fn encoding_what_cannot_be_used_is_a_failure_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::create_dir(folder.join("in")).unwrap();
    fs::write(folder.join("in/a.png"), "no image").unwrap();
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let gzip = cases.join("gzip_named.tar");
    for (source, cause) in [("in", "bad-image"), (gzip.to_str().unwrap(), "not-a-tar")] {
        // What was not encoded does not count as finished.
        for _ in 0..2 {
            let output = vilg(folder, &["data", "encode", source, "-mdemo", "-oout", "--max-bad-ratio=1"]);
            let (code, error) = ended(&output);
            assert!(code == Some(1) && error.contains(cause) && error.contains("hint: "), "{code:?} {error}");
            assert!(!String::from_utf8_lossy(&output.stdout).contains("1 shards were finished"));
            let tars = fs::read_dir(folder.join("out")).map_or(0, |entries| {
                entries
                    .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "tar"))
                    .count()
            });
            assert_eq!(tars, 0);
        }
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_without_a_writer_does_not_hang() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    train::prepare(folder);
    assert!(Command::new("mkfifo").arg(folder.join("fifo")).status().unwrap().success());
    for args in [
        &["config", "check", "--config", "fifo"][..],
        &["train", "--config", "fifo"],
        &["plan", "--config", "fifo", "--gpus=1", "--gpu-memory=80"],
        &[
            "train",
            "--config",
            "tiny.toml",
            "--set=text.vocab=fifo",
            "--set=task=generator",
            "--set=image_tokenizer.path=demo",
        ],
        &["import", "taming-vqgan", "fifo", "out"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vilg"))
            .args(args)
            .current_dir(folder)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("{args:?} waits");
            }
            sleep(Duration::from_millis(20));
        };
        assert!(matches!(status.code(), Some(1 | 2)), "{args:?}: {status}");
    }
}

#[cfg(unix)]
#[test]
fn devices_and_links_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("mine"), "dear").unwrap();
    std::os::unix::fs::symlink("mine", folder.join("link")).unwrap();
    std::os::unix::fs::symlink("/dev/full", folder.join("full")).unwrap();
    for output in ["link", "full", "/dev/full"] {
        for args in [&["export", "--model=demo", "--names=llamagen-vq"][..], &["export", "--model=demo", "--force"]] {
            let (code, error) = ended(&vilg(folder, &[args, &["-o", output]].concat()));
            assert!(code != Some(0) && error.contains(output), "{output}: {code:?} {error}");
        }
    }
    assert_eq!(fs::read(folder.join("mine")).unwrap(), b"dear");
    assert!(folder.join("full").is_symlink() && folder.join("link").is_symlink());
}
