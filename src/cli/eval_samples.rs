//! Options shared by the commands that measure a generator on samples.

use super::model::ModelOptions;

/// The captions to generate images from, and the images to search among.
#[derive(clap::Args)]
pub struct RetrievalOptions {
    #[command(flatten)]
    pub common: SampleOptions,
    /// Further images to search among, for styles with too few images in the data; same forms as --data
    #[arg(long, value_name = "SRC")]
    pub pool: Option<String>,
    /// Number of images to search among, the real image included
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub candidates: u32,
}

/// The samples to measure, and the model.
#[derive(clap::Args)]
pub struct SampleOptions {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of image-caption pairs
    #[arg(long, value_name = "SRC")]
    pub data: String,
    /// Number of samples to measure, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400, allow_negative_numbers = true)]
    pub samples: usize,
    /// Random seed of the choice of samples and of the sampling
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,
    #[command(flatten)]
    pub model: ModelOptions,
}
