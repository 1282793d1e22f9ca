//! Embeddings of shards and filters that use a matcher.

use crate::{
    commands::{as_rank_of_two, vilg},
    matcher::{cosines, data, json, model, run, said},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};
use vilg::bundle::Bundle;

/// A tar of the first images of `data`; the image of the second sample is damaged.
fn shard(path: &Path, data: &Path, count: usize) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for number in 0..count {
        for extension in ["png", "txt"] {
            let name = format!("{number:03}.{extension}");
            let mut content = fs::read(data.join(&name)).unwrap();
            if number == 1 && extension == "png" {
                content.truncate(30);
            }
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, name, &content[..]).unwrap();
        }
    }
    tar.finish().unwrap();
}

#[test]
fn embeddings_of_remote_shards_are_in_a_folder_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, ..) = data(folder.path(), &model, 4);
    let (shards, apart) = (folder.path().join("shards"), folder.path().join("apart"));
    fs::create_dir(&shards).unwrap();
    shard(&shards.join("0.tar"), &data, 4);
    let url = format!("pipe:cat {}/0.tar", shards.display());
    let command = |args: &[&str]| {
        let mut command = vilg(args);
        command.arg("--matcher").arg(&model).arg("--cache-dir").arg(folder.path().join("cache"));
        command
    };
    let embed = || command(&["data", "embed", "--json", "--max-bad-ratio", "0.5", &url]);
    let output = embed().output().unwrap();
    assert!(output.status.code() == Some(2) && said(&output).contains("name a folder with -o"), "{}", said(&output));
    assert_eq!(json(&embed().arg("-o").arg(&apart).output().unwrap())["samples"], 3);
    assert_eq!(json(&embed().arg("-o").arg(&apart).output().unwrap())["skipped_shards"], 1);
    json(&run(&["data", "embed", "--json", "--max-bad-ratio", "0.5", "--matcher"], &[&model, &shards]));
    let array = apart.join("0.tar.embeddings.npy");
    let mut bytes = fs::read(&array).unwrap();
    assert_eq!(bytes, fs::read(shards.join("0.tar.embeddings.npy")).unwrap());
    // Image and caption of sample 0 become opposite, so that only a filter that reads the file leaves it out.
    let start = bytes.len() - 4 * 32 * 4;
    for (value, at) in [(1_f32, start), (-1.0, start + 64)] {
        (0..16).for_each(|i| bytes[at + 4 * i..at + 4 * i + 4].copy_from_slice(&value.to_le_bytes()));
    }
    fs::write(&array, bytes).unwrap();
    let filter = |out: &str, more: &[&str]| {
        let mut command = command(&["data", "filter", "--json", "--min-cosine=-1.1", "--min-side", "0"]);
        command.args(["--max-aspect-ratio", "0", "--keep-duplicate-images", "--keep-without-noun"]);
        command.args(["--max-caption-repeats", "0", &url]).args(more).arg("-o").arg(folder.path().join(out));
        json(&command.output().unwrap())["kept"].as_u64()
    };
    assert_eq!(filter("computed", &[]), Some(3));
    assert_eq!(filter("stored", &["--embeddings", apart.to_str().unwrap()]), Some(2));
}

