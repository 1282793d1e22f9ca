//! The memory of `vilg data filter` does not depend on the number of rows, but for what compares rows: 1 byte for the
//! verdict of each row, and 16 bytes for its caption or image.
//!
//! Bytes are counted for the whole process, so each test runs itself again in a separate process.

use crate::{
    counting::{LIVE, PEAK},
    filter::shards,
    memory::runs_elsewhere,
};
use std::{fmt::Write, fs, path::Path, sync::atomic::Ordering::Relaxed};
use vilg::data::filter::{DuplicateRules, Filter, Outcome, Settings, TextRules, Unit, input};

/// Only the rules that compare rows.
fn settings(duplicates: DuplicateRules) -> Settings {
    let text = TextRules {
        max_length: None,
        unit: Unit::Characters,
        noun: false,
        no_special_characters: false,
        blocked: None,
    };
    Settings {
        text,
        text_only: false,
        min_side: 0,
        max_aspect_ratio: None,
        similarity_column: None,
        min_similarity: None,
        duplicates,
        caption_keys: Vec::new(),
        caption_column: "caption".into(),
        width_column: "width".into(),
        height_column: "height".into(),
    }
}

/// The most bytes that a run allocates, and what it did.
fn peak(source: &Path, output: &Path, settings: &Settings) -> (f64, Outcome) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let inputs = input::find(&[source.to_str().unwrap().to_owned()], &Default::default()).unwrap();
    let (settings, output) = (settings.clone(), output.to_path_buf());
    let filter = Filter { settings, matcher: None, inputs, output, is_file: false, rank: 0, world_size: 1 };
    let outcome = filter.run(&|_| {}).unwrap();
    ((PEAK.load(Relaxed) - before) as f64, outcome)
}

/// One table: its rows are in memory neither together nor by their features.
#[test]
fn a_row_of_a_table_takes_17_bytes() {
    if runs_elsewhere("filter_memory::a_row_of_a_table_takes_17_bytes") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let rules =
        DuplicateRules { max_caption_repeats: None, unique_captions: true, image_distance: None, mirrored: false };
    let run = |rows: usize| {
        let (source, output) = (folder.path().join(format!("{rows}.jsonl")), folder.path().join(rows.to_string()));
        let mut text = String::new();
        (0..rows).for_each(|row| writeln!(text, "{{\"caption\":\"第{}张图片\"}}", row / 2 * 2).unwrap());
        fs::write(&source, text).unwrap();
        let (first, outcome) = peak(&source, &output, &settings(rules));
        assert_eq!((outcome.report.rows, outcome.report.kept), (rows as u64, rows as u64 / 2));
        let (second, outcome) = peak(&source, &output, &settings(rules));
        assert_eq!(outcome.finished_before, 1);
        [first, second]
    };
    run(1000); // what is made once
    let (few, many) = (100_000, 300_000);
    let (small, large) = (run(few), run(many));
    for (pass, (small, large)) in small.into_iter().zip(large).enumerate() {
        let each = (large - small) / (many - few) as f64;
        println!("run {pass}: {small} and {large} bytes, {each:.1} a row more");
        assert!((10.0..20.0).contains(&each), "run {pass}: {each} bytes a row");
    }
}

/// Many shards: images are in memory neither together nor by their features.
#[test]
fn an_image_of_shards_takes_17_bytes_and_33_with_its_mirror() {
    if runs_elsewhere("filter_memory::an_image_of_shards_takes_17_bytes_and_33_with_its_mirror") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (few, many, samples) = (2, 10, 500);
    let run = |count: u32, mirrored: bool| {
        let name = count.to_string();
        let (source, output) = (folder.path().join(&name), folder.path().join("out").join(&name));
        let rules =
            DuplicateRules { max_caption_repeats: None, unique_captions: false, image_distance: Some(2), mirrored };
        let (first, outcome) = peak(&source, &output, &settings(rules));
        assert_eq!(outcome.report.rows, u64::from(count * samples));
        assert!(outcome.report.kept < outcome.report.rows);
        let (second, outcome) = peak(&source, &output, &settings(rules));
        assert_eq!(outcome.finished_before, u64::from(count));
        [first, second]
    };
    for count in [1, few, many] {
        shards(&folder.path().join(count.to_string()), count, samples, 8);
    }
    run(1, false); // what is made once
    let each = |mirrored: bool| {
        let (small, large) = (run(few, mirrored), run(many, mirrored));
        let each = [0, 1].map(|run| (large[run] - small[run]) / f64::from((many - few) * samples));
        println!("mirrored {mirrored}: {small:?} and {large:?} bytes, {each:?} an image more");
        each
    };
    // The first run reads one shard after the other; the second one only compares.
    let [first, second] = each(false);
    assert!(first < 22.0 && (15.0..22.0).contains(&second), "{first} and {second} bytes an image");
    let [_, second] = each(true);
    assert!((30.0..43.0).contains(&second), "{second} bytes an image");
}
