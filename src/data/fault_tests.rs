//! Unusual shards and folders of other tools, and damaged ones: good samples are read, the rest is counted.

#![allow(clippy::single_range_in_vec_init, reason = "a step of one batch is a list of one range")]

use super::{inspect::inspect, tests::*, *};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

fn case(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)).unwrap()
}

#[test]
fn zero_blocks_between_members_are_counted_and_reading_continues() {
    let (keys, bad) = read_tar(case("zeroed_region.tar"));
    assert_eq!(keys, ["00000", "00001", "00003", "00004", "00005"]);
    assert_eq!(bad, serde_json::json!({"broken-tar": 1}));
}

#[test]
fn concatenated_shards_are_read() {
    // GNU tar and Python pad an archive to a multiple of 10 KiB.
    let padded = |tar: Tar| {
        let mut bytes = tar.bytes();
        bytes.resize(bytes.len().next_multiple_of(10_240), 0);
        bytes
    };
    let both = [padded(Tar::new().sample("a", 1)), padded(Tar::new().sample("b", 2))].concat();
    assert_eq!(read_tar(both), (vec!["a".into(), "b".into()], serde_json::json!({})));
    // Without the padding it looks like an overwritten member, so it is counted.
    let both = [Tar::new().sample("a", 1).bytes(), Tar::new().sample("b", 2).bytes()].concat();
    assert_eq!(read_tar(both), (vec!["a".into(), "b".into()], serde_json::json!({"broken-tar": 1})));
    let rubbish = [Tar::new().sample("a", 1).bytes(), vec![7; 512]].concat();
    assert_eq!(read_tar(rubbish), (vec!["a".into()], serde_json::json!({"broken-tar": 1})));
}

#[test]
fn the_format_of_other_files_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (content, name) in
        [(case("gzip_named.tar"), "gzip"), (b"PAR1\x15\x04".to_vec(), "parquet"), (b"{\"a\": 1}".to_vec(), "JSON")]
    {
        let path = dir.path().join("0.tar");
        fs::write(&path, content).unwrap();
        let error = Dataset::open(&config(&[(&path, 1.0)]), Kind::Captions).unwrap_err().to_string();
        assert!(error.contains("not-a-tar") && error.contains(name), "{error}");
        assert!(!inspect(&Source::open(path.to_str().unwrap(), 1.0).unwrap(), |_| ()).unwrap().found.usable());
    }
}

#[test]
fn absolute_names_behind_dots_are_refused_and_empty_parts_dropped() {
    let (keys, bad) = read_tar(case("tar_name_dot_slash_slash.tar"));
    assert_eq!((keys, bad), (vec!["ok1".into(), "ok2".into()], serde_json::json!({"unsafe-name": 2})));
    let tar = Tar::new().sample("./d//./a", 1).sample("d/b", 2);
    assert_eq!(read_tar(tar.bytes()).0, ["d/a", "d/b"]);
}

#[test]
fn damaged_json_beside_a_good_text_is_ignored_and_counted() {
    for name in ["json_nan.tar", "json_lone_surrogate.tar"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("0.tar"), case(name)).unwrap();
        let record = open(dir.path()).read(0, 0).unwrap();
        let ignored = record.ignored.unwrap();
        assert!(ignored.cause == Cause::BadJson && ignored.place.contains("0.tar: a"), "{}", ignored.place);
        let found = inspect(&Source::open(dir.path().to_str().unwrap(), 1.0).unwrap(), |_| ()).unwrap().found;
        assert_eq!((found.ignored.total(), found.bad.total()), (1, 0));
        let dataset = Arc::new(open(dir.path()));
        let sampler = Sampler::new(1, "test", &dataset.shares());
        let mut loader = Loader::new(&dataset, &config(&[]), sampler, 2, vec![0..2], 0, 1).unwrap();
        assert_eq!(loader.next_batch().unwrap().len(), 2);
        assert_eq!((loader.ignored().total(), loader.bad().total()), (2, 0));
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::new().file("a.png", image(1)).file("a.json", "\u{feff}{\"caption\": \"月\"}");
    tar.write(&dir.path().join("0.tar"));
    assert_eq!(open(dir.path()).read(0, 0).unwrap().caption, "月");
}

#[test]
fn each_line_of_a_text_is_a_caption_and_one_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::new().file("a.png", image(1)).file("a.txt", "甲 一\r\n\n 乙\n丙\n");
    tar.file("b.png", image(2)).file("b.txt", " 一 行\t字\n").write(&dir.path().join("0.tar"));
    let dataset = Arc::new(open(dir.path()));
    assert_eq!(dataset.read(0, 0).unwrap().captions, ["甲 一", "乙", "丙"]);
    assert_eq!(dataset.read(0, 1).unwrap().captions, ["一 行 字"]);
    let drawn = || {
        let sampler = Sampler::new(1, "test", &dataset.shares());
        let mut loader = Loader::new(&dataset, &config(&[]), sampler, 2, vec![0..2], 0, 1).unwrap();
        let batches = (0..20).flat_map(|_| loader.next_batch().unwrap());
        batches.filter(|record| record.key == "a").map(|record| record.caption).collect::<Vec<_>>()
    };
    let captions = drawn();
    assert_eq!(captions, drawn());
    assert!(["甲 一", "乙", "丙"].iter().all(|one| captions.iter().any(|caption| caption == one)), "{captions:?}");
}

