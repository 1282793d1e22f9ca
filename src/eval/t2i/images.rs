//! Generates the images of a measurement and stores their features.

use super::Evaluation;
use crate::{
    data::{
        image::open_image,
        image_file::png,
        output::{remove_leftovers, write_whole},
    },
    error::{Context, Result},
    eval::resume,
    generate::{GeneratedImage, Matching, Request},
    report,
};
use candle_core::{DType, Tensor};
use image::RgbImage;
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

/// Prompts of a chunk.
pub(super) const CHUNK: usize = 64;
/// Candidates that are generated before their images are written.
const CANDIDATES: usize = 64;

const FEATURES: &str = "features";
const COSINES: &str = "cosines";

/// Images of an evaluation, in its folder.
pub(super) struct Images<'a> {
    pub evaluation: &'a Evaluation<'a>,
    pub folder: &'a Path,
}

impl Images<'_> {
    /// Generates the images of this rank's chunks and stores their features; finished ones are kept. `estimate` is called
    /// once, after the first images, with the seconds that the rest will take.
    ///
    /// # Errors
    /// A file cannot be written, or the weights are damaged.
    pub fn generate(&self, (rank, world_size): (usize, usize), estimate: impl FnOnce(f64)) -> Result<()> {
        let unfinished = (rank..self.chunks()).step_by(world_size).filter(|&chunk| !self.features_file(chunk).exists());
        let unfinished: Vec<(usize, Vec<usize>)> = unfinished.map(|chunk| (chunk, self.missing(chunk))).collect();
        for folder in ["images", "features"].map(|name| self.folder.join(name)) {
            fs::create_dir_all(&folder).with_context(|| format!("cannot write to {}", folder.display()))?;
        }
        let mut left: usize = unfinished.iter().map(|(_, missing)| missing.len()).sum();
        let bar = report::bar(left as u64, "generating images");
        let mut estimate = Some(estimate);
        for (chunk, missing) in unfinished {
            self.begin(chunk)?;
            for prompts in missing.chunks((CANDIDATES / self.evaluation.best_of.count.max(1)).max(1)) {
                let begun = Instant::now();
                self.write(prompts)?;
                left -= prompts.len();
                bar.inc(prompts.len() as u64);
                if let Some(estimate) = estimate.take().filter(|_| left > 0) {
                    estimate(begun.elapsed().as_secs_f64() / prompts.len() as f64 * left as f64);
                }
            }
            self.store_features(chunk)?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.evaluation.prompts.len().div_ceil(CHUNK)
    }

    /// Stored features `(images, dim)` and cosines `(images)` of a chunk.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn features(&self, chunk: usize) -> Result<[Tensor; 2]> {
        let mut stored = resume::read_part(&self.features_file(chunk), &[FEATURES, COSINES])?;
        let mut take = |name: &str| -> Result<Tensor> {
            Ok(stored.remove(name).context("a tensor was read twice")?.to_dtype(DType::F32)?)
        };
        Ok([take(FEATURES)?, take(COSINES)?])
    }

    /// The prompts of a chunk, by number.
    fn prompts(&self, chunk: usize) -> std::ops::Range<usize> {
        chunk * CHUNK..((chunk + 1) * CHUNK).min(self.evaluation.prompts.len())
    }

    fn missing(&self, chunk: usize) -> Vec<usize> {
        self.prompts(chunk).filter(|&prompt| !self.image_file(prompt, "png").exists()).collect()
    }

    fn image_file(&self, prompt: usize, extension: &str) -> PathBuf {
        self.folder.join(format!("images/{:05}/{prompt:06}.{extension}", prompt / CHUNK))
    }

    fn features_file(&self, chunk: usize) -> PathBuf {
        self.folder.join(format!("features/{chunk:05}.safetensors"))
    }

    /// Makes the folder of a chunk, without what a killed process left there.
    fn begin(&self, chunk: usize) -> Result<()> {
        let folder = self.folder.join(format!("images/{chunk:05}"));
        if folder.exists() {
            for prompt in self.prompts(chunk) {
                ["json", "png"].iter().for_each(|extension| remove_leftovers(&self.image_file(prompt, extension)));
            }
            remove_leftovers(&self.features_file(chunk));
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot write to {}", folder.display()))
    }

    /// Generates the images of some prompts and writes them.
    fn write(&self, prompts: &[usize]) -> Result<()> {
        let Evaluation { settings, models, best_of, .. } = self.evaluation;
        let request = |&prompt: &usize| {
            Request::new(self.evaluation.prompts[prompt].as_str(), settings.seed.wrapping_add(prompt as u64))
        };
        let requests: Vec<Request> = prompts.iter().map(request).collect();
        let generated = models.generate_images(&requests, &settings.sampling, best_of, |_| {})?;
        for ((&prompt, request), generated) in prompts.iter().zip(&requests).zip(&generated) {
            let GeneratedImage { image, candidate, scores, .. } = generated;
            let sample = json!({ "caption": request.prompt, "seed": request.seed, "candidate": candidate,
                "scores": scores.get(*candidate) });
            // The image last: it says that the sample is complete.
            self.write_file(&self.image_file(prompt, "json"), &serde_json::to_vec(&sample)?)?;
            self.write_file(&self.image_file(prompt, "png"), &png(image)?)?;
        }
        Ok(())
    }

    fn write_file(&self, file: &Path, bytes: &[u8]) -> Result<()> {
        write_whole(file, |out| Ok(out.write_all(bytes).map(|()| true)?))
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// Stores the features of a chunk's images, as they were written, and their cosines with their prompts.
    fn store_features(&self, chunk: usize) -> Result<()> {
        let Evaluation { prompts, features, matching, .. } = self.evaluation;
        let images = self.prompts(chunk).map(|prompt| open_image(&self.image_file(prompt, "png")));
        let images: Vec<RgbImage> = images.collect::<Result<_>>()?;
        let texts: Vec<&str> = self.prompts(chunk).map(|prompt| prompts[prompt].as_str()).collect();
        let [image_embeddings, text_embeddings] = [matching.embed_images(&images)?, matching.embed_texts(&texts)?];
        let tensors = [
            (FEATURES, features.of(&images)?),
            (COSINES, Matching::pair_cosines(&image_embeddings, &text_embeddings)?),
        ];
        resume::write_part(&self.features_file(chunk), &tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into())
    }
}
