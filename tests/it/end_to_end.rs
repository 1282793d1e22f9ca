//! End-to-end generators and questions about images through the command line, with small untrained models.

use crate::{
    commands::vilg,
    generate::{folder, image, lines},
};
use serde_json::Value;
use std::{fs, path::Path};

/// Runs `vilg`; its output if it succeeds, otherwise its error.
fn run(folder: &Path, args: &[&str]) -> Result<String, String> {
    let output = vilg(args).current_dir(folder).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// Four images with captions, and questions about three of them.
fn data(folder: &Path) {
    fs::create_dir(folder.join("data")).unwrap();
    for i in 0..4u8 {
        let at = |extension: &str| folder.join(format!("data/{i}.{extension}"));
        image(i * 60).save(at("png")).unwrap();
        fs::write(at("txt"), ["月", "一弯月", "红月", "星"][usize::from(i)]).unwrap();
        if i < 3 {
            let question = serde_json::json!({ "question": "月红", "answer": "星", "type": "thing" });
            let answer = if i < 2 { "一" } else { "红" };
            let other = serde_json::json!({ "question": "一星", "answer": answer });
            fs::write(at("json"), serde_json::json!({ "questions": [question, other] }).to_string()).unwrap();
        }
    }
}

#[test]
fn both_reconstructors_decode_the_same_codes() {
    let folder = folder();
    let at = folder.path();
    let generate = |model: &str, name: &str, more: &[&str]| {
        let args = [&["t2i", "红月", "--seed", "3", "--model", model, "-o", name], more].concat();
        run(at, &args).map(|_| fs::read(at.join(name)).unwrap())
    };
    let default = generate("end-to-end", "a.png", &[]).unwrap();
    let [own, two_stage] =
        ["end-to-end", "two-stage"].map(|by| generate("end-to-end", "b.png", &["--reconstructor", by]).unwrap());
    assert!(default == own && own != two_stage);
    run(at, &["export", "--model", "end-to-end", "--two-stage", "-o", "exported"]).unwrap();
    assert!(generate("exported", "c.png", &[]).unwrap() == two_stage);
    let error = generate("model", "d.png", &["--reconstructor", "end-to-end"]).unwrap_err();
    assert!(error.contains("no end-to-end reconstructor") && error.contains("hint:"), "{error}");
    let error = run(at, &["export", "--model", "model", "--two-stage", "-o", "no"]).unwrap_err();
    assert!(error.contains("hint: leave out --two-stage"), "{error}");

    image(9).save(at.join("in.png")).unwrap();
    let reconstruct = |more: &[&str]| run(at, &[&["reconstruct", "in.png", "--model", "end-to-end"], more].concat());
    reconstruct(&["-o", "two-stage.png"]).unwrap();
    reconstruct(&["-o", "own.png", "--through-generator", "--caption", "红月"]).unwrap();
    reconstruct(&["-o", "other.png", "--through-generator", "--caption", "星"]).unwrap();
    let read = |name: &str| fs::read(at.join(name)).unwrap();
    assert!(read("two-stage.png") != read("own.png") && read("own.png") != read("other.png"));
    assert!(reconstruct(&["-o", "x.png", "--through-generator"]).unwrap_err().contains("--caption"));
}

#[test]
fn an_ablation_resumes_and_refuses_another_measurement() {
    let folder = folder();
    let at = folder.path();
    data(at);
    let measure = |output: &str, more: &[&str]| {
        let args =
            ["eval", "ablation", "--json", "--two-stage", "model", "--end-to-end", "end-to-end", "--data", "data"];
        run(at, &[&args[..], &["--samples", "0", "--bootstrap", "20", "-o", output], more].concat())
    };
    let table = measure("out", &[]).unwrap();
    let parsed: Value = serde_json::from_str(&table).unwrap();
    let rows = parsed["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for row in rows {
        let (mean, difference) = (row["mean"].as_f64().unwrap(), row["difference"].as_f64().unwrap());
        let [low, high] = [0, 1].map(|i| row["interval"][i].as_f64().unwrap());
        assert!(mean > 0.0 && low <= mean && mean <= high, "{row}");
        let reference = row["reconstructor"] == "two-stage" && row["codes"] != "end-to-end";
        assert_eq!(difference == 0.0, reference, "{row}");
    }
    // The first twelve prompts (here four), six rows and the real images.
    let sheet = image::open(at.join("out/sheet-1.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (4 * 16 + 3 * 4, 7 * 16 + 6 * 4));

    let chunk = at.join("out/features-1/00000.safetensors");
    let written = fs::metadata(&chunk).unwrap().modified().unwrap();
    assert_eq!(measure("out", &[]).unwrap(), table);
    assert_eq!(fs::metadata(&chunk).unwrap().modified().unwrap(), written, "measured again");
    fs::remove_file(&chunk).unwrap();
    assert_eq!(measure("out", &[]).unwrap(), table);

    let error = measure("out", &["--seed", "1"]).unwrap_err();
    assert!(error.contains("another measurement") && error.contains("hint:"), "{error}");
    let error = measure("new", &["--two-stage", "model", "model"]).unwrap_err();
    assert!(error.contains("hint:"), "{error}");
    fs::write(&chunk, b"damaged").unwrap();
    assert!(measure("out", &[]).unwrap_err().contains("00000.safetensors"));
}

#[test]
fn questions_are_answered_and_measured() {
    let folder = folder();
    let at = folder.path();
    data(at);
    let ask = |more: &[&str]| run(at, &[&["vqa", "data/0.png", "--model", "model"], more].concat());
    assert_eq!(ask(&["月红"]).unwrap().lines().count(), 1);
    let two = ask(&["月红", "一星"]).unwrap();
    assert!(two.lines().count() == 2 && two.starts_with("月红\t"), "{two}");
    for line in lines(&ask(&["月红", "--json", "--beam", "3", "-n", "2"]).unwrap()) {
        assert!(line["question"] == "月红" && line["score"].as_f64().unwrap() < 0.0, "{line}");
    }
    assert!(ask(&[" "]).unwrap_err().contains("hint:"));

    let measured = run(at, &["eval", "vqa", "--json", "--data", "data", "--samples", "0", "--model", "model"]).unwrap();
    let accuracy = &serde_json::from_str::<Value>(&measured).unwrap()["accuracy"];
    assert_eq!((accuracy["all"]["of"].as_u64(), accuracy["types"]["thing"]["of"].as_u64()), (Some(6), Some(3)));
    // All three of one question, and two of the other have the same answer.
    assert_eq!(accuracy["without_images"]["hits"], 5);

    let faithful = ["eval", "faithfulness", "--json", "--data", "data", "--samples", "0", "--model", "model", "--vqa"];
    let measured = run(at, &[&faithful[..], &["model"]].concat()).unwrap();
    let measured: Value = serde_json::from_str(&measured).unwrap();
    // Of all answers, only those to 一星 about the second and third image are in the captions 一弯月 and 红月.
    let right = [("data/1.png", "一"), ("data/2.png", "红")].map(|(image, answer)| {
        let said = run(at, &["vqa", image, "一星", "--model", "model"]).unwrap();
        usize::from(said.trim() == answer)
    });
    let [real, generated] = ["real", "generated"].map(|which| &measured["faithfulness"][which]["all"]);
    assert!(real["of"] == 2 && generated["of"] == 2 && real["hits"] == right[0] + right[1], "{measured}");
    assert_eq!(measured["faithfulness"]["real"]["types"], serde_json::json!({}));

    (0..3).for_each(|i| fs::remove_file(at.join(format!("data/{i}.json"))).unwrap());
    let error = run(at, &["eval", "vqa", "--data", "data", "--model", "model"]).unwrap_err();
    assert!(error.contains("has questions") && error.contains("hint:"), "{error}");
    let error = run(at, &[&faithful[..], &["model"]].concat()).unwrap_err();
    assert!(error.contains("contains the answer") && error.contains("hint:"), "{error}");
}

/// One of four images has no questions: a step of one sample then has nothing to predict.
#[test]
fn training_goes_on_after_a_step_without_questions() {
    let folder = folder();
    let at = folder.path();
    data(at);
    let shapes = ["text.max_tokens=8", "model.layers=2", "model.hidden=8", "model.heads=2", "model.qk_norm=false"];
    let batches = ["train.batch_size=0", "train.caption_batch_size=0", "train.vqa_batch_size=1"];
    let others = ["name=run", "train.init_from=model", "train.sample_every=0", "train.warmup_steps=0"];
    let inputs =
        ["image_tokenizer.path=tokenizer", "text.vocab=model/vocab.txt", "data.sources=[{ path = \"codes\" }]"];
    let sets = [&shapes[..], &batches, &others, &inputs].concat();
    let train = |steps: &str| {
        let sets = sets.iter().copied().chain([steps]).flat_map(|set| ["--set", set]);
        run(at, &["train"].into_iter().chain(sets).collect::<Vec<_>>())
    };
    let encode = || run(at, &["data", "encode", "data", "--model", "tokenizer", "-o", "codes"]).unwrap();
    encode();
    train("train.steps=8").unwrap();
    let metrics = lines(&fs::read_to_string(at.join("runs/run/metrics.jsonl")).unwrap());
    let answered = metrics.iter().filter(|line| line["answer"].is_f64()).count();
    assert!(metrics.len() == 8 && (1..8).contains(&answered), "{answered} of {}", metrics.len());

    (0..3).for_each(|i| fs::remove_file(at.join(format!("data/{i}.json"))).unwrap());
    ["codes", "runs"].iter().for_each(|name| fs::remove_dir_all(at.join(name)).unwrap());
    encode();
    let error = train("train.steps=200").unwrap_err();
    assert!(error.contains("no sample of 100 steps has a text to predict for the loss `answer`"), "{error}");
}
