//! The features of images whose distributions are compared: Inception's, which give the FID, or a matcher's embeddings.

use super::{
    each_batch_of_images,
    fid::{self, Gaussian, Inception, Moments, Protocol},
    open,
};
use crate::{
    data::Kind,
    error::{Hint, Result, ensure, usage},
    generate::Matching,
};
use candle_core::{Device, Tensor};
use image::RgbImage;
use std::path::Path;

/// Images that are read and compared together.
const BATCH: usize = 32;

/// The network whose features are compared.
pub enum Features {
    Inception(Box<Inception>, Protocol),
    /// The embeddings of images by a matcher, and its digest.
    Matcher(Box<Matching>, String),
}

impl Features {
    /// What is compared, for results and for finding out whether two measurements compare the same.
    pub fn name(&self) -> String {
        match self {
            Self::Inception(_, protocol) => format!("Inception, protocol {}", protocol.name()),
            Self::Matcher(_, digest) => format!("matcher {digest}"),
        }
    }

    /// The features of images of any size, `(images, dim)`, on the CPU.
    ///
    /// # Errors
    /// There are no images, or a feature is not finite.
    pub fn of(&self, images: &[RgbImage]) -> Result<Tensor> {
        ensure!(!images.is_empty(), "no images to compare");
        let features = match self {
            Self::Inception(network, protocol) => {
                let batches = images.chunks(BATCH).map(|images| protocol.features(network, images));
                Tensor::cat(&batches.collect::<Result<Vec<_>>>()?, 0)?
            }
            Self::Matcher(matching, _) => matching.embed_images(images)?,
        };
        Ok(features.to_device(&Device::Cpu)?)
    }

    /// Numbers of a feature; fewer images than this give covariances without full rank.
    pub fn width(&self) -> usize {
        match self {
            Self::Inception(..) => fid::FEATURES,
            Self::Matcher(matching, _) => matching.embedding(),
        }
    }

    /// How many of `count` images are compared: the first ones.
    pub fn used(&self, count: usize) -> usize {
        match self {
            Self::Inception(_, protocol) => protocol.used(count),
            Self::Matcher(..) => count,
        }
    }

    /// Refuses real images or statistics that cannot be compared, before hours of work.
    ///
    /// # Errors
    /// There is nothing at `real`, or the statistics are of other features.
    pub fn check(&self, real: &str) -> Result<()> {
        if real.ends_with(".npz") {
            return self.statistics(Path::new(real)).map(drop);
        }
        open(real, Kind::WholeImages).map(drop)
    }

    /// The moments of the features of all images of `data`, of any sizes.
    ///
    /// # Errors
    /// The data cannot be read, none of it is usable, or a feature is not finite.
    pub fn moments(&self, data: &str) -> Result<Moments> {
        if let Self::Inception(network, protocol) = self {
            let settings = fid::Settings { protocol: *protocol, samples: 0, seed: 0, keep: false };
            return Ok(fid::extract(network, data, &settings)?.moments);
        }
        let dataset = open(data, Kind::WholeImages)?;
        let places: Vec<_> = dataset.places().collect();
        let mut moments = None::<Moments>;
        each_batch_of_images(data, &dataset, &places, BATCH, |images| {
            Moments::add_to(&mut moments, &self.of(&images)?)
        })?;
        moments.hint(format_args!("`{data}` has no images"), "`vilg data inspect PATH` shows what it contains")
    }

    /// Statistics of Inception's features, as `vilg eval fid --save-stats` writes them.
    ///
    /// # Errors
    /// The features are a matcher's, or the file cannot be read or is of another protocol.
    pub fn statistics(&self, file: &Path) -> Result<Gaussian> {
        match self {
            Self::Inception(_, protocol) => fid::read_statistics(file, *protocol),
            Self::Matcher(..) => {
                let what = format!("{} has statistics of Inception's features", file.display());
                Err(usage(what, "name Inception's folder with --inception, or give images"))
            }
        }
    }
}
