use super::{
    duplicates::{self, DuplicateRules},
    feature::Feature,
    image_hash::ImageHash,
    input, *,
};
use crate::data::{Kind, Source};
use image::{ImageFormat, RgbImage, imageops};
use proptest::prelude::*;
use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/filter").join(name)
}

pub(super) fn lines(name: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(golden(name)).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

pub(super) fn settings() -> Settings {
    let blocked = Some(BlockedWords::read(&golden("blocked.txt")).unwrap());
    let text = TextRules { max_length: Some(14), unit: Unit::Words, noun: true, no_special_characters: true, blocked };
    let duplicates =
        DuplicateRules { max_caption_repeats: None, unique_captions: false, image_distance: Some(4), mirrored: false };
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

pub(super) fn filter(source: &Path, output: &Path, settings: &Settings) -> Filter<'static> {
    let inputs = input::find(&[source.to_str().unwrap().to_owned()], &Default::default()).unwrap();
    let settings = settings.clone();
    Filter { settings, matcher: None, inputs, output: output.to_path_buf(), is_file: false, rank: 0, world_size: 1 }
}

/// Name and content of all visible files of a folder.
pub(super) fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = crate::data::paths::files(folder).unwrap();
    files.into_iter().map(|path| (path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap())).collect()
}

#[test]
fn decisions_are_those_of_hand_labels() {
    let rules = settings().text;
    let captions = lines("captions.tsv");
    assert!(captions.len() >= 200);
    let wrong: Vec<String> = captions
        .iter()
        .filter_map(|line| {
            let decision = rules.check(&line[1]).0.map_or("keep".to_owned(), |rule| rule.to_string());
            (decision != line[0]).then(|| format!("{}: {decision}, not {}", line[1], line[0]))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn words_are_those_of_pythons_jieba_and_nouns_nearly() {
    let rules = TextRules { no_special_characters: false, blocked: None, max_length: None, ..settings().text };
    let captions = lines("jieba.tsv");
    let mut other_tags = Vec::new();
    for line in &captions {
        let (broken, words) = rules.check(&line[2]);
        assert_eq!(words.to_string(), line[0], "{}", line[2]);
        if u8::from(broken.is_none()).to_string() != line[1] {
            other_tags.push(&line[2]);
        }
    }
    // jieba.posseg cuts and tags unknown words by a model of its own.
    assert!(other_tags.len() * 50 <= captions.len(), "{other_tags:?}");
}

#[test]
fn each_text_rule_can_be_off() {
    let caption = "★非常漂亮".repeat(10);
    let mut rules = settings().text;
    let broken = |rules: &TextRules| rules.check(&caption).0;
    assert_eq!(broken(&rules), Some(Rule::TooLong));
    rules.max_length = None;
    assert_eq!(broken(&rules), Some(Rule::NoNoun));
    rules.noun = false;
    assert_eq!(broken(&rules), Some(Rule::SpecialCharacters));
    rules.no_special_characters = false;
    assert_eq!(broken(&rules), None);
    rules.unit = Unit::Characters;
    assert_eq!(rules.check("★月，a b").1, 3);
}

/// An image of 128 x 96 pixels with slow waves; scripts/golden_filter.py has the same formula.
pub(super) fn waves(number: u32) -> RgbImage {
    RgbImage::from_fn(128, 96, |x, y| {
        let wave = (x * (3 + number) + y * (5 - number % 3) + x * y * number / 64) % 512;
        let level = if wave < 256 { wave } else { 511 - wave };
        image::Rgb([level as u8, ((level + 40 * number) % 256) as u8, (255 - level) as u8])
    })
}

#[test]
fn the_hash_is_that_of_pythons_imagehash() {
    for line in lines("phash.tsv") {
        let expected = u64::from_str_radix(&line[1], 16).unwrap();
        let ours = ImageHash::of(&waves(line[0].parse().unwrap())).bits;
        // Lanczos there, the mean of cells here.
        assert!((ours ^ expected).count_ones() <= 4, "image {}: {ours:016x}, not {expected:016x}", line[0]);
    }
}

pub(super) fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A folder with `count` different images, and planted copies of every other one.
fn planted(folder: &Path, count: u32) {
    for number in 0..count {
        let image = waves(number);
        let write = |kind: &str, extension: &str, bytes: Vec<u8>| {
            let stem = folder.join(format!("{kind}{number:03}"));
            fs::write(stem.with_extension(extension), bytes).unwrap();
            fs::write(stem.with_extension("txt"), "蓝色的波浪").unwrap();
        };
        let png = encoded(&image, ImageFormat::Png);
        write("a", "png", png.clone());
        if number % 2 == 0 {
            write("exact", "png", png);
            let smaller = imageops::resize(&image, 64, 48, imageops::FilterType::Triangle);
            write("resized", "png", encoded(&smaller, ImageFormat::Png));
            write("squeezed", "jpg", encoded(&image, ImageFormat::Jpeg));
            write("mirrored", "png", encoded(&imageops::flip_horizontal(&image), ImageFormat::Png));
        }
    }
}

/// The keys of the samples of all shards.
pub(super) fn keys(folder: &Path) -> Vec<String> {
    let source = Source::open(folder.to_str().unwrap(), 1.0).unwrap();
    let shards = source.shards.iter();
    shards
        .flat_map(|shard| (0..shard.len()).map(|i| shard.members(i as usize, Some(Kind::Captions)).unwrap().0))
        .collect()
}

#[test]
fn planted_duplicates_are_found_and_mirrored_images_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&source).unwrap();
    planted(&source, 20);
    filter(&source, &output, &settings()).run(&|_| {}).unwrap();
    let kept = keys(&output);
    let count = |kind: &str| kept.iter().filter(|key| key.starts_with(kind)).count();
    assert_eq!(["a", "exact", "resized", "squeezed", "mirrored"].map(count), [20, 0, 0, 0, 10]);
    let mut mirrored = settings();
    mirrored.duplicates.mirrored = true;
    let output = folder.path().join("mirrored");
    filter(&source, &output, &mirrored).run(&|_| {}).unwrap();
    assert_eq!(keys(&output).len(), 20);
}

proptest! {
    #[test]
    fn near_images_are_those_of_a_comparison_of_all_pairs(
        base in prop::collection::vec(any::<u64>(), 1..6),
        changed in prop::collection::vec((0_usize..6, prop::collection::vec(0_u32..64, 0..9)), 0..40),
        distance in 0_u32..=8,
    ) {
        let hash = |&(at, ref bits): &(usize, Vec<u32>)| {
            bits.iter().fold(base[at % base.len()], |hash, bit| hash ^ 1 << bit)
        };
        let hashes: Vec<u64> = changed.iter().map(hash).collect();
        let rows: Vec<Feature> = hashes
            .iter()
            .map(|bits| Feature { image: Some(ImageHash { bits: *bits, ..ImageHash::default() }), ..Feature::default() })
            .collect();
        let mut broken = vec![None; rows.len()];
        let rules = DuplicateRules { image_distance: Some(distance), ..settings().duplicates };
        let each_row: &duplicates::EachRow<'_> = &|each| {
            rows.iter().enumerate().for_each(|(row, feature)| each(row as u32, feature));
            Ok(())
        };
        duplicates::mark(&mut broken, &rules, each_row).unwrap();
        for (row, hash) in hashes.iter().enumerate() {
            let near = hashes[..row].iter().any(|first| (first ^ hash).count_ones() <= distance);
            prop_assert_eq!(broken[row].is_some(), near);
        }
    }
}

