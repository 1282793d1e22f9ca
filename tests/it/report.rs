//! `vilg report` from the command line.

use crate::{commands::vilg, train};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

/// A run folder as `vilg train` writes it, with one sample image.
fn run_folder(folder: &Path, rate: f64, metrics: &str) {
    fs::create_dir_all(folder.join("samples")).unwrap();
    fs::write(folder.join("metrics.jsonl"), metrics).unwrap();
    let config =
        format!("task = \"generator\"\n[train]\nsteps = 9\nlearning_rate = {rate}\n[sample]\nprompts = [\"<猫>\"]\n");
    fs::write(folder.join("config.toml"), config).unwrap();
    let launch = json!({ "time": "2026-11-29T00:00:00Z", "step": 0, "host": "h<1>", "processor": "a & b", "threads": 2,
        "memory_bytes": 8_000_000_000_u64, "command": ["vilg", "train"],
        "program": { "version": "0.1.0", "commit": "0123456789abcdef", "features": "" } });
    fs::write(folder.join("launches.jsonl"), format!("{launch}\n")).unwrap();
    image::RgbImage::new(8, 8).save(folder.join("samples/step-0000003.png")).unwrap();
}

fn step(step: u64, image: f64) -> String {
    let line = json!({ "step": step, "image": image, "gradient_norm": 1.5, "learning_rate": 0.001, "seconds": 0.5,
        "per_second": 100.0, "unit": "tokens", "peak_memory_bytes": 1e9, "tflops": 40.0, "mfu": 0.125, "data_wait": 0.5,
        "time": "2026-11-29T00:00:00Z" });
    format!("{line}\n")
}

/// Runs `vilg report` in a folder.
fn report(folder: &Path, args: &[&str]) -> Output {
    vilg(&["report"]).args(args).current_dir(folder).output().unwrap()
}

/// The page and what was said.
fn page(folder: &Path, args: &[&str]) -> (String, String) {
    let output = report(folder, args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (fs::read_to_string(folder.join("report.html")).unwrap(), said)
}

#[test]
fn two_runs_and_an_evaluation_are_one_self_contained_page() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    run_folder(&at("one"), 0.001, &(1..=3).map(|i| step(i, 4.0 / i as f64)).collect::<String>());
    run_folder(&at("<script>two"), 0.002, &(1..=3).map(|i| step(i, 3.0 / i as f64)).collect::<String>());
    let naming = json!({ "data": "x", "accuracy": { "hits": 3, "of": 8, "rate": 0.375, "interval": [0.136, 0.694] } });
    fs::write(at("naming.json"), naming.to_string()).unwrap();
    let (page, said) = page(folder.path(), &["one", "<script>two", "naming.json"]);
    assert_eq!(said, "");

    // Nothing is loaded, and nothing from a file is markup.
    for word in ["http", "<script", "<link", "@import", "url(", "<iframe", "onload", "h<1>", "<猫>"] {
        assert!(!page.contains(word), "{word}");
    }
    let values = |name: &str| page.split(name).skip(1).map(|rest| rest.split('"').next().unwrap()).collect::<Vec<_>>();
    let (sources, links) = (values(" src=\""), values(" href=\""));
    assert!(sources.len() == 2 && sources.iter().all(|uri| uri.starts_with("data:image/png;base64,")), "{sources:?}");
    assert!(
        !links.is_empty() && links.iter().all(|link| page.contains(&format!("id=\"{}\"", &link[1..]))),
        "{links:?}"
    );

    // Both runs are in each plot, told apart by class and letter.
    let plots: Vec<&str> =
        page.split("<figure><figcaption>").skip(1).filter(|plot| plot.contains("<polyline")).collect();
    assert_eq!(plots.len(), 8, "loss, gradient norm, rate, throughput, TFLOP/s, MFU, waiting for data, memory");
    for plot in plots {
        let plot = plot.split("</figure>").next().unwrap();
        for part in ["class=\"stroke run-0\"", "class=\"stroke run-1\"", "\nA\n", "\nB\n"] {
            assert!(plot.contains(part), "{part}: {plot}");
        }
    }
    // What differs is marked; versions and results are there.
    assert_eq!(page.matches("<tr class=\"differs\"><td>train.learning_rate<td>0.001<td>0.002").count(), 2);
    assert!(!page.contains("<tr class=\"differs\"><td>train.steps"));
    for text in
        ["0123456789ab<", "a &amp; b", "8.0 GB", "h&lt;1&gt;", "image 1.333", "<data value=\"0.375\">37.5 % (3 of 8"]
    {
        assert!(page.contains(text), "{text}");
    }
}

