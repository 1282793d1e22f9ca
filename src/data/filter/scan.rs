//! The first pass: the features of each row of an input.

use super::{
    Settings,
    feature::{Feature, Scanned},
    image_hash::ImageHash,
    input::{Input, InputKind},
    text::{TextRules, half_width},
};
use crate::{
    data::{
        bad::{Bad, BadCounts},
        embeddings::{PairEmbedder, StoredEmbeddings},
        image,
        record::{Kind, image_member},
        resample::resize_bicubic,
        shard::Shard,
        table::{Row, Table},
    },
    error::Result,
};
use ::image::RgbImage;
use rayon::prelude::*;

/// Rows that one task checks; few enough to share small inputs among the threads.
const TASK: usize = 64;
/// Samples that a matcher compares together; their images are in memory.
const BATCH: usize = 256;
/// Samples that are scanned together without a matcher.
const CHUNK: usize = 4096;

/// Receives consecutive rows; false ends the scan.
pub type Each<'a> = dyn FnMut(Vec<Scanned>) -> Result<bool> + 'a;

/// Scans an input, whose rows `each` receives in order, a few thousand at a time. `progress` is called with numbers of
/// finished rows. Returns the damage that belongs to no row.
///
/// # Errors
/// The input cannot be read, an embedding is not finite, or `each` fails.
pub fn scan(
    input: &Input,
    settings: &Settings,
    matcher: Option<&PairEmbedder<'_>>,
    progress: &(impl Fn(u64) + Sync),
    each: &mut Each<'_>,
) -> Result<BadCounts> {
    match input.kind {
        InputKind::Table => scan_table(input, settings, progress, each),
        InputKind::Tar | InputKind::Folder => {
            let shard = input.shard()?;
            scan_shard(&shard, settings, matcher, progress, each)
        }
    }
}

fn scan_table(
    input: &Input,
    settings: &Settings,
    progress: &(impl Fn(u64) + Sync),
    each: &mut Each<'_>,
) -> Result<BadCounts> {
    let mut table = Table::open(&input.path)?;
    table.require(&settings.caption_column, "--caption-column", &input.path)?;
    if let Some(column) = &settings.similarity_column {
        table.require(column, "--similarity-column", &input.path)?;
    }
    while let Some(rows) = table.next_batch()? {
        let indices: Vec<usize> = (0..rows.len()).collect();
        let scanned = indices.par_iter().with_min_len(TASK).map(|index| {
            let locate = |bad: Bad| Bad::new(bad.cause, format_args!("{}: {}", input.path.display(), bad.place));
            let row = rows.get(*index).map_err(locate)?;
            scan_row(&row, settings).map_err(|bad| locate(rows.locate(*index, bad)))
        });
        let goes_on = each(scanned.collect())?;
        progress(rows.len() as u64);
        if !goes_on {
            break;
        }
    }
    Ok(BadCounts::default())
}

fn scan_row(row: &Row<'_>, settings: &Settings) -> Result<Feature, Bad> {
    let caption = row.text(&settings.caption_column)?;
    let (mut feature, _) = of_captions(caption.as_deref().into_iter(), &settings.text)?;
    let sides = row.number(&settings.width_column).zip(row.number(&settings.height_column));
    let broken = || sides.and_then(|(width, height)| settings.broken_by_size(width, height));
    feature.broken = feature.broken.or_else(broken);
    feature.similarity = settings.similarity_column.as_ref().and_then(|column| row.number(column));
    Ok(feature)
}

/// A sample, with its image and caption if their similarity must still be computed.
struct Sample {
    feature: Feature,
    pair: Option<(RgbImage, String)>,
}

/// A matcher, and its embeddings of a shard if they are stored.
#[derive(Clone, Copy)]
struct Similarity<'a> {
    matcher: &'a PairEmbedder<'a>,
    stored: Option<&'a StoredEmbeddings>,
}