#[test]
fn frequent_and_repeated_captions_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("a.csv"), folder.path().join("out"));
    fs::write(&source, "caption\n大图的按钮\n小猫\n大图的 按钮\n小猫。\n大图的按钮！\n小狗\n").unwrap();
    let mut settings = settings();
    settings.duplicates.max_caption_repeats = Some(2);
    let report = filter(&source, &output, &settings).run(&|_| {}).unwrap().report;
    assert_eq!(fs::read_to_string(output.join("a.csv")).unwrap(), "caption\n小猫\n小猫。\n小狗\n");
    assert_eq!((report.rows, report.kept), (6, 3));
    settings.duplicates.unique_captions = true;
    filter(&source, &output, &settings).run(&|_| {}).unwrap();
    assert_eq!(fs::read_to_string(output.join("a.csv")).unwrap(), "caption\n小猫\n小狗\n");
}

#[test]
fn sizes_and_similarities_of_tables_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("a.jsonl"), folder.path().join("out"));
    let row = |width: u32, height: u32, score: &str| {
        format!("{{\"caption\":\"小猫\",\"width\":{width},\"height\":{height},\"score\":{score}}}\n")
    };
    let rows =
        [row(100, 100, "0.6"), row(63, 100, "0.6"), row(400, 100, "0.6"), row(99, 99, "0.5"), row(99, 99, "null")];
    fs::write(&source, rows.concat() + "damaged\n").unwrap();
    let settings = Settings {
        min_side: 64,
        max_aspect_ratio: Some(3.0),
        similarity_column: Some("score".into()),
        min_similarity: Some(0.5),
        ..settings()
    };
    let report = filter(&source, &output, &settings).run(&|_| {}).unwrap().report;
    let count = |rule| report.rules.iter().find(|count| count.rule == rule).unwrap().left_out;
    let rules = [Rule::Bad, Rule::SmallImage, Rule::AspectRatio, Rule::LowSimilarity];
    assert_eq!(rules.map(count), [1, 1, 1, 2]);
    assert_eq!(fs::read_to_string(output.join("a.jsonl")).unwrap(), rows[0]);
    assert!(page(&report).unwrap().contains("<h1>1 of 6 rows kept"));
}

