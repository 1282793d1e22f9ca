//! `vilg eval t2i` and `vilg eval reranking`, with small untrained models.

use crate::{
    commands::vilg,
    generate::{folder, image},
    ranks_tcp,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// 70 prompts, all different: two chunks.
fn prompts(folder: &Path) {
    let prompts: Vec<String> =
        (0..70).map(|i| format!("红月{}星", "一".repeat(i % 7 + 1) + &"月".repeat(i / 7))).collect();
    fs::write(folder.join("prompts.txt"), prompts.join("\n")).unwrap();
    let annotation = |(i, text): (usize, &String)| serde_json::json!({ "image_id": i, "id": i, "caption": text });
    let annotations: Vec<Value> = prompts.iter().enumerate().map(annotation).collect();
    fs::write(folder.join("prompts.json"), serde_json::json!({ "annotations": annotations }).to_string()).unwrap();
    fs::create_dir(folder.join("real")).unwrap();
    for i in 0..6 {
        image(i * 40).save(folder.join(format!("real/{i}.png"))).unwrap();
        fs::write(folder.join(format!("real/{i}.txt")), ["月", "一弯月", "红月", "星", "一", "红"][usize::from(i)])
            .unwrap();
    }
}

fn args<'a>(prompts: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let real: &[&str] = if more.contains(&"--real") { &[] } else { &["--real", "real"] };
    let args = ["eval", "t2i", "--prompts", prompts, "-o", output, "--model", "model", "--json"];
    [&args[..], real, more].concat()
}

fn measure(folder: &Path, args: &[&str]) -> Result<Value, String> {
    let output = vilg(args).current_dir(folder).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// All files below `folder`, with their contents and times of modification.
fn files(folder: &Path) -> BTreeMap<String, (Vec<u8>, SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, file)| (format!("{name}/{inner}"), file)));
        } else {
            found.insert(name, (fs::read(&path).unwrap(), entry.metadata().unwrap().modified().unwrap()));
        }
    }
    found
}

/// All files below `folder`. The scores of candidates are left out: their last bits depend on the batch.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let without_scores = |bytes: Vec<u8>| {
        let mut sample: Value = serde_json::from_slice(&bytes).unwrap();
        sample.as_object_mut().unwrap().remove("scores");
        sample.to_string().into_bytes()
    };
    let kept = |name: &str, bytes| if name.ends_with(".json") { without_scores(bytes) } else { bytes };
    files(folder).into_iter().map(|(name, (bytes, _))| (name.clone(), kept(&name, bytes))).collect()
}

