//! Decisions of all rules but those about text (see `tests.rs`), compared with hand labels.

use super::{
    Filter, Settings, duplicates,
    feature::Feature,
    image_hash::ImageHash,
    input::{self, Input},
    rule::Rule,
    scan::scan,
    tests::{contents, encoded, filter, keys, lines, settings, waves},
};
use image::{ImageFormat, RgbImage, imageops};
use std::{fs, path::Path};

/// The broken rule of each row of an input, as [`Filter::run`] finds them; `keep` for none.
fn decisions(input: &Input, settings: &Settings) -> Vec<String> {
    let mut features = Vec::new();
    scan(input, settings, None, &|_| {}, &mut |rows| {
        let bad = Feature { broken: Some(Rule::Bad), ..Feature::default() };
        features.extend(rows.into_iter().map(|row| row.unwrap_or(bad)));
        Ok(true)
    })
    .unwrap();
    let broken = |one: &Feature| one.broken.or_else(|| settings.broken_by_similarity(one.similarity));
    mark(&features, features.iter().map(broken).collect(), settings)
}

fn mark(features: &[Feature], mut broken: Vec<Option<Rule>>, settings: &Settings) -> Vec<String> {
    let each_row: &duplicates::EachRow<'_> = &|each| {
        features.iter().enumerate().for_each(|(row, feature)| each(row as u32, feature));
        Ok(())
    };
    duplicates::mark(&mut broken, &settings.duplicates, each_row).unwrap();
    broken.into_iter().map(|rule| rule.map_or("keep".to_owned(), |rule| rule.to_string())).collect()
}

