//! The first pass: the features of each row of an input.

use super::{
    Settings,
    feature::{Feature, Features},
    image_hash::ImageHash,
    input::{Input, InputKind},
    rule::Rule,
    text::TextRules,
};
use crate::{
    data::{
        bad::Bad,
        image,
        record::{Kind, image_member},
        shard::Shard,
        table::{Row, Table},
    },
    error::Result,
};
use rayon::prelude::*;

/// Rows that one task checks; few enough to share small inputs among the threads.
const TASK: usize = 64;

/// Scans an input; `progress` is called with numbers of finished rows.
///
/// # Errors
/// The input cannot be read. Damaged rows are counted in the features.
pub fn scan(input: &Input, settings: &Settings, progress: &(impl Fn(u64) + Sync)) -> Result<Features> {
    match input.kind {
        InputKind::Table => scan_table(input, settings, progress),
        InputKind::Tar | InputKind::Folder => Ok(scan_shard(&input.shard()?, settings, progress)),
    }
}

fn scan_table(input: &Input, settings: &Settings, progress: &(impl Fn(u64) + Sync)) -> Result<Features> {
    let mut table = Table::open(&input.path)?;
    table.require(&settings.caption_column, "--caption-column", &input.path)?;
    if let Some(column) = &settings.similarity_column {
        table.require(column, "--similarity-column", &input.path)?;
    }
    let mut features = Features::default();
    while let Some(rows) = table.next_batch()? {
        let indices: Vec<usize> = (0..rows.len()).collect();
        let scanned = indices.par_iter().with_min_len(TASK).map(|index| {
            let locate = |bad: Bad| Bad::new(bad.cause, format_args!("{}: {}", input.path.display(), bad.place));
            let row = rows.get(*index).map_err(locate)?;
            scan_row(&row, settings).map_err(|bad| locate(rows.locate(*index, bad)))
        });
        add(scanned.collect(), &mut features);
        progress(rows.len() as u64);
    }
    Ok(features)
}

fn add(scanned: Vec<Result<Feature, Bad>>, features: &mut Features) {
    for row in scanned {
        features.rows.push(row.unwrap_or_else(|bad| {
            features.bad.add(bad);
            Feature { broken: Some(Rule::Bad), ..Feature::default() }
        }));
    }
}

fn scan_row(row: &Row<'_>, settings: &Settings) -> Result<Feature, Bad> {
    let caption = row.text(&settings.caption_column)?;
    let mut feature = of_captions(caption.as_deref().into_iter(), &settings.text)?;
    let sides = row.number(&settings.width_column).zip(row.number(&settings.height_column));
    let broken = || sides.and_then(|(width, height)| settings.broken_by_size(width, height));
    feature.broken = feature.broken.or_else(broken);
    let similarity = settings.similarity_column.as_ref().map(|column| row.number(column));
    feature.broken = feature.broken.or_else(|| similarity.and_then(|number| settings.broken_by_similarity(number)));
    Ok(feature)
}

fn scan_shard(shard: &Shard, settings: &Settings, progress: &(impl Fn(u64) + Sync)) -> Features {
    let mut features = Features { bad: shard.bad.clone(), ..Features::default() };
    let indices: Vec<usize> = (0..shard.len() as usize).collect();
    let scanned = indices.par_iter().map(|index| {
        let feature = scan_sample(shard, *index, settings);
        progress(1);
        feature
    });
    add(scanned.collect(), &mut features);
    features
}

fn scan_sample(shard: &Shard, index: usize, settings: &Settings) -> Result<Feature, Bad> {
    let reads = if settings.reads_images() { None } else { Some(Kind::Captions) };
    let (key, members) = shard.members(index, reads)?;
    let record = shard.parse(&key, &members, Kind::Captions, None, &[])?;
    let mut feature = of_captions(record.captions.iter().map(String::as_str), &settings.text)?;
    if feature.broken.is_none() && settings.reads_images() {
        let image = image_member(&members).and_then(image::decode).map_err(|bad| shard.locate(&key, bad))?;
        feature.broken = settings.broken_by_size(image.width().into(), image.height().into());
        feature.image = settings.duplicates.image_distance.map(|_| ImageHash::of(&image));
    }
    if let Some(column) = &settings.similarity_column {
        let number = record.meta.get(column).and_then(serde_json::Value::as_f64);
        feature.broken = feature.broken.or_else(|| settings.broken_by_similarity(number));
    }
    Ok(feature)
}

/// The feature of the first caption that breaks no rule; without one, of the first caption.
fn of_captions<'a>(captions: impl Iterator<Item = &'a str>, rules: &TextRules) -> Result<Feature, Bad> {
    let mut first = None;
    for caption in captions.filter(|caption| !caption.trim().is_empty()) {
        let (broken, length) = rules.check(caption);
        let feature =
            Feature { broken, length: u16::try_from(length).unwrap_or(u16::MAX), caption: hash(caption), image: None };
        if broken.is_none() {
            return Ok(feature);
        }
        first = first.or(Some(feature));
    }
    first.ok_or_else(|| Bad::new(crate::data::bad::Cause::NoCaption, ""))
}

/// Hash of a caption without case, spaces and punctuation; full-width letters and digits equal half-width ones.
fn hash(caption: &str) -> u64 {
    let fold = |c: char| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).unwrap_or(c),
        c => c,
    };
    let plain = caption.chars().map(fold).filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase);
    let digest = blake3::hash(plain.collect::<String>().as_bytes());
    digest.as_bytes().iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}