/// Writes a shard of `(key, caption lines)` with one image each.
fn shard(path: &Path, samples: &[(&str, &str)]) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (number, (key, text)) in samples.iter().enumerate() {
        let json = serde_json::json!({ "captions": text.lines().collect::<Vec<_>>(), "id": number }).to_string();
        let png = encoded(&waves(number as u32), ImageFormat::Png);
        for (extension, content) in
            [("png", &png[..]), ("txt", text.as_bytes()), ("json", json.as_bytes()), ("cls", b"7")]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mtime(1234);
            tar.append_data(&mut header, format!("{key}.{extension}"), content).unwrap();
        }
    }
    tar.finish().unwrap();
}

#[test]
fn kept_samples_are_copied_and_bad_captions_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&source).unwrap();
    shard(&source.join("0.tar"), &[("a", "小猫"), ("b", "很好"), ("c", "★\n小狗\n很好")]);
    filter(&source, &output, &settings()).run(&|_| {}).unwrap();
    let (before, after) = (fs::read(source.join("0.tar")).unwrap(), fs::read(output.join("0.tar")).unwrap());
    let sample = before.windows(5).position(|bytes| bytes == b"b.png").unwrap();
    assert_eq!(after[..sample], before[..sample], "the first sample is copied with its headers");
    assert_eq!(keys(&output), ["a", "c"]);
    let opened = Source::open(output.to_str().unwrap(), 1.0).unwrap();
    let record = opened.shards[0].read(1, Kind::Pairs(32), None).unwrap();
    assert_eq!((record.captions, record.meta["id"].as_u64()), (vec!["小狗".to_owned()], Some(2)));
    assert_eq!(opened.damage().total(), 0);
}

