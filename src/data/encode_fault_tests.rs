//! `data encode` with equal names, changed sources, outputs of other tokenizers, and concurrent writers.

use super::{encode_tests::*, output::Lock, tests::*, *};
use crate::error::Result;
use std::{collections::BTreeSet, fs, path::Path};

fn encode(input: &Path, output: &Path) -> Result<Report> {
    let tokenizer = tokenizer();
    let info = CodesInfo { tokenizer: "x".into(), grid: [4, 4], codebook_size: 16 };
    let encoder = Encoder {
        tokenizer: &tokenizer,
        info,
        output: output.to_owned(),
        keep_images: false,
        batch_size: 4,
        max_bad_ratio: 0.5,
        rank: 0,
        world_size: 1,
    };
    encoder.run(&[Source::open(input.to_str().unwrap(), 1.0)?], |_| ())
}

fn codes(output: &Path) -> Vec<Record> {
    let dataset = Dataset::open(&config(&[(output, 1.0)]), Kind::Codes).unwrap();
    dataset.records(1).collect::<Result<_, _>>().unwrap()
}

fn pair(folder: &Path, name: &str, shade: u8) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path.with_extension("txt"), format!("{shade}")).unwrap();
    fs::write(path, image(shade)).unwrap();
}

#[test]
fn images_with_equal_or_dotted_names_get_different_keys() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let names = ["photo.v1.0.png", "photo.v1.1.png", "sub/a/0000.png", "sub/b/0000.png", "x.jpg", "x.png"];
    names.iter().zip(1..).for_each(|(name, shade)| pair(&input, name, shade));
    let report = encode(&input, &output).unwrap();
    assert_eq!((report.samples, report.bad.total()), (6, 0));
    let keys: BTreeSet<String> = codes(&output).into_iter().map(|record| record.key).collect();
    assert!(keys.len() == 6 && keys.iter().all(|key| !key.contains('.')), "{keys:?}");
}

#[test]
fn a_changed_source_is_encoded_again_and_a_different_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (input, other, output) = (dir.path().join("in"), dir.path().join("other"), dir.path().join("out"));
    pair(&input, "a.png", 1);
    encode(&input, &output).unwrap();
    assert_eq!(encode(&input, &output).unwrap().skipped_shards, 1);
    pair(&input, "b.png", 2);
    let report = encode(&input, &output).unwrap();
    assert_eq!((report.shards, report.samples, report.skipped_shards), (1, 2, 0));
    assert_eq!(codes(&output).len(), 2);

    let before = files(&output);
    pair(&other, "c.png", 3);
    let error = encode(&other, &output).unwrap_err();
    assert!(error.to_string().contains("was encoded from"), "{error}");
    assert!(crate::error::hint_of(&error).is_some_and(|hint| hint.contains("-o")));
    assert_eq!(files(&output), before);

    // Moved with its modification times, it counts as the same source.
    fs::rename(&input, dir.path().join("moved")).unwrap();
    assert_eq!(encode(&dir.path().join("moved"), &output).unwrap().skipped_shards, 1);
}

#[test]
fn shards_without_a_record_are_readable_but_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    pair(&input, "a.png", 1);
    encode(&input, &output).unwrap();
    let old = Tar::new().file("old.npy", npy([4, 4], &[1; 16])).file("old.txt", "旧").bytes();
    fs::write(output.join("00000.tar"), &old).unwrap();
    assert_eq!(codes(&output)[0].key, "old");
    let error = encode(&input, &output).unwrap_err();
    assert!(format!("{error:#}").contains("no record of its source"), "{error:#}");
    assert_eq!(fs::read(output.join("00000.tar")).unwrap(), old);
}

#[test]
fn a_broken_shard_is_tried_again_once_it_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&input).unwrap();
    Tar::new().sample("a", 1).write(&input.join("0.tar"));
    fs::write(input.join("1.tar"), b"\x1f\x8b\x08").unwrap();
    let report = encode(&input, &output).unwrap();
    assert_eq!((report.shards, report.unusable_shards, report.samples), (1, 1, 1));
    assert!(!output.join("1.tar").exists());
    Tar::new().sample("b", 2).write(&input.join("1.tar"));
    let report = encode(&input, &output).unwrap();
    assert_eq!((report.shards, report.unusable_shards, report.skipped_shards), (1, 0, 1));
    assert_eq!(codes(&output).len(), 2);
}

#[test]
fn a_second_writer_is_refused_and_leftovers_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    pair(&input, "a.png", 1);
    fs::create_dir(&output).unwrap();
    let lock = Lock::take(&output).unwrap();
    let error = encode(&input, &output).unwrap_err().to_string();
    assert!(error.contains("another process is writing to"), "{error}");
    drop(lock);
    fs::write(output.join("00000.tar.0123456789abcdef.tmp"), "").unwrap();
    fs::write(output.join("00000.tar.mine.tmp"), "").unwrap();
    encode(&input, &output).unwrap();
    let names: Vec<String> =
        fs::read_dir(&output).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(
        names.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        [".shards.index", "00000.tar", "00000.tar.mine.tmp", "codes.json"].into()
    );
}