fn scan_shard(
    shard: &Shard,
    settings: &Settings,
    matcher: Option<&PairEmbedder<'_>>,
    progress: &(impl Fn(u64) + Sync),
    each: &mut Each<'_>,
) -> Result<BadCounts> {
    let _held = shard.hold_before(None)?;
    // Stored are the embeddings of the usual captions.
    let usual = matcher.filter(|_| settings.caption_keys.is_empty());
    let stored = usual.and_then(|matcher| StoredEmbeddings::open(shard, matcher));
    let similarity = matcher.map(|matcher| Similarity { matcher, stored: stored.as_ref() });
    let (samples, chunk) = (shard.len() as usize, if matcher.is_some() { BATCH } else { CHUNK });
    for start in (0..samples).step_by(chunk) {
        let scanned = (start..samples.min(start + chunk)).into_par_iter().map(|index| {
            let scanned = scan_sample(shard, index, settings, similarity);
            progress(1);
            scanned
        });
        let mut scanned: Vec<_> = scanned.collect();
        if let Some(matcher) = matcher {
            compare(&mut scanned, matcher)?;
        }
        if !each(scanned.into_iter().map(|sample| sample.map(|sample| sample.feature)).collect())? {
            break;
        }
    }
    Ok(shard.bad.clone())
}

/// Computes the similarities that are missing.
fn compare(scanned: &mut [Result<Sample, Bad>], matcher: &PairEmbedder<'_>) -> Result<()> {
    let (mut images, mut texts, mut features) = (Vec::new(), Vec::new(), Vec::new());
    for Sample { feature, pair } in scanned.iter_mut().flatten() {
        if let Some((image, text)) = pair.take() {
            images.push(image);
            texts.push(text);
            features.push(feature);
        }
    }
    if !images.is_empty() {
        let cosines = matcher.cosines(&images, &texts)?;
        features.into_iter().zip(cosines).for_each(|(feature, cosine)| feature.similarity = Some(cosine));
    }
    Ok(())
}

fn scan_sample(
    shard: &Shard,
    index: usize,
    settings: &Settings,
    similarity: Option<Similarity<'_>>,
) -> Result<Sample, Bad> {
    let embeds = similarity.is_some_and(|similarity| similarity.stored.is_none());
    let reads = if settings.reads_images() || embeds { None } else { Some(Kind::Captions) };
    let (key, members) = shard.members(index, reads)?;
    let record = shard.parse(&key, &members, Kind::Captions, None, &settings.caption_keys)?;
    let (mut feature, caption) = of_captions(record.captions.iter().map(String::as_str), &settings.text)?;
    let decode = |members| image_member(members).and_then(image::decode).map_err(|bad| shard.locate(&key, bad));
    let mut image = None;
    if feature.broken.is_none() && settings.reads_images() {
        let decoded = decode(&members)?;
        feature.broken = settings.broken_by_size(decoded.width().into(), decoded.height().into());
        feature.image = settings.duplicates.image_distance.map(|_| ImageHash::of(&decoded));
        image = Some(decoded);
    }
    if let Some(column) = &settings.similarity_column {
        feature.similarity = record.meta.get(column).and_then(serde_json::Value::as_f64);
    }
    let Some(Similarity { matcher, stored }) = similarity.filter(|_| feature.broken.is_none()) else {
        return Ok(Sample { feature, pair: None });
    };
    // Of several captions, they are those of the first.
    let stored = stored.filter(|_| record.captions.first().is_some_and(|first| first == caption));
    feature.similarity = stored.and_then(|stored| stored.cosine(index));
    if feature.similarity.is_some() {
        return Ok(Sample { feature, pair: None });
    }
    let image = match image {
        Some(image) => image,
        None if reads.is_none() => decode(&members)?,
        None => decode(&shard.members(index, None)?.1)?,
    };
    let image = resize_bicubic(&image, matcher.image_size, matcher.image_size);
    Ok(Sample { feature, pair: Some((image, caption.to_owned())) })
}

/// The first caption that breaks no rule, with its feature; without one, the first caption.
fn of_captions<'a>(captions: impl Iterator<Item = &'a str>, rules: &TextRules) -> Result<(Feature, &'a str), Bad> {
    let mut first = None;
    for caption in captions.filter(|caption| !caption.trim().is_empty()) {
        let (broken, length) = rules.check(caption);
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        let feature = Feature { broken, length, caption: hash(caption), ..Feature::default() };
        if broken.is_none() {
            return Ok((feature, caption));
        }
        first = first.or(Some((feature, caption)));
    }
    first.ok_or_else(|| Bad::new(crate::data::bad::Cause::NoCaption, ""))
}

/// Hash of a caption without case, spaces and punctuation; full-width letters and digits equal half-width ones.
fn hash(caption: &str) -> u64 {
    let plain = caption.chars().map(half_width).filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase);
    let digest = blake3::hash(plain.collect::<String>().as_bytes());
    digest.as_bytes().iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}