#[test]
fn captions_are_those_of_the_named_fields() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a.png"), encoded(&waves(1), ImageFormat::Png)).unwrap();
    fs::write(source.join("a.txt"), "很好").unwrap();
    let json = serde_json::json!({ "caption": "很好", "recaption": ["小狗", "非常漂亮"], "title": "很好" });
    fs::write(source.join("a.json"), json.to_string()).unwrap();
    let kept = |keys: &[&str]| {
        let caption_keys = keys.iter().map(|key| (*key).to_owned()).collect();
        let output = folder.path().join(keys.join("-"));
        let report = filter(&source, &output, &Settings { caption_keys, ..settings() }).run(&|_| {}).unwrap().report;
        (report.kept > 0).then(|| {
            let opened = Source::open(output.to_str().unwrap(), 1.0).unwrap();
            let (_, members) = opened.shards[0].members(0, None).unwrap();
            let text = String::from_utf8(members.get("txt").unwrap().to_vec()).unwrap();
            (serde_json::from_slice::<serde_json::Value>(members.get("json").unwrap()).unwrap(), text)
        })
    };
    assert_eq!(kept(&["caption"]), None);
    let (json, text) = kept(&["recaption", "title"]).unwrap();
    let expected = serde_json::json!({ "caption": "很好", "recaption": ["小狗"], "title": null });
    assert_eq!((json, text.as_str()), (expected, "很好"));
    let (json, text) = kept(&["txt", "recaption"]).unwrap();
    assert_eq!((&json["recaption"], &json["title"], text.as_str()), (&serde_json::json!(["小狗"]), &"很好".into(), ""));
}

#[test]
fn ranks_write_what_one_process_writes_and_a_second_run_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    fs::create_dir(&source).unwrap();
    for (name, captions) in [("0", ["小猫", "小狗"]), ("1", ["小狗", "小鸟"]), ("2", ["小鸟", "很好"])] {
        shard(&source.join(format!("{name}.tar")), &[("a", captions[0]), ("b", captions[1])]);
    }
    let mut settings = settings();
    settings.duplicates = DuplicateRules { image_distance: None, unique_captions: true, ..settings.duplicates };
    let (alone, shared) = (folder.path().join("alone"), folder.path().join("shared"));
    let outcome = filter(&source, &alone, &settings).run(&|_| {}).unwrap();
    assert_eq!((outcome.report.kept, outcome.written, outcome.finished_before), (3, 3, 0));
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let run = Filter { rank, world_size: 2, ..filter(&source, &shared, &settings) };
            scope.spawn(move || run.run(&|_| {}).unwrap());
        }
    });
    assert_eq!(contents(&shared), contents(&alone));
    assert!(!alone.join("2.tar").exists(), "nothing of it is kept");
    let again = filter(&source, &alone, &settings).run(&|_| {}).unwrap();
    assert_eq!((again.written, again.finished_before), (0, 3));
    // A lost output is written again; a changed input changes what depends on it.
    fs::remove_file(alone.join("1.tar")).unwrap();
    shard(&source.join("0.tar"), &[("a", "小马")]);
    filter(&source, &alone, &settings).run(&|_| {}).unwrap();
    assert_eq!(keys(&alone), ["a", "a", "b"]);
}

#[test]
fn files_of_others_are_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("a.csv"), folder.path().join("out"));
    fs::write(&source, "caption\n小猫\n").unwrap();
    fs::create_dir(&output).unwrap();
    fs::write(output.join("a.csv"), "mine").unwrap();
    let error = filter(&source, &output, &settings()).run(&|_| {}).unwrap_err().to_string();
    assert!(error.contains("was not made from"), "{error}");
    assert_eq!(fs::read_to_string(output.join("a.csv")).unwrap(), "mine");
    // Neither is the input, if it is in the output folder.
    let error = filter(&source, folder.path(), &settings()).run(&|_| {}).unwrap_err().to_string();
    assert!(error.contains("was not made from"), "{error}");
}

#[test]
fn wrong_columns_and_tables_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("a.csv");
    fs::write(&source, "text,url\n小猫,u\n").unwrap();
    let error = filter(&source, &folder.path().join("out"), &settings()).run(&|_| {}).unwrap_err();
    assert!(error.to_string().contains("no column `caption`"), "{error}");
    assert!(crate::error::hint_of(&error).unwrap().contains("text, url"));
    assert!(input::find(&["/nowhere/a.csv".to_owned()], &Default::default()).is_err());
}
