//! The task `image-tokenizer`: pictures through encoder, quantiser and decoder (paper §2.1).

use super::{
    Measured, Task,
    engine::{self, Gradients},
    feed::Feed,
};
use crate::{
    bundle::{self, Parts},
    config::Config,
    data::{
        Kind, Record,
        image::{from_pixels, to_pixels},
        picture,
    },
    error::{Context, Result, ensure},
    nn::params::{Params, Scope},
    runtime,
    tokenizer::{ImageTokenizer, PixelBatch, Statistics},
};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// Pictures of a sample sheet, and how many stand side by side.
const SHEET: (usize, usize) = (16, 8);

/// The image tokenizer in training.
pub struct ImageTokenizerTask {
    config: Config,
    model: ImageTokenizer,
    params: Params,
    feed: Feed,
    /// The step at which each code was last chosen, for the restart of dead codes.
    last_used: Vec<u64>,
    /// What the parts of the current step left behind.
    statistics: Vec<Statistics>,
}

impl ImageTokenizerTask {
    /// A fresh tokenizer over the configuration's pictures.
    pub fn new(config: &Config) -> Result<Self> {
        let settings = &config.image_tokenizer;
        let kind = Kind::Pictures(u32::try_from(settings.image_size)?);
        let feed = Feed::new(config, kind, config.train.batch_size)?;
        let scope = Scope::from_seed(config.seed, DType::F32, &runtime::device());
        let model = ImageTokenizer::new(&scope, settings)?;
        let last_used = vec![0; settings.codebook_size];
        Ok(Self { config: config.clone(), model, params: scope.params(), feed, last_used, statistics: Vec::new() })
    }

    /// Losses of the whole step: the parts' means, weighed by their pictures.
    fn losses(&self) -> Vec<(&'static str, f64)> {
        let total: usize = self.statistics.iter().map(|s| s.codes.len()).sum();
        let mean = |f: &dyn Fn(&Statistics) -> f64| {
            self.statistics.iter().map(|s| f(s) * s.codes.len() as f64 / total as f64).sum::<f64>()
        };
        vec![
            ("l1", mean(&|s| s.l1)),
            ("l2", mean(&|s| s.l2)),
            ("codebook", mean(&|s| s.codebook)),
            ("commitment", mean(&|s| s.commitment)),
            ("psnr", mean(&Statistics::psnr)),
            ("perplexity", mean(&Statistics::perplexity)),
        ]
    }
}

impl Task for ImageTokenizerTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn identity(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    fn gradients(&mut self, step: u64, gradients: &mut Gradients) -> Result<Measured> {
        let records = self.feed.next(step)?;
        let segments = self.model.segments();
        self.statistics.clear();
        for part in records.chunks(records.len().div_ceil(self.config.train.accumulation)) {
            let batch = PixelBatch::new(pixels(part)?, part.len() as f64 / records.len() as f64);
            engine::accumulate(&segments, &batch, self.config.train.recompute, gradients)?;
            self.statistics.extend(batch.statistics.into_inner());
        }
        Ok(Measured { losses: self.losses(), amount: records.len(), unit: "images" })
    }

    fn after_step(&mut self, step: u64) -> Result<()> {
        let (config, quantizer) = (&self.config, self.model.quantizer());
        let codes: Vec<u32> = self.statistics.iter().flat_map(|s| s.codes.iter().copied()).collect();
        let latents: Vec<&Tensor> = self.statistics.iter().map(|s| &s.latents).collect();
        let latents = Tensor::cat(&latents, 0)?;
        let after = config.image_tokenizer.restart_after;
        quantizer.restart_dead_codes(&mut self.last_used, &latents, &codes, after, config.seed, step)?;
        Ok(())
    }

    fn state(&self) -> Value {
        json!({ "code_last_used": self.last_used })
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        let last_used: Vec<u64> = serde_json::from_value(state["code_last_used"].clone())?;
        ensure!(last_used.len() == self.last_used.len(), "code_last_used is of another codebook");
        self.last_used = last_used;
        Ok(())
    }

    /// Rows of originals, each above their reconstructions.
    fn sample(&self, weights: HashMap<String, Tensor>, path: &Path) -> Result<()> {
        let records = self.feed.fixed(SHEET.0);
        let scope = Scope::from_tensors(weights, DType::F32, &runtime::device());
        let model = ImageTokenizer::new(&scope, &self.config.image_tokenizer)?;
        let mut pictures = Vec::new();
        for row in records.chunks(SHEET.1) {
            let original = pixels(row)?;
            pictures.extend(from_pixels(&original)?);
            pictures.extend(from_pixels(&model.decode(&model.encode(&original)?)?)?);
        }
        picture::write_png(path, &picture::grid(&pictures, records.len().min(SHEET.1)))
    }

    fn publish(&self, weights: HashMap<String, Tensor>, folder: &Path) -> Result<()> {
        let attribution = bundle::attribution_of(&self.config.data.sources);
        let parts = Parts { config: &self.config, weights, vocab: None, attribution, image_tokenizer: None };
        bundle::write(folder, &parts, safetensors::Dtype::F32)
    }
}

fn pixels(records: &[Record]) -> Result<Tensor> {
    let pictures: Option<Vec<_>> = records.iter().map(|record| record.image.as_ref()).collect();
    Ok(to_pixels(pictures.context("a sample without a picture")?)?.to_device(&runtime::device())?)
}
