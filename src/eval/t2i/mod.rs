//! Text to image as the paper measures it (§4.2.1): images of captions chosen by a fixed seed, each the best of several
//! candidates, compared with real images by the FID and with their captions by a matcher.
//!
//! The captions are divided into chunks, and the ranks share the chunks. Each image is written once, under the number of
//! its caption, and the features of a chunk once all of its images are there. So an interrupted measurement goes on where
//! it was, and its result does not depend on interruptions or on the number of ranks.

mod images;
mod score;

pub use score::{Mean, Scores};

use super::{choose, features::Features, resume};
use crate::{
    data::output::Lock,
    dist::Group,
    error::{Result, ensure, failed},
    generate::{BestOf, Matching, Models, Sampling},
};
use images::Images;
use serde::{Deserialize, Serialize};
use std::path::Path;

const SETTINGS: &str = "t2i.json";

/// What decides the images and their features. A measurement only goes on with the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Digest of the chosen prompts in their order.
    pub prompts: String,
    /// Number of prompts.
    pub samples: usize,
    /// Seed of the choice of prompts and of the sampling.
    pub seed: u64,
    /// The generator, its image tokenizer and its precision.
    pub model: String,
    pub sampling: Sampling,
    /// Number of candidates of each image.
    pub best_of: usize,
    /// What ranks them.
    pub rank: String,
    /// Name of the compared features.
    pub features: String,
    /// Digest of the matcher that scores the images, and ranks the candidates if asked to.
    pub matcher: String,
}

/// A measurement.
pub struct Evaluation<'a> {
    pub settings: Settings,
    pub prompts: Vec<String>,
    pub models: &'a Models,
    pub best_of: BestOf<'a>,
    pub features: &'a Features,
    pub matching: &'a Matching,
}

/// `samples` of the prompts (0: all) in the order in which they are generated, and their digest.
pub fn choose_prompts(all: &[String], samples: usize, seed: u64) -> (Vec<String>, String) {
    let count = if samples == 0 { all.len() } else { samples };
    let chosen = choose(count, all.len(), seed, "eval prompts", 0);
    let chosen: Vec<String> = chosen.into_iter().filter_map(|i| all.get(i).cloned()).collect();
    let mut hasher = blake3::Hasher::new();
    for prompt in &chosen {
        hasher.update(&(prompt.len() as u64).to_le_bytes()).update(prompt.as_bytes());
    }
    let digest = hasher.finalize().to_hex().to_string();
    (chosen, digest)
}

impl Evaluation<'_> {
    /// Generates this rank's share of the images in `folder` and stores their features, then waits for the other ranks.
    /// `estimate` is called once, after the first images, with the seconds that the rest of this rank's share will take.
    ///
    /// # Errors
    /// The folder belongs to another measurement or cannot be written, or another process works on it as the same rank.
    pub fn generate(&self, folder: &Path, group: &Group, estimate: impl FnOnce(f64)) -> Result<()> {
        let hint = "give more prompts, or raise --samples";
        ensure!(self.prompts.len() > 1, failed("a distance needs the images of at least two prompts", hint));
        if group.leads() {
            resume::begin(folder, SETTINGS, &self.settings)?;
        }
        group.barrier()?;
        let _lock = Lock::take_for_rank(folder, group.rank())?;
        Images { evaluation: self, folder }.generate((group.rank(), group.world_size()), estimate)?;
        group.barrier()
    }

    /// Compares the images, which all ranks have generated, with the real ones at `real`, if they are given: images or
    /// statistics.
    ///
    /// # Errors
    /// Features are missing or damaged, or the real images cannot be read.
    pub fn score(&self, folder: &Path, real: Option<&str>) -> Result<Scores> {
        score::score(self, folder, real)
    }
}
