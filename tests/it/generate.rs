//! Text to image, captioning and evaluation through the command line, with a small untrained model.

use crate::commands::vilg;
use image::{Rgb, RgbImage};
use serde_json::Value;
use std::{fs, path::Path, process::Output};
use tempfile::TempDir;
use vilg::{
    bundle::{self, Bundle, Parts},
    config::{Config, Task},
    data::image_file::{png, write_png},
    model::Generator,
    nn::{params::Scope, weights},
    text::WordPiece,
    tokenizer::ImageTokenizer,
};

const VOCAB: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n一\n弯\n月\n星\n红\n，\n";

/// A folder with a model in `model/` and, over the same image tokenizer, an end-to-end generator in `end-to-end/`.
pub(crate) fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config { task: Task::ImageTokenizer, ..Config::default() };
    config.text.max_tokens = 8;
    (config.model.layers, config.model.hidden, config.model.heads) = (2, 8, 2);
    let tokenizer = &mut config.image_tokenizer;
    (tokenizer.image_size, tokenizer.channels, tokenizer.channel_multipliers) = (16, 32, vec![1, 1, 1]);
    (tokenizer.residual_blocks, tokenizer.attention_sides) = (1, vec![]);
    (tokenizer.latent_channels, tokenizer.code_dim, tokenizer.codebook_size) = (4, 4, 16);
    let scope = |seed| Scope::from_seed(seed, candle_core::DType::F32, &candle_core::Device::Cpu);
    let write = |name: &str, config: &Config, scope: &Scope, image_tokenizer: Option<Bundle>| {
        let vocab = image_tokenizer.is_some().then(|| VOCAB.to_owned());
        let parts = Parts {
            config,
            weights: weights::of_params(&scope.params()).unwrap(),
            vocab,
            attribution: String::new(),
            image_tokenizer,
        };
        bundle::write(&folder.path().join(name), &parts, safetensors::Dtype::F32).unwrap();
    };
    let of_tokenizer = scope(1);
    ImageTokenizer::new(&of_tokenizer, &config.image_tokenizer).unwrap();
    write("tokenizer", &config, &of_tokenizer, None);
    let words = WordPiece::parse(VOCAB).unwrap().vocab_size();
    for (name, task, seed) in [("model", Task::Generator, 1), ("end-to-end", Task::EndToEnd, 2)] {
        config.task = task;
        let of_generator = scope(seed);
        Generator::new(&of_generator, &config, words, 16, config.image_tokenizer.grid()).unwrap();
        let tokenizer = Bundle::open(folder.path().join("tokenizer").to_str().unwrap()).unwrap();
        write(name, &config, &of_generator, Some(tokenizer));
    }
    folder
}

/// Runs `vilg` in `folder` with its model.
fn run(folder: &Path, args: &[&str]) -> (Output, String, String) {
    let output = vilg(args).args(["--model", "model"]).current_dir(folder).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output, stdout, stderr)
}