#[test]
fn embeddings_are_stored_once_and_filters_use_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, images, captions) = data(folder.path(), &model, 12);
    let shards = folder.path().join("shards");
    fs::create_dir(&shards).unwrap();
    shard(&shards.join("0.tar"), &data, 12);
    let cosines: Vec<f32> = cosines(&model, &images, &captions).iter().enumerate().map(|(i, row)| row[i]).collect();
    let mut sorted = cosines.clone();
    sorted.sort_by(f32::total_cmp);
    // Kept by hand: the samples above a threshold between two cosines.
    let kept = |threshold: f32| -> Vec<String> {
        let good = |i: &usize| *i != 1 && cosines[*i] > threshold;
        (0..12).filter(good).map(|i| format!("{i:03}")).collect()
    };
    let filter = |threshold: f32, out: &str| {
        let mut command = vilg(&["data", "filter", "--json", "--min-side", "0", "--max-aspect-ratio", "0"]);
        command.args(["--keep-duplicate-images", "--keep-without-noun", "--max-caption-repeats", "0", "--matcher"]);
        command.arg(&model).arg(format!("--min-cosine={threshold}")).arg("-o").arg(folder.path().join(out));
        command.arg(&shards).output().unwrap()
    };
    let names = |out: &str| -> Vec<String> {
        let source = vilg::data::Source::open(folder.path().join(out).to_str().unwrap(), 1.0).unwrap();
        let shard = &source.shards[0];
        (0..shard.len()).map(|i| shard.members(i as usize, None).unwrap().0).collect()
    };
    let (low, high) = ((sorted[3] + sorted[4]) / 2.0, (sorted[7] + sorted[8]) / 2.0);
    let report = json(&filter(low, "out"));
    assert_eq!(names("out"), kept(low));
    let rule = |report: &Value, name: &str| {
        let rules = report["rules"].as_array().unwrap();
        rules.iter().find(|rule| rule["rule"] == name).unwrap()["left_out"].as_u64().unwrap()
    };
    assert_eq!((rule(&report, "bad"), rule(&report, "low-similarity")), (1, 11 - kept(low).len() as u64));
    // What decided is named in the report.
    let digest = Bundle::open(model.to_str().unwrap()).unwrap().matcher_digest().unwrap();
    let written: Value = serde_json::from_slice(&fs::read(folder.path().join("out/filter.json")).unwrap()).unwrap();
    let similarity = &written["similarity"];
    assert_eq!((similarity["matcher"].as_str(), similarity["digest"].as_str()), (model.to_str(), Some(&*digest)));
    assert!((similarity["min_cosine"].as_f64().unwrap() - f64::from(low)).abs() < 1e-6);
    // Another threshold in the same output.
    json(&filter(high, "out"));
    assert_eq!(names("out"), kept(high));

    let embed = || run(&["data", "embed", "--json", "--max-bad-ratio", "0.5", "--matcher"], &[&model, &shards]);
    let done = json(&embed());
    assert_eq!((done["shards"].as_u64(), done["samples"].as_u64()), (Some(1), Some(11)));
    let array = shards.join("0.tar.embeddings.npy");
    let bytes = fs::read(&array).unwrap();
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00") && String::from_utf8_lossy(&bytes).contains("(12, 2, 16)"));
    let numbers: Vec<f32> =
        bytes[bytes.len() - 12 * 32 * 4..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    for (row, cosine) in numbers.chunks_exact(32).zip(&cosines).enumerate().filter(|(i, _)| *i != 1).map(|(_, x)| x) {
        let dot: f32 = row[..16].iter().zip(&row[16..]).map(|(a, b)| a * b).sum();
        assert!((dot - cosine).abs() < 1e-5);
    }
    assert!(numbers[32..64].iter().all(|x| x.is_nan()));
    let record: Value = serde_json::from_slice(&fs::read(shards.join("0.tar.embeddings.json")).unwrap()).unwrap();
    assert_eq!((record["keys"][2].as_str(), record["keys"].as_array().unwrap().len()), (Some("002"), 12));
    assert_eq!(json(&embed())["skipped_shards"], 1);
    let inspected = json(&run(&["data", "inspect", "--json"], &[&shards]));
    assert_eq!(inspected["ignored"], serde_json::json!({}));

    // Stored cosines are used: those of sample 0 are made worse than all others.
    let mut changed = bytes.clone();
    let start = bytes.len() - 12 * 32 * 4;
    changed[start..start + 64].fill(0);
    fs::write(&array, changed).unwrap();
    json(&filter(-2.0, "all"));
    assert_eq!(names("all").len(), 11);
    json(&filter(low, "stored"));
    assert_eq!(names("stored").contains(&"000".to_owned()), 0.0 > low);

    // A changed shard is embedded again; a file of others is never replaced.
    shard(&shards.join("0.tar"), &data, 11);
    assert_eq!(json(&embed())["samples"], 10);
    fs::write(shards.join("0.tar.embeddings.json"), "mine").unwrap();
    let refused = embed();
    assert!(refused.status.code() == Some(1) && said(&refused).contains("not a file of this command"));
    assert_eq!(fs::read_to_string(shards.join("0.tar.embeddings.json")).unwrap(), "mine");
}

