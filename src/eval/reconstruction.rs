//! Reconstruction quality of image tokenizers: images are encoded, decoded and compared with the originals.

use super::{
    color_error::{ColorErrors, Sector},
    fid::{Inception, Moments},
    read_chosen,
    similarity::{psnr, ssim},
};
use crate::{
    data::{
        Kind,
        image::{from_pixels, to_pixels},
    },
    error::{Error, Result},
    report,
    tokenizer::{ImageTokenizer, perceptual::Perceptual},
};
use candle_core::{Device, Tensor};
use image::{RgbImage, imageops};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;

/// Batch size in images.
const BATCH: usize = 16;

/// Images and metrics of a comparison.
pub struct Settings<'a> {
    pub data: &'a str,
    /// Number of images, chosen by the seed; 0: all.
    pub samples: usize,
    pub seed: u64,
    /// Network for LPIPS and the Fréchet distance.
    pub perceptual: Option<&'a Perceptual>,
    /// Network for the FID.
    pub inception: Option<&'a Inception>,
}

/// Metrics, as means over all images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reconstruction {
    pub images: usize,
    /// Peak signal-to-noise ratio in dB.
    pub psnr: f64,
    /// Color error of saturated pixels, by hue.
    pub colors: Vec<Sector>,
    /// Structural similarity; `None` if the images are too small.
    pub ssim: Option<f64>,
    /// LPIPS over VGG-16.
    pub lpips: Option<f64>,
    /// Fréchet distance of VGG-16's last features (averaged over positions) between images and reconstructions.
    pub frechet_vgg: Option<f64>,
    /// Reconstruction FID: the same with Inception features.
    pub fid: Option<f64>,
    /// Share of codebook entries used by at least one image.
    pub codebook_used: f64,
    /// Perplexity of the codes: e to the entropy of their frequencies.
    pub perplexity: f64,
}

/// The metrics, and the first images with their reconstructions.
pub struct Outcome {
    pub result: Reconstruction,
    pub pairs: Vec<(RgbImage, RgbImage)>,
}