pub(crate) fn lines(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(crate) fn image(shade: u8) -> RgbImage {
    RgbImage::from_fn(16, 16, |x, y| Rgb([shade, x as u8 * 16, y as u8 * 16]))
}

#[test]
fn generated() {
    let folder = folder();
    let at = folder.path();
    let generate = |more: &[&str]| {
        let (output, stdout, stderr) = run(at, &[&["t2i", "一弯月，红", "--json"], more].concat());
        assert!(output.status.success() && stderr.is_empty(), "{stderr}");
        lines(&stdout).remove(0)
    };
    let one = generate(&["-o", "one.png", "--seed", "5"]);
    assert_eq!(one["images"][0]["path"], "one.png");
    assert_eq!(one["images"][0]["seed"], 5);
    assert!(one["images"][0]["score"].as_f64().unwrap() < 0.0 && one["tokens_per_second"].as_f64().unwrap() > 0.0);
    generate(&["-o", "again.png", "--seed", "5"]);
    assert_eq!(fs::read(at.join("one.png")).unwrap(), fs::read(at.join("again.png")).unwrap());

    let nine = generate(&["-o", "new/nine.png", "--seed", "1", "-n", "9", "--guidance", "2", "--top-k", "5"]);
    assert_eq!(nine["images"].as_array().unwrap().len(), 9);
    assert_eq!(image::open(at.join("new/nine.png")).unwrap().width(), 3 * 16 + 2 * 4);

    for format in ["f32", "bf16", "int8"] {
        let generated = generate(&["-o", "format.png", "--precision", format]);
        assert!(generated["images"][0]["score"].as_f64().unwrap() < 0.0, "{format}");
    }

    let two = generate(&["红月", "-n", "2", "-o", "two.png"]);
    let seeds: Vec<_> =
        two["images"].as_array().unwrap().iter().map(|i| (i["prompt"].as_str(), i["seed"].as_u64())).collect();
    let (first, second) = (Some("一弯月，红"), Some("红月"));
    assert_eq!(seeds, [(first, Some(0)), (first, Some(1)), (second, Some(0)), (second, Some(1))]);

    let each = generate(&["-o", "each.png", "--seed", "3", "-n", "3", "--each", "--best-of", "2"]);
    assert_eq!(each["images"][2]["path"], "each-3.png");
    generate(&["-o", "fifth.png", "--seed", "5", "--best-of", "2"]);
    assert_eq!(fs::read(at.join("each-3.png")).unwrap(), fs::read(at.join("fifth.png")).unwrap());

    generate(&["-o", "large.png", "--seed", "5", "--best-of", "2", "--scale", "3"]);
    let [small, large] = ["fifth.png", "large.png"].map(|name| image::open(at.join(name)).unwrap().into_rgb8());
    let (width, height) = small.dimensions();
    assert_eq!(vilg::data::resize_bicubic(&small, 3 * width, 3 * height), large);
    generate(&["-o", "labelled.png", "--seed", "5", "--best-of", "2", "--scale", "3", "--labels"]);
    let labelled = image::open(at.join("labelled.png")).unwrap().into_rgb8();
    assert_eq!(vilg::data::label::labelled(&[large], &["一弯月，红"]), [labelled]);
}

#[test]
fn prompts_from_stdin_and_files_and_images_to_stdout() {
    let folder = folder();
    let at = folder.path();
    assert!(run(at, &["t2i", "红月", "-o", "expected.png"]).0.status.success());
    let expected = fs::read(at.join("expected.png")).unwrap();
    fs::write(at.join("prompts.txt"), "\u{feff}红月\r\n\n月\n").unwrap();
    fs::write(at.join("one.txt"), "红月").unwrap();
    for (args, stdin) in [(&["t2i", "-", "-o", "-"][..], true), (&["t2i", "--prompts", "one.txt", "-o", "-"], false)] {
        let mut command = vilg(args);
        command.args(["--model", "model"]).current_dir(at);
        if stdin {
            command.stdin(fs::File::open(at.join("one.txt")).unwrap());
        }
        let output = command.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert!(output.status.success() && output.stdout == expected, "{args:?}");
    }
    let (output, stdout, stderr) = run(at, &["t2i", "--prompts", "prompts.txt", "--each", "-o", "p.png"]);
    assert!(output.status.success() && stdout == "p-1.png\np-2.png\n", "{stdout} {stderr}");
    assert_eq!(fs::read(at.join("p-1.png")).unwrap(), expected);
    // The folder of a training run can be given instead of its model folder.
    let output = vilg(&["t2i", "红月", "-o", "run.png", "--model", "."]).current_dir(at).output().unwrap();
    assert!(output.status.success() && fs::read(at.join("run.png")).unwrap() == expected);
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let folder = folder();
    let at = folder.path();
    fs::write(at.join("file"), "x").unwrap();
    fs::create_dir(at.join("folder.png")).unwrap();
    fs::write(at.join("bad.txt"), b"\xe6\x9c\x88\n\xff").unwrap();
    for (args, said) in [
        (&["t2i", "月", "-o", "folder.png"][..], "is a folder"),
        (&["t2i", "月", "-o", "file/a.png"], "cannot write file/a.png"),
        (&["t2i", "--prompts", "folder.png"], "cannot read folder.png"),
        (&["t2i", "--prompts", "none.txt"], "cannot read none.txt"),
        (&["t2i", "--prompts", "bad.txt"], "bad.txt, line 2: not UTF-8"),
        (&["t2i", "--prompts", "file", "-o", "a.txt"], "PNG"),
        (&["eval", "recon", "--data", "none", "--sheet", "folder.png"], "is a folder"),
    ] {
        let (output, stdout, stderr) = run(at, args);
        assert!(matches!(output.status.code(), Some(1 | 2)) && stdout.is_empty(), "{args:?} {stderr}");
        assert!(stderr.contains(said) && stderr.contains("hint: "), "{args:?} {stderr}");
    }
}

#[cfg(unix)]
#[test]
fn unusual_file_names_are_printed_safely() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let folder = folder();
    let at = folder.path();
    write_png(&at.join("a\u{1b}[2J.png"), &image(90)).unwrap();
    write_png(&at.join(OsStr::from_bytes(b"b\xff.png")), &image(90)).unwrap();
    let caption = |json: bool| {
        let mut command = vilg(&["caption", "a\u{1b}[2J.png"]);
        command.arg(OsStr::from_bytes(b"b\xff.png")).arg("none\u{1b}[2J.png").args(["--model", "model"]);
        let output = command.args(json.then_some("--json")).current_dir(at).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(caption(false).contains("a\\u{1b}[2J.png\t"));
    let captions = lines(&caption(true));
    assert_eq!(captions[0]["image"], "a\u{1b}[2J.png");
    assert_eq!(captions[1]["image"], "b\u{fffd}.png");
    let mut command = vilg(&["tokenize", "--json", "--model", "tokenizer"]);
    command.arg(OsStr::from_bytes(b"b\xff.png")).current_dir(at);
    assert!(command.output().unwrap().status.success());
}

#[test]
fn unusual_prompts() {
    let folder = folder();
    let generate = |prompt: &str| {
        let (output, stdout, stderr) = run(folder.path(), &["t2i", prompt, "-o", "odd.png"]);
        (output.status.code().unwrap(), stdout, stderr)
    };
    for empty in ["", " \t　", "\u{200b}\u{1}"] {
        let (code, _, stderr) = generate(empty);
        assert!(code == 2 && stderr.contains("empty") && stderr.contains("hint: "), "{empty:?} {stderr}");
    }
    let warnings = [
        ("月", ""),
        ("a blue moon", "no word"),
        ("🌙 ไทย", "no word"),
        ("月 moon", "does not know 1 of the 2"),
        (&"一弯月".repeat(10_000), "longer than 6 tokens"),
    ];
    for (prompt, warning) in warnings {
        let (code, stdout, stderr) = generate(prompt);
        assert!((code, stdout.as_str()) == (0, "odd.png\n"), "{stderr}");
        assert!(if warning.is_empty() { stderr.is_empty() } else { stderr.contains(warning) }, "{prompt}: {stderr}");
    }
}

#[test]
fn the_demo_understands_both_scripts() {
    let folder = tempfile::tempdir().unwrap();
    let image = |prompt: &str| {
        let output = vilg(&["t2i", prompt, "-o", "-"]).current_dir(&folder).output().unwrap();
        assert!(output.status.success() && !String::from_utf8_lossy(&output.stderr).contains("warning"), "{output:?}");
        output.stdout
    };
    let simplified = image("红苹果，立体风格");
    assert!(image("紅蘋果，立體風格") == simplified);
    assert!(image("黃蘋果，立體風格") != simplified);
}

#[test]
fn a_vocabulary_of_both_scripts_is_that_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let vocabulary = |name: &str, caption: &str, normalize: &str| {
        let source = folder.path().join(name);
        fs::create_dir_all(&source).unwrap();
        write_png(&source.join("0.png"), &image(9)).unwrap();
        fs::write(source.join("0.txt"), caption).unwrap();
        let output = folder.path().join("vocab.txt");
        let made =
            vilg(&["data", "vocab", name, "--normalize", normalize, "-o"]).arg(&output).current_dir(&folder).output();
        assert!(made.unwrap().status.success());
        fs::read_to_string(output).unwrap()
    };
    let simplified = vocabulary("simplified", "红苹果在后面", "none");
    assert_eq!(vocabulary("traditional", "紅蘋果在後面", "simplified"), simplified);
    assert_ne!(vocabulary("traditional", "紅蘋果在後面", "none"), simplified);
}

