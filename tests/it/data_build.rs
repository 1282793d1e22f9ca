//! `vilg data build` from the command line: resuming after SIGKILL.

use crate::{commands::vilg, filter::png};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const SHARDS: usize = 40;

/// A table of rows with images as base64, four for each shard; one in nine is bad.
fn table(path: &Path) {
    let row = |row: usize| {
        let image = if row % 9 == 4 { "!!!".to_owned() } else { BASE64_STANDARD.encode(png(row as u32, 48)) };
        serde_json::json!({"id": format!("row {row}"), "image": image, "caption": format!("第{row}张图片")}).to_string()
    };
    fs::write(path, (0..4 * SHARDS).map(|number| row(number) + "\n").collect::<String>()).unwrap();
}

fn build(source: &Path, output: &Path) -> Command {
    let mut command = vilg(&["data", "build", "--json", "--base64", "--key-column", "id", "--samples-per-shard", "4"]);
    command.arg(source).arg("-o").arg(output).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Files by name, without the index, which has the times of the shards.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let hidden = |path: &PathBuf| path.file_name().unwrap().as_encoded_bytes().starts_with(b".");
    let mut paths: Vec<PathBuf> = paths.filter(|path| !hidden(path)).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

fn count_shards(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "tar")).count()
}

#[test]
fn a_killed_build_resumes_to_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let source = at("rows.jsonl");
    table(&source);
    let report = |output: std::process::Output| {
        assert!(output.status.success());
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let whole = report(build(&source, &at("whole")).output().unwrap());
    assert_eq!((whole["rows"].as_u64(), whole["samples"].as_u64()), (Some(160), Some(142)));
    assert_eq!((whole["bad"]["bad-base64"]["count"].as_u64(), whole["shards"].as_u64()), (Some(18), Some(40)));
    // Each run is killed once it has written a few shards more, so in the middle of another one.
    let killed = at("killed");
    let mut unfinished = 0;
    for _ in 0..4 {
        let before = count_shards(&killed);
        let mut child = build(&source, &killed).spawn().unwrap();
        let start = Instant::now();
        while count_shards(&killed) < before + 3 && start.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(count_shards(&killed) > before, "no progress");
        unfinished += usize::from(count_shards(&killed) < SHARDS);
        if unfinished == 2 {
            // As if the machine had stopped while a shard was written.
            fs::write(killed.join("00039.tar.0123456789abcdef.tmp"), "half").unwrap();
        }
    }
    assert!(unfinished >= 2, "only {unfinished} runs were killed in the middle");
    let resumed = report(build(&source, &killed).output().unwrap());
    assert!(resumed["skipped_shards"].as_u64() >= Some(6) && resumed["bad"] == whole["bad"], "{resumed}");
    assert_eq!((&resumed["rows"], &resumed["samples"]), (&whole["rows"], &whole["samples"]));
    // Also no temporary file is left.
    assert!(
        files(&killed) == files(&at("whole")),
        "{:?}",
        files(&killed).iter().map(|(name, _)| name).collect::<Vec<_>>()
    );
    assert_eq!(report(build(&source, &killed).output().unwrap())["skipped_shards"].as_u64(), Some(40));
}
