//! Quality of generated images from features of InceptionV3: FID, KID, precision and recall, Inception Score.

mod architecture;
mod frechet;
mod inception;
mod inception_score;
mod kid;
mod precision_recall;
mod protocol;
mod statistics;

pub use architecture::Weights;
pub use frechet::{Gaussian, Moments};
pub use inception::{INCEPTION_FILE, Inception};
pub use inception_score::{InceptionScore, inception_score};
pub use kid::{Kid, kid};
pub use precision_recall::{PrecisionRecall, precision_recall};
pub use protocol::Protocol;
pub use statistics::{read as read_statistics, write as write_statistics};

use super::{choose, open, tell_bad};
use crate::{
    data::Kind,
    error::{Result, ensure, failed},
    report,
};
use candle_core::Tensor;
use rayon::prelude::*;

/// Number of images in one batch.
const BATCH: usize = 32;
/// Number of features; fewer images than this give covariances without full rank.
pub const FEATURES: usize = 2048;

/// Which images are measured, and how.
pub struct Settings {
    pub protocol: Protocol,
    /// Number of images, chosen by `seed`; 0: all.
    pub samples: usize,
    pub seed: u64,
    /// Whether the features of each image are kept, 8 KB an image.
    pub keep: bool,
}

/// The features of a set of images.
pub struct Features {
    pub moments: Moments,
    /// `(images, 2048)`, if they were wanted.
    pub all: Option<Tensor>,
}

/// Extracts the features of the images of `data` in the order of their names.
///
/// # Errors
/// The data cannot be read, none of it is usable, or the protocol needs more images.
pub fn extract(network: &Inception, data: &str, settings: &Settings) -> Result<Features> {
    let dataset = open(data, Kind::WholeImages)?;
    let mut places: Vec<(usize, u64)> = dataset.places().collect();
    if settings.samples > 0 {
        let mut chosen = choose(settings.samples, places.len(), settings.seed, "eval images", 0);
        chosen.sort_unstable();
        places = chosen.into_iter().filter_map(|i| places.get(i).copied()).collect();
    }
    let used = settings.protocol.used(places.len());
    let message = format!("the protocol {} needs at least 50 images, not {}", settings.protocol.name(), places.len());
    ensure!(used > 0, failed(message, "give more images, or choose another --protocol"));
    places.truncate(used);
    let (mut moments, mut all, mut bad) = (None::<Moments>, Vec::new(), dataset.bad.clone());
    let bar = report::bar(places.len() as u64, "extracting features");
    for places in places.chunks(BATCH) {
        let input = |&(source, sample): &(usize, u64)| {
            let image = dataset.read(source, sample).map(|record| record.image);
            image.map(|image| image.map(|image| settings.protocol.input(&image)))
        };
        let mut inputs = Vec::with_capacity(BATCH);
        for read in places.par_iter().map(input).collect::<Vec<_>>() {
            match read {
                Ok(input) => inputs.extend(input.transpose()?),
                Err(e) => bad.add(e),
            }
        }
        bar.inc(places.len() as u64);
        if inputs.is_empty() {
            continue;
        }
        let features = network.forward(&Tensor::cat(&inputs, 0)?)?;
        let batch = Moments::of(&features)?;
        match &mut moments {
            Some(moments) => moments.merge(&batch)?,
            None => moments = Some(batch),
        }
        all.extend(settings.keep.then_some(features));
    }
    bar.finish_and_clear();
    tell_bad(data, &bad, moments.as_ref().map_or(0, Moments::count))?;
    let none = || failed(format_args!("`{data}` has no images"), "`vilg data inspect PATH` shows what it contains");
    let all = if all.is_empty() { None } else { Some(Tensor::cat(&all, 0)?) };
    Ok(Features { moments: moments.ok_or_else(none)?, all })
}
