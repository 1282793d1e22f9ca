//! `vilg data filter` from the command line: resuming after SIGKILL, and ranks as processes.

use crate::commands::as_rank_of_two;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Tables of captions, every third of which has no noun.
fn tables(folder: &Path, count: usize, rows: usize) {
    fs::create_dir_all(folder).unwrap();
    for table in 0..count {
        let captions = ["小猫在草地上", "非常漂亮", "红色的汽车"];
        let row = |row: usize| format!("{{\"id\":{row},\"text\":\"{}{}\"}}\n", captions[row % 3], row % 7);
        fs::write(folder.join(format!("{table:02}.jsonl")), (0..rows).map(row).collect::<String>()).unwrap();
    }
}

fn filter(input: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    command.args(["data", "filter", "--caption-column", "text", "--max-caption-repeats", "0", "--json", "-o"]);
    command.arg(output).arg(input).stdout(Stdio::piped());
    command
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut tables: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "jsonl")).collect();
    tables.sort();
    tables.into_iter().map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[test]
fn a_killed_run_resumes_to_the_same_tables() {
    let folder = tempfile::tempdir().unwrap();
    let (input, whole, killed) = (folder.path().join("in"), folder.path().join("whole"), folder.path().join("killed"));
    tables(&input, 6, 3000);
    let output = filter(&input, &whole).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (report["rows"].as_u64(), report["kept"].as_u64(), report["written"].as_u64()),
        (Some(18000), Some(12000), Some(6))
    );
    // Killed once the first table is scanned, and once the first one is written.
    for sign in [".filter/00.jsonl.features", "00.jsonl"] {
        let mut child = filter(&input, &killed).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !killed.join(sign).exists() && start.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(killed.join(sign).exists());
    }
    assert!(filter(&input, &killed).status().unwrap().success());
    assert_eq!(files(&killed), files(&whole));
    let left =
        fs::read_dir(&killed).unwrap().any(|entry| entry.unwrap().path().extension().is_some_and(|e| e == "tmp"));
    assert!(!left, "temporary files are left");
    let again = filter(&input, &killed).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(report["finished_before"].as_u64(), Some(6));
}

#[test]
fn processes_of_a_launcher_share_the_tables() {
    let folder = tempfile::tempdir().unwrap();
    let (input, alone, shared) = (folder.path().join("in"), folder.path().join("alone"), folder.path().join("shared"));
    tables(&input, 3, 300);
    assert!(filter(&input, &alone).status().unwrap().success());
    let ranks = ["0", "1"].map(|rank| as_rank_of_two(filter(&input, &shared), rank).spawn().unwrap());
    ranks.into_iter().for_each(|mut rank| assert!(rank.wait().unwrap().success()));
    assert_eq!(files(&shared), files(&alone));
    assert!(shared.join("filter.html").exists());
}

#[test]
fn inputs_without_a_usable_caption_fail() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("a.jsonl");
    fs::write(&input, "{\"caption\":\"小猫\"}\n").unwrap();
    let output = filter(&input, &folder.path().join("out")).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--caption-column"));
}

#[test]
fn reports_of_others_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    tables(&input, 1, 30);
    fs::create_dir(&output).unwrap();
    let notes = output.join("filter.json");
    fs::write(&notes, "{\"mine\": 1}").unwrap();
    let refused = filter(&input, &output).stderr(Stdio::piped()).output().unwrap();
    assert!(
        refused.status.code() == Some(1) && String::from_utf8_lossy(&refused.stderr).contains("filter.json exists")
    );
    assert_eq!(fs::read_to_string(&notes).unwrap(), "{\"mine\": 1}");
    assert!(!output.join("00.jsonl").exists());
    fs::remove_file(&notes).unwrap();
    assert!(filter(&input, &output).status().unwrap().success());
    assert!(filter(&input, &output).status().unwrap().success(), "its own report is replaced");
}
