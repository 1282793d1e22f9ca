//! The recipes of docs/evaluation.md on tiny data, from the published files to the figure: `vilg data build`, `data encode`,
//! `train` with the shipped configurations at the size of the demo, `eval`. And adapters through the command line.

use crate::{
    commands::vilg,
    generate::{folder, image},
};
use serde_json::Value;
use std::{fs, path::Path, process::Command};

/// Runs `vilg` in `folder`; gives the last line of its output as JSON.
fn run(folder: &Path, args: &[&str]) -> Value {
    let output = vilg(args).arg("--json").current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {said}");
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// A file or folder of the repository.
fn ours(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// The values that make a configuration over `300m` one step of the demo model.
const TINY: &[&str] = &[
    "image_tokenizer.path=demo",
    "text.vocab=demo",
    "text.max_tokens=28",
    "model.layers=7",
    "model.hidden=320",
    "model.heads=5",
    "model.qk_norm=false",
    "train.init_from=demo",
    "train.steps=1",
    "train.warmup_steps=0",
    "train.accumulation=1",
    "train.precision=f32",
    "train.sample_every=0",
    "data.max_bad_ratio=0.5",
    "data.shuffle_buffer=0",
];

fn with<'a>(args: &[&'a str], sets: &[&'a str]) -> Vec<&'a str> {
    args.iter().copied().chain(sets.iter().flat_map(|set| ["--set", set])).collect()
}

#[test]
fn recipes_lead_from_published_files_to_figures() {
    let place = tempfile::tempdir().unwrap();
    let (folder, golden, images) = (place.path(), ours("tests/golden/build"), ours("tests/golden/build/images"));
    for (name, file, format, split, batch, figure) in [
        ("coco", "captions_val2014.json", "coco", None, "train.batch_size=2", None),
        (
            "aic-icc",
            "caption_train_annotations_20170902.json",
            "aic-icc",
            None,
            "train.caption_batch_size=2",
            Some("caption"),
        ),
        (
            "coco-cn",
            "imageid.human-written-caption.txt",
            "coco-cn",
            None,
            "train.caption_batch_size=2",
            Some("caption"),
        ),
        ("fmiqa", "FM-CH-QA.json", "fmiqa", Some("train"), "train.vqa_batch_size=2", Some("vqa")),
    ] {
        let source = format!("{golden}/{file}");
        let (data, codes) = (format!("data/{name}/train"), format!("data/{name}-codes/train"));
        let mut build = vec!["data", "build", &source, "--images", &images, "-o", &data, "--format", format];
        build.extend(split.iter().flat_map(|split| ["--split", split]));
        assert!(run(folder, &build)["samples"].as_u64().unwrap() > 0, "{name}");
        run(folder, &["data", "encode", &data, "--model", "demo", "--max-bad-ratio", "0.5", "-o", &codes]);
        let config = ours(&format!("configs/finetune-{name}.toml"));
        let done = run(folder, &with(&with(&["train", "--config", &config], TINY), &[batch]));
        let model = format!("runs/finetune-{name}");
        assert_eq!(done["model"], format!("{model}/model"));
        // One direction, and no other.
        let metrics = fs::read_to_string(folder.join(&model).join("metrics.jsonl")).unwrap();
        let line: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        let trained = ["image", "text", "answer"].into_iter().filter(|loss| line[loss].is_f64()).collect::<Vec<_>>();
        let loss = if figure.is_none() {
            "image"
        } else if name == "fmiqa" {
            "answer"
        } else {
            "text"
        };
        assert_eq!(trained, [loss], "{name}");
        match figure {
            Some("caption") => {
                let measured = run(folder, &["eval", "caption", "--data", &data, "--samples", "0", "--model", &model]);
                assert!(measured["metrics"]["CIDEr"].is_f64(), "{measured}");
            }
            Some(_) => {
                let measured = run(folder, &["eval", "vqa", "--data", &data, "--samples", "0", "--model", &model]);
                assert_eq!(measured["accuracy"]["all"]["of"].as_u64(), Some(3), "{measured}");
            }
            None => {}
        }
    }
}

#[test]
fn an_adapter_captions_as_its_merged_export_does() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    fs::create_dir(folder.join("images")).unwrap();
    for i in 0..3 {
        fs::copy(ours("src/demo/sample.png"), folder.join(format!("images/{i}.png"))).unwrap();
        fs::write(folder.join(format!("images/{i}.txt")), "立体风格的太阳").unwrap();
    }
    run(folder, &["data", "encode", "images", "--model", "demo", "-o", "data/images-codes"]);
    fs::write(
        folder.join("mine.toml"),
        "extends = \"emoji-lora\"\nname = \"mine\"\n[train]\nsteps = 6\nbatch_size = 1\ncaption_batch_size = 3\n\
         learning_rate = 0.02\nwarmup_steps = 0\nsample_every = 0\nema_decay = 0.0\nprecision = \"f32\"\n",
    )
    .unwrap();
    let planned = run(folder, &["train", "--config", "mine.toml", "--dry-run"]);
    let parts = planned["summary"]["parameters"].as_array().unwrap();
    let adapters = parts.iter().find(|part| part[0] == "low-rank adapters").unwrap()[1].as_u64().unwrap();
    // Rank 8 beside qkv, proj, fc1 and fc2 of 7 blocks of width 320.
    assert_eq!(adapters, 7 * 8 * 320 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)));
    let plan = run(folder, &["plan", "--config", "mine.toml", "--gpus", "1", "--on", "cpu"]);
    assert_eq!(plan["stages"][0]["bytes"]["moments"].as_u64(), Some(2 * 4 * adapters));
    assert_eq!(plan["stages"][0]["bytes"]["gradients"].as_u64(), Some(4 * adapters));

    assert_eq!(run(folder, &["train", "--config", "mine.toml"])["adapter"], "runs/mine/adapter");
    run(folder, &["export", "--adapter", "runs/mine", "-o", "merged"]);
    let sample = ours("src/demo/sample.png");
    let caption = |options: &[&str]| run(folder, &[&["caption", &sample], options].concat())["caption"].clone();
    let adapted = caption(&["--adapter", "runs/mine"]);
    assert_eq!(adapted, caption(&["--model", "merged"]));
    assert_eq!(adapted, "立体风格的太阳");
    assert_ne!(adapted, caption(&[]));

    // Another base: the merged model.
    let refused = |options: &[&str]| -> (Option<i32>, String) {
        let mut command: Command = vilg(&[&["caption", &sample, "--adapter", "runs/mine"], options].concat());
        let output = command.current_dir(folder).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = refused(&["--model", "merged"]);
    assert!(code == Some(2) && said.contains("was trained for another model than merged: for `emoji`"), "{said}");
    assert!(said.contains("\nhint: "), "{said}");
    let (code, said) = refused(&["--model", "merged", "--allow-mismatch"]);
    assert!(code == Some(0) && said.contains("warning: "), "{said}");
    let (code, said) = refused(&["--model", "runs/mine"]);
    assert!(code == Some(2) && said.contains("trained an adapter, not a model"), "{said}");
}

