//! Captions the images of a data set, for the metrics that compare captions with what is known of the images.

use super::{chosen, open, tell_bad};
use crate::{
    data::{Kind, Record},
    error::Result,
    generate::{Decoding, Models},
    report,
};
use image::RgbImage;

/// Number of images captioned in one batch.
const BATCH: usize = 64;

/// Which images are captioned, and how.
pub struct Settings<'a> {
    /// Path or pattern of the samples.
    pub data: &'a str,
    /// Number of samples, chosen by `seed`; 0: all.
    pub samples: usize,
    pub seed: u64,
    pub decoding: Decoding,
}

/// A sample, without its image, and the caption that the model wrote.
pub(super) struct Captioned {
    pub record: Record,
    pub caption: String,
}

/// Captions those chosen samples that are `wanted`; returns them and the number of unwanted ones. Damaged samples are
/// left out with a warning. `with_captions` selects whether samples must have captions.
///
/// # Errors
/// The data cannot be read, none of it is usable, or the model is damaged.
pub(super) fn run(
    models: &Models,
    settings: &Settings,
    with_captions: bool,
    wanted: impl Fn(&Record) -> bool,
) -> Result<(Vec<Captioned>, usize)> {
    let side = models.image_tokenizer.image_size() as u32;
    let dataset = open(settings.data, if with_captions { Kind::Pairs(side) } else { Kind::Images(side) })?;
    let places = chosen(&dataset, settings.samples, settings.seed, "eval pairs");
    let (mut captioned, mut unwanted, mut bad) = (Vec::new(), 0, dataset.bad.clone());
    let bar = report::bar(places.len() as u64, "captioning");
    for chunk in places.chunks(BATCH) {
        let (mut images, mut records): (Vec<RgbImage>, Vec<Record>) = Default::default();
        for &(source, sample) in chunk {
            match dataset.read(source, sample) {
                Ok(record) if !wanted(&record) => unwanted += 1,
                Ok(mut record) => {
                    images.extend(record.image.take());
                    records.push(record);
                }
                Err(e) => bad.add(e),
            }
        }
        let captions = models.caption(&models.encode(&images)?, &settings.decoding, 1)?;
        let first = captions.into_iter().map(|found| found.into_iter().next().map(|c| c.text).unwrap_or_default());
        captioned.extend(records.into_iter().zip(first).map(|(record, caption)| Captioned { record, caption }));
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    tell_bad(settings.data, &bad, captioned.len() + unwanted)?;
    Ok((captioned, unwanted))
}
