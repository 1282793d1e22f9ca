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

use super::{choose, each_batch_of_images, open};
use crate::{
    data::Kind,
    error::{Result, ensure, failed},
};
use candle_core::Tensor;

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
    let (mut moments, mut all) = (None::<Moments>, Vec::new());
    each_batch_of_images(data, &dataset, &places, BATCH, |images| {
        let features = settings.protocol.features(network, &images)?;
        Moments::add_to(&mut moments, &features)?;
        all.extend(settings.keep.then_some(features));
        Ok(())
    })?;
    let none = || failed(format_args!("`{data}` has no images"), "`vilg data inspect PATH` shows what it contains");
    let all = if all.is_empty() { None } else { Some(Tensor::cat(&all, 0)?) };
    Ok(Features { moments: moments.ok_or_else(none)?, all })
}