#[test]
fn unused_members_are_not_read() {
    // 40 sparse members of 120 MiB each would take 4.8 GB.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.tar");
    let tar = Tar::new().sample("a", 1).bytes();
    let tar = &tar[..tar.len() - 1024];
    let big = Tar::new().file("a.bin", "").bytes();
    let mut header = ::tar::Header::new_gnu();
    header.as_mut_bytes().copy_from_slice(&big[..512]);
    header.set_size(200 << 20);
    header.set_cksum();
    fs::write(&path, [tar, header.as_bytes()].concat()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((tar.len() + 512 + (200 << 20) + 1024) as u64).unwrap();
    let source = Source::open(dir.path().to_str().unwrap(), 1.0).unwrap();
    let (key, members) = source.shards[0].members(0, None).unwrap();
    assert_eq!(key, "a");
    assert!(members.get("png").is_some() && members.get("bin").is_none());
    let (_, members) = source.shards[0].members(0, Some(Kind::Captions)).unwrap();
    assert!(members.get("txt").is_some() && members.get("png").is_none());
}

#[test]
fn many_members_of_one_key_take_linear_time() {
    let mut tar = Tar::new().sample("k", 1);
    for i in 0..30_000 {
        tar = tar.file(&format!("k.e{i}"), "");
    }
    let started = Instant::now();
    assert_eq!(read_tar(tar.bytes()).0, ["k"]);
    // Comparing all pairs of members would take minutes.
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn files_of_a_folder_are_read_or_counted_by_cause() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| fs::write(dir.path().join(name), content).unwrap();
    file("IMG_1.PNG", &image(1));
    file("IMG_1.TXT", "甲".as_bytes());
    file("b.jfif", &image(2));
    file("b.JSON", r#"{"caption": "乙"}"#.as_bytes());
    file("c.avif", b"");
    file("d.SVG", b"");
    file("e.csv", b"");
    file("README.md", b"");
    symlink("nowhere", dir.path().join("f.png")).unwrap();
    assert!(Command::new("mkfifo").arg(dir.path().join("g.png")).status().unwrap().success());
    let source = Source::open(dir.path().to_str().unwrap(), 1.0).unwrap();
    let bad = serde_json::json!({"dangling-link": 1, "not-a-file": 1, "unsupported-image": 2});
    assert_eq!((causes(&source.bad), causes(&source.ignored)), (bad, serde_json::json!({"unknown-kind": 1})));
    let captions: Vec<_> = open(dir.path()).records(1).map(|record| record.unwrap().caption).collect();
    assert_eq!(captions, ["甲", "乙"]);
    let tar = Tar::new().file("a.avif", "x").file("a.txt", "x").bytes();
    assert_eq!(read_tar(tar).1, serde_json::json!({"unsupported-image": 1}));
}

#[test]
fn a_pipe_without_a_writer_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.tar");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let source = Source::open(pipe.to_str().unwrap(), 1.0).unwrap();
    assert_eq!(causes(&source.damage()), serde_json::json!({"unreadable": 1}));
    assert!(image::open_image(&pipe).is_err());
}

#[test]
fn a_pipe_with_a_writer_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let writer = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::write(pipe, image(5)).unwrap()
    });
    assert_eq!(image::open_image(&pipe).unwrap().as_raw(), &[5; 12]);
    writer.join().unwrap();
}

/// Decoders fill the missing part of a scan with grey, and only a strict decoder would report it: the image is
/// accepted.
#[test]
fn a_cut_jpeg_with_an_end_marker_is_accepted() {
    assert!(image::decode(&case("jpeg_scan_cut_with_eoi.jpg")).is_ok());
}

#[test]
fn a_ratio_of_zero_allows_no_bad_sample() {
    let mut bad = BadCounts::default();
    assert!(bad.check(1, 0.0).is_ok());
    bad.add(Bad::new(Cause::NoCaption, "a"));
    assert!(bad.check(2, 0.0).is_err() && bad.check(2, 0.01).is_ok() && bad.check(100, 0.001).is_err());
}

#[test]
fn control_characters_of_names_are_escaped() {
    assert_eq!(Bad::new(Cause::NoImage, "a\u{1b}[2J月").place, "a\\u{1b}[2J月");
}

#[test]
fn a_fingerprint_depends_on_samples_and_not_on_their_path() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, shade: u8| -> PathBuf {
        let folder = dir.path().join(name);
        fs::create_dir(&folder).unwrap();
        Tar::new().sample("a", shade).write(&folder.join("0.tar"));
        fs::create_dir(folder.join("images")).unwrap();
        fs::write(folder.join("images/b.png"), image(1)).unwrap();
        fs::write(folder.join("images/b.txt"), "x").unwrap();
        folder
    };
    let (first, moved) = (write("first", 1), write("moved", 1));
    let of = |path: &Path| open(path).fingerprint().unwrap();
    assert_eq!(of(&first), of(&moved));
    fs::write(moved.join("images/b.txt"), "longer").unwrap();
    assert_ne!(of(&first), of(&moved));
    Tar::new().sample("a", 1).sample("c", 1).write(&first.join("1.tar"));
    assert_ne!(of(&first), of(&write("third", 1)));
}

#[test]
fn read_ahead_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    Tar::new().sample("a", 1).write(&dir.path().join("0.tar"));
    let dataset = Arc::new(open(dir.path()));
    let data = crate::config::Data { prefetch: usize::MAX, workers: 2, ..config(&[]) };
    let sampler = Sampler::new(1, "test", &dataset.shares());
    let mut loader = Loader::new(&dataset, &data, sampler.clone(), 1, vec![0..1], 0, 1).unwrap();
    assert_eq!(loader.next_batch().unwrap().len(), 1);
    let huge = Loader::new(&dataset, &data, sampler, usize::MAX, vec![0..usize::MAX], 0, 1);
    assert!(huge.is_err_and(|error| error.to_string().contains("too many")));
}