#[test]
fn processes_of_a_launcher_share_the_shards_that_are_embedded() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, ..) = data(folder.path(), &model, 9);
    let shards = folder.path().join("shards");
    fs::create_dir(&shards).unwrap();
    for (name, count) in [("0.tar", 9), ("1.tar", 4), ("2.tar", 6)] {
        shard(&shards.join(name), &data, count);
    }
    let embed = || {
        let mut command = vilg(&["data", "embed", "--json", "--max-bad-ratio", "0.5", "--matcher"]);
        command.arg(&model).arg(&shards).stdout(Stdio::piped());
        command
    };
    let done = |output: &Output| ["shards", "samples"].map(|key| json(output)[key].as_u64().unwrap());
    assert_eq!(done(&embed().output().unwrap()), [3, 16]);
    let written = || -> BTreeMap<PathBuf, Vec<u8>> {
        let paths = fs::read_dir(&shards).unwrap().map(|entry| entry.unwrap().path());
        let is_result = |path: &PathBuf| ["npy", "json"].iter().any(|e| path.extension().is_some_and(|own| own == *e));
        let embeddings = paths.filter(is_result);
        embeddings.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let alone = written();
    assert_eq!(alone.len(), 6);
    alone.keys().for_each(|path| fs::remove_file(path).unwrap());
    let ranks = ["0", "1"].map(|rank| as_rank_of_two(embed(), rank).spawn().unwrap());
    assert_eq!(ranks.map(|rank| done(&rank.wait_with_output().unwrap())), [[2, 13], [1, 3]]);
    assert!(written() == alone);
}

#[test]
fn filters_need_a_calibrated_matcher_and_images() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (data, images, captions) = data(folder.path(), &model, 8);
    let table = folder.path().join("a.jsonl");
    fs::write(&table, "{\"caption\":\"小狗\"}\n").unwrap();
    let out = folder.path().join("out");
    let filter = |source: &Path, extra: &[&str]| {
        let mut command = vilg(&["data", "filter", "--json", "--min-side", "0", "--keep-without-noun", "-o"]);
        command.arg(&out).arg("--matcher").arg(&model).args(extra).arg(source).output().unwrap()
    };
    let output = filter(&data, &[]);
    assert!(output.status.code() == Some(2) && said(&output).contains("--calibrate"), "{}", said(&output));
    let output = filter(&table, &["--min-cosine", "0"]);
    assert!(output.status.code() == Some(2) && said(&output).contains("is a table"), "{}", said(&output));
    for extra in [&["--text-only"][..], &["--similarity-column", "x"], &["--min-cosine", "0", "--min-similarity", "0"]]
    {
        assert_eq!(filter(&data, extra).status.code(), Some(2), "{extra:?}");
    }
    let cosines: Vec<f32> = cosines(&model, &images, &captions).iter().enumerate().map(|(i, row)| row[i]).collect();
    let mut sorted = cosines.clone();
    sorted.sort_by(f32::total_cmp);
    let middle = f64::from((sorted[3] + sorted[4]) / 2.0);
    Bundle::open(model.to_str().unwrap()).unwrap().calibrate([100.0, -100.0 * middle]).unwrap();
    let report = json(&filter(&data, &["--keep-duplicate-images", "--max-caption-repeats", "0"]));
    assert_eq!(report["kept"], 4);
    assert_eq!(report["similarity"]["min_similarity"], 0.5);
    assert!((report["similarity"]["min_cosine"].as_f64().unwrap() - middle).abs() < 1e-6);
    let all = json(&filter(&data, &["--keep-duplicate-images", "--max-caption-repeats", "0", "--min-similarity", "0"]));
    assert_eq!(all["kept"], 8);
    let counts: BTreeMap<String, u64> = report["rules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rule| (rule["rule"].as_str().unwrap().to_owned(), rule["left_out"].as_u64().unwrap()))
        .collect();
    assert_eq!(counts["low-similarity"], 4);
}