#[test]
fn a_run_starts_from_a_model_whose_tokenizer_was_trained_further_only_if_that_is_allowed() {
    let folder = folder();
    let at = folder.path();
    fs::create_dir(at.join("data")).unwrap();
    for i in 0..4u8 {
        image(i * 60).save(at.join(format!("data/{i}.png"))).unwrap();
        fs::write(at.join(format!("data/{i}.txt")), "红月").unwrap();
    }
    let steps = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=2", "train.caption_batch_size=2"];
    let train = |config: &str, sets: &[&str], more: &[&str]| -> Command {
        let sets = sets.iter().chain(&steps).flat_map(|set| ["--set", set]);
        let mut command = vilg(&["train", "--config", config, "--set", "train.ema_decay=0"]);
        command.args(sets).args(more).current_dir(at);
        command
    };
    let further = ["name=further", "train.init_from=tokenizer", "data.sources=[{path=\"data\"}]"];
    assert!(train("tokenizer/config.toml", &further, &[]).output().unwrap().status.success());
    run(at, &["data", "encode", "data", "--model", "runs/further", "-o", "codes"]);

    let next = [
        "name=next",
        "train.init_from=model",
        "text.vocab=model/vocab.txt",
        "image_tokenizer.path=runs/further/model",
        "data.sources=[{path=\"codes\"}]",
    ];
    let start = |more: &[&str]| -> (Option<i32>, String) {
        let output = train("model/config.toml", &next, more).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let message = "the model in train.init_from, `model`, was made with another image tokenizer";
    let (code, said) = start(&[]);
    assert!(
        code == Some(2) && said.contains(&format!("error: {message}")) && said.contains("--allow-mismatch"),
        "{said}"
    );
    assert!(!at.join("runs/next").exists());
    let (code, said) = start(&["--allow-mismatch"]);
    assert!(code == Some(0) && said.contains(&format!("warning: {message}")), "{said}");
    // What comes out belongs to the tokenizer of the new run.
    let codes = |folder: &str| -> Value {
        let text = fs::read(at.join(folder).join("manifest.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["codes"].clone()
    };
    assert_eq!(codes("runs/next/model"), codes("runs/further/model"));
    assert_ne!(codes("runs/next/model"), codes("model"));
}
