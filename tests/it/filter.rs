//! `vilg data filter` from the command line: resuming after SIGKILL, and ranks as processes.

use crate::commands::as_rank_of_two;
use std::{
    fs,
    io::Cursor,
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

/// The tables and shards of a folder by name.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut tables: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "jsonl" || e == "tar")).collect();
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

/// A PNG file with a drawing of its own for each number.
pub(crate) fn png(number: u32, side: u32) -> Vec<u8> {
    let image = image::RgbImage::from_fn(side, side, |x, y| {
        let wave = (x * (3 + number % 17) + y * (5 + number % 11) + x * y * number / 64) % 512;
        image::Rgb([wave.min(511 - wave) as u8, (number * 40) as u8, (x + y) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Shards of `samples` images each. Every fifth image is that of the first shard, every seventh caption has no noun.
pub(crate) fn shards(folder: &Path, count: u32, samples: u32, side: u32) {
    fs::create_dir_all(folder).unwrap();
    for shard in 0..count {
        let mut tar = tar::Builder::new(fs::File::create(folder.join(format!("{shard:02}.tar"))).unwrap());
        for sample in 0..samples {
            let number = if sample % 5 == 0 { sample } else { shard * samples + sample };
            let caption =
                if sample % 7 == 3 { "非常漂亮".to_owned() } else { format!("小猫在草地上{sample}") };
            let mut append = |extension: &str, content: &[u8]| {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, format!("{sample:04}.{extension}"), content).unwrap();
            };
            append("png", &png(number, side));
            append("txt", caption.as_bytes());
        }
        tar.finish().unwrap();
    }
}

#[test]
fn a_killed_run_over_images_resumes_to_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (input, whole, killed) = (folder.path().join("in"), folder.path().join("whole"), folder.path().join("killed"));
    shards(&input, 8, 60, 64);
    let output = filter(&input, &whole).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let left_out = |rule: &str| {
        let rules = report["rules"].as_array().unwrap();
        rules.iter().find(|count| count["rule"] == rule).unwrap()["left_out"].as_u64().unwrap()
    };
    assert_eq!((report["rows"].as_u64(), left_out("bad")), (Some(480), 0));
    assert!(left_out("no-noun") == 8 * 9 && left_out("duplicate-image") >= 7 * 10, "{report}");
    // Killed twice in the first pass and twice in the second one.
    for sign in [".filter/00.tar.features", ".filter/05.tar.features", "00.tar", "04.tar"] {
        let mut child = filter(&input, &killed).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !killed.join(sign).exists() && start.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(killed.join(sign).exists(), "{sign}");
    }
    // As if the machine had stopped while features were written: they are made again.
    let features = killed.join(".filter/02.tar.features");
    let whole_features = fs::read(&features).unwrap();
    fs::write(&features, &whole_features[..whole_features.len() / 2]).unwrap();
    let output = filter(&input, &killed).output().unwrap();
    let resumed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&resumed["rules"], &resumed["kept"]), (&report["rules"], &report["kept"]));
    assert_eq!(fs::read(&features).unwrap(), whole_features);
    assert_eq!(files(&whole).len(), 8);
    assert!(files(&killed) == files(&whole));
    let again: serde_json::Value = serde_json::from_slice(&filter(&input, &killed).output().unwrap().stdout).unwrap();
    assert_eq!(again["finished_before"].as_u64(), Some(8));
}

/// The memory of `--plan` follows the rules that compare rows, and its disk space is that of the stored features.
#[test]
fn the_plan_follows_the_rules() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    tables(&input, 2, 300);
    let plan = |more: &[&str]| -> serde_json::Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
        command.args(["data", "filter", "--caption-column", "text", "--plan", "--json"]).arg(&input).args(more);
        serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
    };
    let (off, share) = (["--text-only", "--max-caption-repeats", "0"], 2.0 / 3.0);
    for (more, bytes) in [(&off[..], 0.0), (&off[..1], 16.0), (&[], 16.0), (&["--mirrored"], 32.0)] {
        let plan = plan(more);
        let number = |name: &str| plan[name].as_f64().unwrap();
        assert_eq!((number("rows_scanned"), number("share_passed")), (600.0, share));
        assert!((number("memory_bytes_145m_pairs") / (145e6 * (1.0 + bytes)) - 1.0).abs() < 1e-9, "{plan}");
        assert!((number("memory_bytes_800m_rows") / (800e6 * (1.0 + bytes * share)) - 1.0).abs() < 1e-9, "{plan}");
        assert!((number("hours_800m_rows") * 3600.0 * number("rows_per_second") / 800e6 - 1.0).abs() < 1e-9);
    }
    assert!(!output.exists());
    assert!(filter(&input, &output).status().unwrap().success());
    let stored = fs::metadata(output.join(".filter/00.jsonl.features")).unwrap().len() as f64;
    let per_row = plan(&[])["disk_bytes_800m_rows"].as_f64().unwrap() / 800e6;
    assert!((stored / 300.0 - per_row).abs() < 1.0, "{stored} bytes of 300 rows, {per_row} a row");
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