#[test]
fn bad_options_are_usage_errors() {
    let folder = folder();
    let bad: [&[&str]; 12] = [
        &["--precision", "int4"],
        &["--temperature", "-1"],
        &["--temperature", "nan"],
        &["--top-p", "0"],
        &["--top-p", "1.5"],
        &["--top-k", "-3"],
        &["--guidance", "1000"],
        &["-n", "0"],
        &["--best-of", "0"],
        &["--seed", "-1"],
        &["-o", "moon.jpg"],
        &["--sed", "1"],
    ];
    for args in bad {
        let (output, stdout, stderr) = run(folder.path(), &[&["t2i", "月"], args].concat());
        assert_eq!((output.status.code(), stdout.as_str()), (Some(2), ""), "{args:?} {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains("hint: "), "{args:?} {stderr}");
    }
    for args in [&["--beam", "2", "--seed", "1"][..], &["--beam", "0"], &["-n", "0"], &["--temperature", "x"], &[]] {
        let image = if args.is_empty() { vec![] } else { vec!["a.png"] };
        let (output, _, stderr) = run(folder.path(), &[&["caption"], image.as_slice(), args].concat());
        assert!(output.status.code() == Some(2) && stderr.contains("hint: "), "{args:?} {stderr}");
    }
}

#[test]
fn captioning_continues_after_bad_images() {
    let folder = folder();
    let at = folder.path();
    let good = png(&image(200)).unwrap();
    write_png(&at.join("b.png"), &image(90)).unwrap();
    fs::write(at.join("a.png"), &good).unwrap();
    fs::write(at.join("cut.png"), &good[..good.len() / 2]).unwrap();
    fs::write(at.join("text.png"), "not an image").unwrap();
    fs::write(at.join("empty.png"), "").unwrap();
    let mut huge = good.clone();
    huge[16..24].copy_from_slice(&[0, 0, 255, 255, 0, 0, 255, 255]); // the header's width and height
    fs::write(at.join("huge.png"), huge).unwrap();
    let all = ["caption", "a.png", "cut.png", "text.png", "none.png", "empty.png", "huge.png", ".", "b.png"];

    let (output, stdout, stderr) = run(at, &[&all[..], &["--json"]].concat());
    let captions = lines(&stdout);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((captions.len(), &captions[0]["image"], &captions[1]["image"]), (2, &"a.png".into(), &"b.png".into()));
    assert!(captions.iter().all(|c| c["score"].as_f64().unwrap() < 0.0 && !c["caption"].as_str().unwrap().is_empty()));
    for name in ["cut.png", "text.png", "none.png", "empty.png", "huge.png", "6 of 8"] {
        assert!(stderr.contains(name), "{name}: {stderr}");
    }

    let (_, stdout, _) = run(at, &["caption", "a.png", "b.png", "-n", "3", "--beam", "4"]);
    assert_eq!(stdout.lines().filter(|line| line.starts_with("a.png\t")).count(), 3);
    let (output, alone, _) = run(at, &["caption", "a.png"]);
    assert!(output.status.success());
    assert_eq!(alone.trim_end(), captions[0]["caption"].as_str().unwrap());
    let sampled = |seed: &str| run(at, &["caption", "a.png", "-n", "5", "--seed", seed]).1;
    assert!(sampled("1") == sampled("1") && sampled("1") != sampled("2"));
}

/// Pairs of two styles; `sixth.png` has damaged JSON, `seventh.png` is not an image.
fn pairs(folder: &Path, count: u8) {
    fs::create_dir(folder).unwrap();
    for i in 0..count {
        write_png(&folder.join(format!("{i}.png")), &image(i * 6)).unwrap();
        let json = format!(r#"{{"caption": "一弯月", "style": "s{}", "name_zh": "月"}}"#, i % 2);
        fs::write(folder.join(format!("{i}.json")), json).unwrap();
    }
    fs::write(folder.join("6.json"), "{").unwrap();
    fs::write(folder.join("7.png"), "x").unwrap();
}

#[test]
fn evaluation() {
    let folder = folder();
    let at = folder.path();
    pairs(&at.join("pairs"), 20);
    let retrieval = |more: &[&str]| run(at, &[&["eval", "retrieval", "--data", "pairs", "--json"], more].concat());
    let (output, stdout, stderr) = retrieval(&["--candidates", "5", "--samples", "10", "--best-of", "2"]);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("bad-json") && stderr.contains("bad-image"), "{stderr}");
    let result = &lines(&stdout)[0]["result"];
    let number = |pointer: &str| result.pointer(pointer).and_then(Value::as_f64).unwrap();
    assert_eq!((number("/top1/of"), number("/top5/rate"), number("/chance_top1")), (10.0, 1.0, 0.2));
    assert!(number("/top1/interval/0") <= number("/top1/rate") && number("/top1/interval/1") <= 1.0);
    assert_eq!((number("/reconstructed_top1/of"), number("/reconstructed_top5/rate")), (10.0, 1.0));
    assert!(result["distance"].as_str().unwrap().contains("16×16"));
    assert_eq!(retrieval(&["--candidates", "5", "--samples", "10", "--best-of", "2"]).1, stdout, "keyed by the seed");

    let (output, _, stderr) = retrieval(&["--candidates", "15"]);
    assert!(output.status.code() == Some(1) && stderr.contains("--pool"), "{stderr}");
    pairs(&at.join("pool"), 30);
    for i in 0..30 {
        write_png(&at.join(format!("pool/{i}.png")), &image(200 - i * 3)).unwrap();
    }
    let (output, _, stderr) = retrieval(&["--candidates", "15", "--pool", "pool"]);
    assert!(output.status.success(), "{stderr}");

    let (output, stdout, _) = run(at, &["eval", "naming", "--data", "pairs", "--samples", "0", "--json"]);
    let accuracy = &lines(&stdout)[0]["accuracy"];
    assert!(output.status.success() && accuracy["of"] == 18, "{stdout}");
    let (_, stdout, _) = run(at, &["eval", "naming", "--data", "pairs", "--beam", "2"]);
    assert!(stdout.contains(" of 18, 95 % interval "), "{stdout}");
    for source in ["nowhere", "model"] {
        for command in ["naming", "caption"] {
            let (output, _, stderr) = run(at, &["eval", command, "--data", source]);
            assert!(matches!(output.status.code(), Some(1 | 2)) && stderr.contains("hint: "), "{stderr}");
        }
    }
}

#[test]
fn captions_are_scored() {
    let folder = folder();
    let at = folder.path();
    pairs(&at.join("pairs"), 12);
    let (output, stdout, stderr) = run(at, &["eval", "caption", "--data", "pairs", "--samples", "0", "--json"]);
    assert!(output.status.success() && stderr.contains("bad-image"), "{stderr}");
    let scores = &lines(&stdout)[0];
    assert_eq!((&scores["images"], &scores["reference_count"]), (&10.into(), &10.into()), "{stdout}");
    assert_eq!(scores["per_image"].as_array().unwrap().len(), 10);
    let first = &scores["per_image"][0];
    let (_, alone, _) = run(at, &["caption", &format!("pairs/{}.png", first["image_id"].as_str().unwrap())]);
    assert_eq!(first["caption"], alone.trim_end());

    fs::write(
        at.join("r.json"),
        r#"{"annotations": [{"image_id": 1, "caption": "一弯月"}, {"image_id": 2, "caption": "星"}]}"#,
    )
    .unwrap();
    fs::write(at.join("c.json"), r#"[{"image_id": 2, "caption": "星。"}, {"image_id": 1, "caption": "一 弯 月"}]"#)
        .unwrap();
    let files = ["eval", "caption", "--references", "r.json", "--results", "c.json"];
    let (output, stdout, stderr) = run(at, &[&files[..], &["--drop-punctuation"]].concat());
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    assert!(stdout.contains("METEOR ") && stdout.contains("1.0000") && stdout.contains("CIDEr-D"), "{stdout}");
    let (_, stdout, _) = run(at, &[&files[..], &["--json"]].concat());
    let scores = &lines(&stdout)[0];
    assert_eq!((&scores["per_image"][0]["image_id"], &scores["per_image"][0]["METEOR"]), (&1.into(), &1.0.into()));
    assert!(scores["metrics"]["ROUGE_L"].as_f64().unwrap() < 1.0);
    for (args, code, what) in [
        (&["--references", "r.json"][..], 2, "--results"),
        (&[][..], 2, "--references"),
        (&["--data", "pairs", "--results", "c.json"][..], 2, "cannot be used with"),
        (&["--references", "r.json", "--results", "c.json", "--beam", "0"][..], 2, "from 1 to 64"),
        (&["--references", "c.json", "--results", "c.json"][..], 1, "c.json"),
        (&["--references", "r.json", "--results", "none.json"][..], 1, "none.json"),
        (&["--references", "r.json", "--results", "c.json", "--meteor-jar", "none.jar"][..], 1, "none.jar"),
    ] {
        let (output, _, stderr) = run(at, &[&["eval", "caption"][..], args].concat());
        assert!(
            output.status.code() == Some(code) && stderr.contains(what) && stderr.contains("hint: "),
            "{args:?}: {stderr}"
        );
    }
}

/// The dialogue with METEOR's jar, by a script in place of Java.
#[cfg(unix)]
#[test]
fn the_original_meteor_is_asked() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(
        at.join("r.json"),
        r#"{"annotations": [{"image_id": 1, "caption": "月 a"}, {"image_id": 2, "caption": "星"}]}"#,
    )
    .unwrap();
    fs::write(at.join("c.json"), r#"[{"image_id": 1, "caption": "月"}, {"image_id": 2, "caption": "红星"}]"#).unwrap();
    fs::write(at.join("meteor.jar"), "").unwrap();
    let script = r#"#!/bin/sh
[ "$4" = meteor.jar ] || exit 1
while read -r line; do
    case $line in
    'SCORE ||| 月 a ||| 月') echo one ;;
    'SCORE ||| 星 ||| 红 星') echo two ;;
    'EVAL ||| one ||| two') printf '0.25\n0.5\n0.375\n' ;;
    *) exit 1 ;;
    esac
done
"#;
    let java = at.join("java");
    let ask = |script: &str| {
        fs::write(&java, script).unwrap();
        fs::set_permissions(&java, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", at.display(), std::env::var("PATH").unwrap());
        let args = [
            "eval",
            "caption",
            "--references",
            "r.json",
            "--results",
            "c.json",
            "--meteor-jar",
            "meteor.jar",
            "--json",
        ];
        let output = vilg(&args).current_dir(at).env("PATH", path).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stdout, stderr) = ask(script);
    assert_eq!(code, Some(0), "{stderr}");
    let scores = &lines(&stdout)[0];
    assert_eq!((&scores["metrics"]["METEOR_jar"], &scores["per_image"][1]["METEOR_jar"]), (&0.375.into(), &0.5.into()));
    for script in ["#!/bin/sh\nexit 1\n", "#!/bin/sh\nwhile read -r line; do echo x; done\n"] {
        let (code, _, stderr) = ask(script);
        assert!(
            code == Some(1) && stderr.contains("METEOR in meteor.jar failed") && stderr.contains("hint: "),
            "{stderr}"
        );
    }
}