#[test]
fn a_measurement_resumes_without_repeating_or_losing_an_image() {
    let folder = folder();
    let at = folder.path();
    prompts(at);
    let more = ["--samples", "0", "--best-of", "2", "--temperature", "1"];
    let whole = measure(at, &args("prompts.txt", "whole", &more)).unwrap();
    let scores = &whole["scores"];
    assert_eq!(scores["images"], 70);
    assert!(scores["distance"].as_f64().unwrap() > 0.0, "{whole}");
    let [low, mean, high] =
        [&scores["cosine"]["interval"][0], &scores["cosine"]["mean"], &scores["cosine"]["interval"][1]]
            .map(|value| value.as_f64().unwrap());
    assert!(-1.0 <= low && low < mean && mean < high && high <= 1.0, "{whole}");
    let expected = contents(&at.join("whole"));
    // An image and its caption for each prompt, features of two chunks, and the settings.
    assert_eq!(expected.len(), 2 * 70 + 2 + 1);
    let mut captions: Vec<String> = expected
        .iter()
        .filter(|(name, _)| name.starts_with("images") && name.ends_with("json"))
        .map(|(_, bytes)| serde_json::from_slice::<Value>(bytes).unwrap()["caption"].as_str().unwrap().to_owned())
        .collect();
    captions.sort();
    let mut prompts: Vec<String> =
        fs::read_to_string(at.join("prompts.txt")).unwrap().lines().map(str::to_owned).collect();
    prompts.sort();
    assert_eq!(captions, prompts);
    // The same prompts in COCO's format.
    assert_eq!(measure(at, &args("prompts.json", "coco", &more)).unwrap()["settings"], whole["settings"]);

    // Killed twice, in the first and the second half.
    for images in [5, 66] {
        let mut child = vilg(&args("prompts.txt", "killed", &more));
        let mut child = child.current_dir(at).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let last = at.join(format!("killed/images/{:05}/{images:06}.png", images / 64));
        let begun = Instant::now();
        while !last.exists() && begun.elapsed() < Duration::from_secs(120) {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(last.exists());
    }
    let before = files(&at.join("killed"));
    assert_eq!(measure(at, &args("prompts.txt", "killed", &more)).unwrap()["scores"], *scores);
    assert_eq!(contents(&at.join("killed")), expected);
    let after = files(&at.join("killed"));
    let images = before.iter().filter(|(name, _)| name.ends_with(".png"));
    assert!(images.clone().count() > 5 && images.into_iter().all(|(name, file)| after[name] == *file), "written twice");

    // Two ranks.
    let ranks: Vec<String> = args("prompts.txt", "ranks", &more).into_iter().map(str::to_owned).collect();
    let ended = ranks_tcp::run(at, 2, &ranks);
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
    assert_eq!(contents(&at.join("ranks")), expected);

    // Other settings need another folder.
    for other in [
        ["0", "2", "--seed=1"],
        ["0", "3", "--seed=0"],
        ["9", "2", "--seed=0"],
        ["0", "2", "--top-k=2"],
        ["0", "2", "--rank=matcher"],
    ] {
        let [samples, best_of, more] = other;
        let more = ["--samples", samples, "--best-of", best_of, "--temperature", "1", more];
        let error = measure(at, &args("prompts.txt", "whole", &more)).unwrap_err();
        assert!(error.contains("another measurement") && error.contains("hint:"), "{other:?}: {error}");
    }
    assert_eq!(contents(&at.join("whole")), expected);
    fs::write(at.join("whole/features/00001.safetensors"), b"damaged").unwrap();
    let error = measure(at, &args("prompts.txt", "whole", &more)).unwrap_err();
    assert!(error.contains("00001.safetensors"), "{error}");
}

#[test]
fn bad_prompts_and_real_images_are_refused() {
    let folder = folder();
    let at = folder.path();
    prompts(at);
    fs::write(at.join("empty.txt"), "\n").unwrap();
    fs::write(at.join("bad.json"), "{}").unwrap();
    fs::write(at.join("one.txt"), "月").unwrap();
    for (prompts, more, what) in [
        ("empty.txt", &[][..], "no prompt in empty.txt"),
        ("bad.json", &[], "bad.json"),
        ("none", &[], "none"),
        ("one.txt", &[], "at least two prompts"),
        ("prompts.txt", &["--samples", "2", "--real", "nowhere"], "nowhere"),
        ("prompts.txt", &["--samples", "2", "--real", "real.npz"], "--inception"),
        ("prompts.txt", &["--samples", "2", "--inception", "nowhere"], "nowhere"),
    ] {
        let error = measure(at, &args(prompts, "out", more)).unwrap_err();
        assert!(error.contains(what) && error.contains("hint:"), "{prompts} {more:?}: {error}");
        assert!(!at.join("out/images").exists(), "{prompts} {more:?}: images were generated first");
    }
}

#[test]
fn re_ranking_is_measured_for_every_number_of_candidates() {
    let folder = folder();
    let at = folder.path();
    prompts(at);
    let args =
        ["eval", "reranking", "--data", "real", "--model", "model", "--best-of", "6", "--candidates", "3", "--json"];
    let found = measure(at, &[&args[..], &["--temperature", "1", "--plot", "plot.svg"]].concat()).unwrap();
    let rows = found["result"]["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["best_of"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 4, 6]);
    let rate = |row: &Value, by: &str| row[by]["rate"].as_f64().unwrap();
    assert!(["own", "matcher", "both"].iter().all(|by| rate(&rows[0], by) == rate(&rows[0], "any")), "{found}");
    for row in rows {
        assert!(["own", "matcher", "both"].iter().all(|by| rate(row, by) <= rate(row, "any")), "{found}");
    }
    assert_eq!(found["result"]["prompts"], 3);
    assert!(fs::read_to_string(at.join("plot.svg")).unwrap().starts_with("<svg"));
    let error = measure(at, &[&args[..], &["--samples", "1"]].concat()).unwrap_err();
    assert!(error.contains("hint:"), "{error}");
}
