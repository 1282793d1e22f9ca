//! Retrieval accuracy of generated images: whether the caption's real image is the nearest of many images of the same
//! style.

use super::{Rate, choose, open, tell_bad};
use crate::{
    data::{
        Dataset, Kind, Record,
        image::{from_pixels, to_pixels},
    },
    error::{Context, Result, ensure, failed},
    generate::{BestOf, Models, Request, Sampling},
    report,
};
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;
use std::{collections::HashMap, ops::Range};

/// Number of captions in one batch.
const BATCH: usize = 64;

/// Side length to which images are reduced before they are compared, in pixels.
const SIDE: usize = 16;

/// The distance between two images.
pub const DISTANCE: &str = "mean squared RGB difference after box-filtering both images to 16×16";

/// The images to generate, and the images to search among.
pub struct Settings<'a> {
    pub data: &'a str,
    /// Further images to search among, for styles with too few images in `data`.
    pub pool: Option<&'a str>,
    /// Number of samples to measure; 0: all.
    pub samples: usize,
    /// Number of images to search among, the real image included.
    pub candidates: usize,
    pub sampling: Sampling,
    pub best_of: BestOf<'a>,
    pub seed: u64,
}

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Retrieval {
    pub candidates: usize,
    pub distance: &'static str,
    /// The real image is the nearest.
    pub top1: Rate,
    /// The real image is among the five nearest.
    pub top5: Rate,
    pub chance_top1: f64,
    pub chance_top5: f64,
    /// Upper bound: the same two rates for real images after a tokenizer round trip.
    pub reconstructed_top1: Rate,
    pub reconstructed_top5: Rate,
}

/// An image to search among.
struct Candidate {
    features: Vec<f32>,
    caption: String,
    style: usize,
    /// Source and sample in its data set.
    place: (usize, u64),
}

/// The captions to generate images from, each with the images to search among.
pub(super) struct Queries {
    data: Dataset,
    images: Vec<Candidate>,
    /// For each query: its own image and the others, as indices of `images`.
    queries: Vec<(usize, Vec<usize>)>,
}

impl Queries {
    /// Reads the images of `settings.data` and of the pool, with a side of `side` pixels, and chooses captions.
    ///
    /// # Errors
    /// The data cannot be read, or a style has too few images.
    pub(super) fn read(settings: &Settings, side: usize) -> Result<Self> {
        ensure!(settings.candidates >= 2, "--candidates must be at least 2");
        let (mut styles, side) = (HashMap::new(), side as u32);
        let data = open(settings.data, Kind::Pairs(side))?;
        let mut images = read(&data, settings.data, &mut styles)?;
        let of_data = images.len();
        if let Some(pool) = settings.pool {
            images.extend(read(&open(pool, Kind::Pairs(side))?, pool, &mut styles)?);
        }
        let count = if settings.samples == 0 { of_data } else { settings.samples };
        let chosen = choose(count, of_data, settings.seed, "eval pairs", 0);
        let shelf = Shelf::new(&images, of_data, styles.len());
        let query = |own| Ok((own, shelf.others(own, settings.candidates - 1, settings.seed)?));
        let queries = chosen.into_iter().map(query).collect::<Result<_>>()?;
        Ok(Self { data, images, queries })
    }

    pub(super) fn len(&self) -> usize {
        self.queries.len()
    }

    /// The requests for images of some queries; each has a seed of its own.
    pub(super) fn requests(&self, queries: Range<usize>, seed: u64) -> Vec<Request> {
        let request =
            |(own, _): &(usize, _)| Request::new(self.images[*own].caption.as_str(), seed.wrapping_add(*own as u64));
        self.queries[queries].iter().map(request).collect()
    }

    /// The rank of the query's own image among its candidates by distance from `generated`, counted from 1.
    pub(super) fn rank(&self, query: usize, generated: &RgbImage) -> usize {
        let (own, others) = &self.queries[query];
        let others = others.iter().map(|&other| self.images[other].features.as_slice());
        rank(&features(generated), &self.images[*own].features, others)
    }

    /// The real images of some queries after a round trip through the image tokenizer.
    fn reconstructions(&self, models: &Models, queries: Range<usize>) -> Result<Vec<RgbImage>> {
        let image = |(own, _): &(usize, _)| {
            let (source, sample) = self.images[*own].place;
            self.data
                .read(source, sample)
                .ok()
                .and_then(|record| record.image)
                .context("an image can no longer be read")
        };
        let images = self.queries[queries].iter().map(image).collect::<Result<Vec<_>>>()?;
        let tokenizer = &models.image_tokenizer;
        from_pixels(&tokenizer.decode(&tokenizer.encode(&to_pixels(&images)?)?)?)
    }
}