/// Compares decisions with labels; `shown` names a row.
fn compare<'a>(decisions: &[String], labelled: impl Iterator<Item = (&'a str, String)>) {
    let labelled: Vec<_> = labelled.collect();
    assert_eq!(decisions.len(), labelled.len());
    let wrong: Vec<String> = decisions
        .iter()
        .zip(labelled)
        .filter(|(decision, (label, _))| decision != label)
        .map(|(decision, (label, shown))| format!("{shown}: {decision}, not {label}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn open(path: &Path) -> Input {
    input::find(&[path.to_str().unwrap().to_owned()], &Default::default()).unwrap().remove(0)
}

#[test]
fn decisions_about_rows_are_those_of_hand_labels() {
    let rows = lines("rules.tsv");
    assert!(rows.len() >= 75, "{}", rows.len());
    let mut settings = Settings {
        min_side: 64,
        max_aspect_ratio: Some(3.0),
        similarity_column: Some("score".into()),
        min_similarity: Some(0.5),
        ..settings()
    };
    settings.duplicates.max_caption_repeats = Some(3);
    settings.duplicates.unique_captions = true;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("a.tsv");
    let table = rows.iter().enumerate().map(|(id, row)| format!("{id}\t{}\n", row[1..5].join("\t")));
    fs::write(&source, format!("id\tcaption\twidth\theight\tscore\n{}", table.collect::<String>())).unwrap();
    let found = decisions(&open(&source), &settings);
    compare(&found, rows.iter().map(|row| (row[0].as_str(), format!("{}, {}", row[1..5].join(" "), row[5]))));
    // Every rule that a table can break occurs, and a run keeps those rows.
    let rules = Rule::ALL.into_iter().filter(|rule| *rule != Rule::DuplicateImage);
    assert!(rules.map(|rule| rule.to_string()).all(|rule| found.contains(&rule)));
    let run: Filter<'_> = filter(&source, &folder.path().join("out"), &settings);
    run.run(&|_| {}).unwrap();
    let (_, kept) = contents(&folder.path().join("out")).remove(0);
    let ids = String::from_utf8(kept).unwrap();
    let ids = ids.lines().skip(1).map(|line| line.split('\t').next().unwrap().parse::<usize>().unwrap());
    assert!(ids.eq((0..rows.len()).filter(|row| rows[*row][0] == "keep")));
}

#[test]
fn decisions_about_hashes_are_those_of_hand_labels() {
    let rows = lines("hashes.tsv");
    assert!(rows.len() >= 25, "{}", rows.len());
    for distance in [0, 4, 8] {
        let rows: Vec<_> = rows.iter().filter(|row| row[0] == distance.to_string()).collect();
        let hash = |row: &[String]| {
            let bits = u64::from_str_radix(&row[2], 16).ok()?;
            Some(ImageHash { bits, mirrored: 0, colors: u32::from_str_radix(&row[3], 16).unwrap() })
        };
        let features: Vec<Feature> =
            rows.iter().map(|row| Feature { image: hash(row), ..Feature::default() }).collect();
        let mut settings = settings();
        settings.duplicates.image_distance = Some(distance);
        let found = mark(&features, vec![None; features.len()], &settings);
        compare(&found, rows.iter().map(|row| (row[1].as_str(), format!("{distance}: {} {}", row[2], row[4]))));
    }
}

/// What a row of images.tsv says, as an image file.
fn changed(number: u32, change: &str) -> (Vec<u8>, &'static str) {
    let image = waves(number);
    let (width, height) = image.dimensions();
    let resized = |width, height| imageops::resize(&image, width, height, imageops::FilterType::Triangle);
    let each = |change: fn(&mut image::Rgb<u8>)| {
        let mut changed = image.clone();
        changed.pixels_mut().for_each(change);
        changed
    };
    let new: RgbImage = match change {
        "" | "exact" | "jpeg" => image.clone(),
        "half" | "half jpeg" => resized(width / 2, height / 2),
        "stretched" => resized(width * 3 / 2, height),
        "dot" => {
            let mut dotted = image.clone();
            dotted.put_pixel(20, 30, image::Rgb([255; 3]));
            dotted
        }
        "brighter" => each(|pixel| pixel.0 = pixel.0.map(|value| value.saturating_add(6))),
        "swapped" => each(|pixel| pixel.0.reverse()),
        "mirrored" => imageops::flip_horizontal(&image),
        "upside down" => imageops::flip_vertical(&image),
        "turned" => imageops::rotate90(&image),
        "left half" => imageops::crop_imm(&image, 0, 0, width / 2, height).to_image(),
        other => panic!("{other}"),
    };
    match change.ends_with("jpeg") {
        true => (encoded(&new, ImageFormat::Jpeg), "jpg"),
        false => (encoded(&new, ImageFormat::Png), "png"),
    }
}

#[test]
fn decisions_about_images_are_those_of_hand_labels() {
    let rows = lines("images.tsv");
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    fs::create_dir(&source).unwrap();
    for (number, row) in rows.iter().enumerate() {
        let (bytes, extension) = changed(row[1].parse().unwrap(), &row[2]);
        fs::write(source.join(format!("{number:02}.{extension}")), bytes).unwrap();
        fs::write(source.join(format!("{number:02}.txt")), "蓝色的波浪").unwrap();
    }
    let found = decisions(&open(&source), &settings());
    compare(&found, rows.iter().map(|row| (row[0].as_str(), format!("image {} {}", row[1], row[2]))));
    filter(&source, &folder.path().join("out"), &settings()).run(&|_| {}).unwrap();
    let kept = (0..rows.len()).filter(|row| rows[*row][0] == "keep").map(|row| format!("{row:02}"));
    assert!(keys(&folder.path().join("out")).into_iter().eq(kept));
}

/// Sizes of images themselves, at the thresholds.
#[test]
fn sizes_of_images_are_those_of_their_pixels() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    fs::create_dir(&source).unwrap();
    let labelled = [
        ("keep", 64, 64),
        ("keep", 64, 192),
        ("keep", 192, 64),
        ("small-image", 63, 64),
        ("small-image", 64, 63),
        ("aspect-ratio", 64, 193),
        ("aspect-ratio", 193, 64),
        ("small-image", 10, 100),
    ];
    for (number, (_, width, height)) in labelled.iter().enumerate() {
        let image = RgbImage::from_pixel(*width, *height, image::Rgb([40, 90, 160]));
        fs::write(source.join(format!("{number}.png")), encoded(&image, ImageFormat::Png)).unwrap();
        fs::write(source.join(format!("{number}.txt")), "蓝色的波浪").unwrap();
    }
    let mut settings = Settings { min_side: 64, max_aspect_ratio: Some(3.0), ..settings() };
    settings.duplicates.image_distance = None;
    let found = decisions(&open(&source), &settings);
    compare(&found, labelled.iter().map(|(label, width, height)| (*label, format!("{width} x {height}"))));
}