/// Measures one tokenizer; keeps the first `shown` images.
///
/// # Errors
/// The data cannot be read.
pub fn run(tokenizer: &ImageTokenizer, settings: &Settings, shown: usize) -> Result<Outcome> {
    let originals = read(tokenizer, settings)?;
    let (mut codes, mut lpips, mut pairs) = (BTreeMap::<u32, usize>::new(), Vec::new(), Vec::new());
    let (mut vgg, mut inception, mut similar) = (Pair::default(), Pair::default(), Vec::new());
    let bar = report::bar(originals.len() as u64, "reconstructing");
    for batch in originals.chunks(BATCH) {
        let encoded = tokenizer.encode(&to_pixels(batch)?)?;
        let reconstructed = from_pixels(&tokenizer.decode(&encoded)?)?;
        encoded.flatten_all()?.to_vec1()?.into_iter().for_each(|code| *codes.entry(code).or_default() += 1);
        let compared =
            batch.par_iter().zip(&reconstructed).map(|(a, b)| (psnr(a, b), ssim(a, b), ColorErrors::of(a, b)));
        similar.par_extend(compared);
        if let Some(network) = settings.perceptual {
            // Features of the images as written to files: clamped and rounded to 8 bits.
            let [a, b] = [network.features(&to_pixels(batch)?)?, network.features(&to_pixels(&reconstructed)?)?];
            lpips.extend(network.between(&a, &b)?.to_vec1::<f32>()?.into_iter().map(f64::from));
            let last = |features: &[Tensor]| pooled(&features[features.len() - 1]);
            vgg.extend(last(&a)?, last(&b)?);
        }
        if let Some(network) = settings.inception {
            let features = |images| Ok::<_, Error>(network.features(&to_pixels(images)?)?.to_vec2()?);
            inception.extend(features(batch)?, features(&reconstructed)?);
        }
        pairs.extend(batch.iter().cloned().zip(reconstructed).take(shown.saturating_sub(pairs.len())));
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    let mut colors = ColorErrors::default();
    similar.iter().for_each(|(.., errors)| colors.merge(errors));
    let result = Reconstruction {
        images: originals.len(),
        psnr: mean(similar.iter().map(|similar| Some(similar.0))).unwrap_or_default(),
        colors: colors.sectors(),
        ssim: mean(similar.iter().map(|similar| similar.1)),
        lpips: mean(lpips.into_iter().map(Some)),
        frechet_vgg: vgg.distance()?,
        fid: inception.distance()?,
        codebook_used: codes.len() as f64 / tokenizer.codebook_size()? as f64,
        perplexity: perplexity(codes.into_values()),
    };
    Ok(Outcome { result, pairs })
}

/// Features of images and of their reconstructions.
#[derive(Default)]
struct Pair([Vec<Vec<f32>>; 2]);

impl Pair {
    fn extend(&mut self, images: Vec<Vec<f32>>, reconstructed: Vec<Vec<f32>>) {
        self.0.iter_mut().zip([images, reconstructed]).for_each(|(all, more)| all.extend(more));
    }

    fn distance(&self) -> Result<Option<f64>> {
        let [images, reconstructed] = &self.0;
        let gaussian = |rows: &[Vec<f32>]| {
            let values: Vec<f32> = rows.concat();
            let dim = values.len() / rows.len().max(1);
            Moments::of(&Tensor::from_vec(values, (rows.len(), dim), &Device::Cpu)?)?.gaussian()
        };
        (images.len() > 1).then(|| gaussian(images)?.distance(&gaussian(reconstructed)?)).transpose()
    }
}

/// Reads the images at the size of the tokenizer.
fn read(tokenizer: &ImageTokenizer, settings: &Settings) -> Result<Vec<RgbImage>> {
    let kind = Kind::Images(tokenizer.image_size() as u32);
    let records = read_chosen(settings.data, kind, settings.samples, settings.seed, "eval images")?;
    Ok(records.into_iter().filter_map(|record| record.image).collect())
}

/// Averages over positions: `(batch, h, w, c)` → rows of c.
fn pooled(features: &Tensor) -> Result<Vec<Vec<f32>>> {
    let (batch, height, width, channels) = features.dims4()?;
    Ok(features.reshape((batch, height * width, channels))?.mean(1)?.to_vec2()?)
}

/// The mean; `None` if there are no values or one is missing.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values = values.collect::<Option<Vec<f64>>>()?;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// e to the entropy of the frequencies.
fn perplexity(counts: impl Iterator<Item = usize>) -> f64 {
    let counts: Vec<f64> = counts.map(|count| count as f64).collect();
    let total: f64 = counts.iter().sum();
    counts.iter().map(|count| count / total).map(|p| -p * p.ln()).sum::<f64>().exp()
}

/// The images, with the reconstructions of each tokenizer below; one column per image.
pub fn sheet(outcomes: &[Outcome]) -> RgbImage {
    let pairs = outcomes.iter().map(|outcome| &outcome.pairs);
    let side = pairs.clone().flatten().map(|(image, _)| image.width()).max().unwrap_or(1);
    let resized = |image: &RgbImage| imageops::resize(image, side, side, imageops::FilterType::Nearest);
    let mut rows: Vec<RgbImage> = pairs.clone().take(1).flatten().map(|(image, _)| resized(image)).collect();
    let columns = rows.len();
    rows.extend(pairs.flatten().map(|(_, reconstructed)| resized(reconstructed)));
    crate::data::image_file::grid(&rows, columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_of_uniform_use_is_the_number_used() {
        assert!((perplexity([3, 3, 3].into_iter()) - 3.0).abs() < 1e-12);
        assert!((perplexity([5].into_iter()) - 1.0).abs() < 1e-12);
        let two = perplexity([90, 10].into_iter());
        assert!(two > 1.0 && two < 1.5, "{two}");
    }
}