/// Generates images from captions chosen by the seed and looks up the real image of each caption.
///
/// # Errors
/// The data cannot be read, or a style has too few images.
pub fn run(models: &Models, settings: &Settings) -> Result<Retrieval> {
    let queries = Queries::read(settings, models.image_tokenizer.image_size())?;
    let bar = report::bar(queries.len() as u64, "generating");
    let (mut ranks, mut reconstructed) = (Vec::with_capacity(queries.len()), Vec::with_capacity(queries.len()));
    for start in (0..queries.len()).step_by(BATCH) {
        let batch = start..(start + BATCH).min(queries.len());
        let requests = queries.requests(batch.clone(), settings.seed);
        let generated = models.generate_images(&requests, &settings.sampling, &settings.best_of, |_| {})?;
        let reconstructions = queries.reconstructions(models, batch.clone())?;
        for ((query, generated), reconstruction) in batch.clone().zip(&generated).zip(&reconstructions) {
            ranks.push(queries.rank(query, &generated.image));
            reconstructed.push(queries.rank(query, reconstruction));
        }
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    let among =
        |ranks: &[usize], best: usize| Rate::new(ranks.iter().filter(|&&rank| rank <= best).count(), ranks.len());
    Ok(Retrieval {
        candidates: settings.candidates,
        distance: DISTANCE,
        top1: among(&ranks, 1),
        top5: among(&ranks, 5),
        chance_top1: 1.0 / settings.candidates as f64,
        chance_top5: (5.0 / settings.candidates as f64).min(1.0),
        reconstructed_top1: among(&reconstructed, 1),
        reconstructed_top5: among(&reconstructed, 5),
    })
}

fn read(dataset: &Dataset, path: &str, styles: &mut HashMap<String, usize>) -> Result<Vec<Candidate>> {
    let (mut found, mut bad) = (Vec::new(), dataset.bad.clone());
    for (source, shares) in dataset.sources.iter().enumerate() {
        let read = |sample| dataset.read(source, sample).map(reduce);
        let read: Vec<_> = (0..shares.len()).into_par_iter().map(read).collect();
        for (sample, result) in read.into_iter().enumerate() {
            match result {
                Ok((features, caption, style)) => {
                    let next = styles.len();
                    let style = *styles.entry(style).or_insert(next);
                    found.push(Candidate { features, caption, style, place: (source, sample as u64) });
                }
                Err(e) => bad.add(e),
            }
        }
    }
    tell_bad(path, &bad, found.len())?;
    Ok(found)
}

/// Features, caption and style of a sample. Samples without `style` in their JSON share the empty style.
fn reduce(record: Record) -> (Vec<f32>, String, String) {
    let style = record.meta.get("style").and_then(|style| style.as_str()).unwrap_or_default().to_owned();
    (record.image.as_ref().map(features).unwrap_or_default(), record.caption, style)
}

/// Candidates grouped by style.
struct Shelf<'a> {
    images: &'a [Candidate],
    /// For each style: images of the data, and images of the pool.
    styles: Vec<[Vec<usize>; 2]>,
}

impl<'a> Shelf<'a> {
    fn new(images: &'a [Candidate], of_data: usize, styles: usize) -> Self {
        let mut shelf = vec![[Vec::new(), Vec::new()]; styles];
        for (i, image) in images.iter().enumerate() {
            shelf[image.style][usize::from(i >= of_data)].push(i);
        }
        Self { images, styles: shelf }
    }

    /// `count` other images of the same style: from the data first, then from the pool. An image with the same features
    /// counts as the same image.
    fn others(&self, own: usize, count: usize, seed: u64) -> Result<Vec<usize>> {
        let image = &self.images[own];
        let mut others = Vec::with_capacity(count);
        for (part, purpose) in self.styles[image.style].iter().zip(["eval others", "eval pool"]) {
            for i in choose(part.len(), part.len(), seed, purpose, own as u64) {
                if others.len() < count && self.images[part[i]].features != image.features {
                    others.push(part[i]);
                }
            }
        }
        let message = format!("only {} other images of one style, {count} are needed", others.len());
        let hint = "add images with --pool, or lower --candidates";
        ensure!(others.len() == count, failed(message, hint));
        Ok(others)
    }
}

/// The rank of `own`, counted from 1, by distance from `generated`; ties count against it.
fn rank<'a>(generated: &[f32], own: &[f32], others: impl Iterator<Item = &'a [f32]>) -> usize {
    let own = distance(generated, own);
    1 + others.filter(|other| distance(generated, other) <= own).count()
}