#[test]
fn broken_and_repeated_lines_are_told_and_the_later_line_counts() {
    let folder = tempfile::tempdir().unwrap();
    let metrics =
        [step(1, 5.0), step(2, 4.0), step(3, 99.0), "not json\n".into(), step(3, 3.5), "{\"step\":4,\"im".into()];
    run_folder(&folder.path().join("run"), 0.1, &metrics.concat());
    let output = report(folder.path(), &["run", "--json"]);
    let (summary, said): (Value, _) =
        (serde_json::from_slice(&output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let run = &summary["runs"][0];
    assert_eq!((&run["lines"], &run["last_step"], &run["last"]["image"]), (&json!(3), &json!(3), &json!(3.5)));
    assert_eq!(run["problems"].as_array().unwrap().len(), 2);
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    for text in ["not a step in JSON: 2; the last one is cut", "repeated their steps after a resume: 1"] {
        assert!(said.contains(text) && page.contains(text), "{said}");
    }
    assert_eq!(summary["bytes"], page.len());
}

#[test]
fn a_long_run_gives_a_small_page_that_shows_its_spike() {
    let folder = tempfile::tempdir().unwrap();
    let line = |i: u64| format!("{{\"step\":{i},\"l1\":{},\"seconds\":0.1}}\n", if i == 123_456 { 1e4 } else { 2.0 });
    run_folder(&folder.path().join("run"), 0.1, &(1..=200_000).map(line).collect::<String>());
    let (page, _) = page(folder.path(), &["run", "--samples", "0"]);
    assert!(page.len() < 100_000, "{} bytes", page.len());
    assert!(page.contains("l1 <span>(logarithmic)</span>") && page.contains("<polygon") && page.contains("thinned"));
    assert!(!page.contains("<img"));
}

#[test]
fn only_reports_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    run_folder(&folder.path().join("run"), 0.1, &step(1, 5.0));
    let file = folder.path().join("report.html");
    fs::write(&file, "<!doctype html><p>mine").unwrap();
    let output = report(folder.path(), &["run"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("not a report") && said.contains("--force"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "<!doctype html><p>mine");
    assert!(report(folder.path(), &["run", "--force"]).status.success());
    let first = fs::read(&file).unwrap();
    assert!(report(folder.path(), &["run"]).status.success(), "an earlier report is replaced");
    assert_eq!(fs::read(&file).unwrap(), first);
}

#[test]
fn what_is_no_run_and_no_evaluation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    fs::write(folder.path().join("text.json"), "not json").unwrap();
    let runs: Vec<String> = (0..9).map(|i| format!("run{i}")).collect();
    runs.iter().for_each(|run| run_folder(&folder.path().join(run), 0.1, &step(1, 5.0)));
    let all: Vec<&str> = runs.iter().map(String::as_str).collect();
    for (args, code, message) in [
        (&["nowhere"][..], 1, "there is no nowhere"),
        (&["empty"], 1, "it has no metrics.jsonl"),
        (&["text.json"], 1, "does not hold JSON objects"),
        (&all, 2, "9 runs are more than the 8"),
        (&["run0", "-o", "empty"], 2, "is a folder"),
    ] {
        let output = report(folder.path(), args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(code) && said.contains(message) && said.contains("hint: "),
            "{args:?}: {said}"
        );
    }
    assert!(!folder.path().join("report.html").exists());
}

/// The event files of a run, in the order in which TensorBoard reads them.
fn event_files(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut files: Vec<_> = files.filter(|path| name(path).starts_with("events.out.tfevents.")).collect();
    files.sort();
    files
}

/// The payloads of an event file.
fn records(path: &Path) -> Vec<Vec<u8>> {
    let (bytes, mut records, mut at) = (fs::read(path).unwrap(), Vec::new(), 0);
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        records.push(bytes[at + 12..at + 12 + length].to_vec());
        at += length + 16;
    }
    records
}

#[test]
fn event_files_have_the_numbers_of_the_metrics_and_a_resume_starts_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    train::prepare(folder.path());
    let trains = |steps: &str| {
        let args = ["train", "--config", "tiny.toml", "-q", "--set", "train.tensorboard=true", "--set", steps];
        let more = ["--set", "train.sample_every=4", "--set", "sample.prompts=[]"];
        assert!(vilg(&args).args(more).current_dir(folder.path()).status().unwrap().success());
    };
    trains("train.steps=4");
    trains("train.steps=6");
    let run = folder.path().join("runs/tiny");
    let files = event_files(&run);
    assert_eq!(files.len(), 2, "{files:?}");
    let all: Vec<Vec<u8>> = files.iter().flat_map(|file| records(file)).collect();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut compared = 0;
    for (line, i) in metrics.lines().zip(0..) {
        let line: Value = serde_json::from_str(line).unwrap();
        // Each file begins with its version and the start of a session; an image follows step 4.
        let event = &all[if i < 4 { 2 + i } else { 7 + 2 + i - 4 }];
        for (name, value) in
            line.as_object().unwrap().iter().filter(|(name, value)| value.is_number() && *name != "step")
        {
            let tag = format!("train/{name}");
            let mut scalar = vec![0x0a, tag.len() as u8];
            scalar.extend(tag.bytes());
            scalar.push(0x15);
            scalar.extend((value.as_f64().unwrap() as f32).to_le_bytes());
            assert!(event.windows(scalar.len()).any(|part| part == scalar), "{name} of step {}", i + 1);
            compared += 1;
        }
    }
    assert!(compared >= 6 * 6, "{compared} numbers");
    let png = fs::read(run.join("samples/step-0000004.png")).unwrap();
    assert!(all[6].windows(png.len()).any(|part| part == png));
}