/// Mean squared difference.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>() / a.len() as f64
}

/// An image box-filtered to 16×16 RGB values of 0 to 255, row by row.
fn features(image: &RgbImage) -> Vec<f32> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let (columns, rows) = (spans(width), spans(height));
    let mut values = Vec::with_capacity(SIDE * SIDE * 3);
    for row in &rows {
        for column in &columns {
            let mut sum = [0.0; 3];
            for &(y, vertical) in row {
                for &(x, horizontal) in column {
                    let pixel = image.get_pixel(x as u32, y as u32).0;
                    sum.iter_mut().zip(pixel).for_each(|(s, c)| *s += vertical * horizontal * f64::from(c));
                }
            }
            values.extend(sum.map(|s| s as f32));
        }
    }
    values
}

/// For each of [`SIDE`] equal parts of `size` pixels: the pixels that it covers, with their weights.
fn spans(size: usize) -> Vec<Vec<(usize, f64)>> {
    let part = size as f64 / SIDE as f64;
    let span = |i: usize| {
        let (start, end) = (i as f64 * part, (i + 1) as f64 * part);
        let pixels = start as usize..(end.ceil() as usize).min(size);
        let share = |x: usize| (end.min((x + 1) as f64) - start.max(x as f64)) / part;
        pixels.map(|x| (x, share(x))).filter(|(_, share)| *share > 0.0).collect()
    };
    (0..SIDE).map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn box_filter_averages() {
        let image = RgbImage::from_fn(64, 32, |x, y| Rgb([(x * 4) as u8, (y * 8) as u8, 7]));
        let values = features(&image);
        assert_eq!(values.len(), 16 * 16 * 3);
        // Cell (row 2, column 3) covers x 12..16 and y 4..6.
        let cell = &values[(2 * 16 + 3) * 3..][..3];
        assert!((cell[0] - 54.0).abs() < 1e-4 && (cell[1] - 36.0).abs() < 1e-4 && (cell[2] - 7.0).abs() < 1e-4);
    }

    #[test]
    fn spans_cover_every_pixel_once() {
        for size in [1, 5, 16, 17, 40, 64, 100] {
            let mut covered = vec![0.0; size];
            for span in spans(size) {
                assert!((span.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9, "{size}");
                span.iter().for_each(|&(x, share)| covered[x] += share);
            }
            assert!(covered.iter().all(|c| (c - 16.0 / size as f64).abs() < 1e-9), "{size} {covered:?}");
        }
    }

    #[test]
    fn rank_counts_ties_against() {
        let others: [&[f32]; 4] = [&[0.0, 9.0], &[2.0, 0.0], &[0.0, 2.0], &[5.0, 5.0]];
        let rank = |generated: [f32; 2], own: [f32; 2]| rank(&generated, &own, others.into_iter());
        assert_eq!(rank([0.0, 0.0], [1.0, 1.0]), 1);
        assert_eq!(rank([0.0, 0.0], [2.0, 0.0]), 3, "two others are just as near");
        assert_eq!(rank([0.0, 0.0], [9.0, 9.0]), 5);
        assert_eq!(rank([9.0, 9.0], [9.0, 9.0]), 1);
    }

    fn candidate(style: usize, value: f32) -> Candidate {
        Candidate { features: vec![value], caption: String::new(), style, place: (0, 0) }
    }

    #[test]
    fn others_have_the_style_and_come_from_the_pool_only_if_needed() {
        let mut images: Vec<Candidate> = (0..12).map(|i| candidate(i % 2, i as f32)).collect();
        images.push(candidate(0, 4.0)); // a copy of image 4
        let of_data = images.len();
        images.extend((0..6).map(|i| candidate(i % 2, 100.0 + i as f32)));
        let shelf = Shelf::new(&images, of_data, 2);
        for seed in 0..5 {
            for (own, count) in [(4, 5), (4, 8), (5, 3), (1, 8)] {
                let others = shelf.others(own, count, seed).unwrap();
                let different: std::collections::BTreeSet<_> = others.iter().collect();
                assert_eq!(different.len(), count);
                for &other in &others {
                    assert!(images[other].style == images[own].style);
                    assert!(images[other].features != images[own].features);
                    assert!(count > 5 || other < of_data);
                }
            }
        }
        assert_ne!(shelf.others(5, 3, 0).unwrap(), shelf.others(5, 3, 1).unwrap());
        let error = shelf.others(4, 9, 0).unwrap_err();
        assert!(error.to_string().contains("only 8"), "{error}");
    }
}
