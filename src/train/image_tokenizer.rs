//! The task `image-tokenizer`: pictures through encoder, quantiser and decoder (paper §2.1).

use super::{
    Measured, Task, engine,
    feed::Feed,
    shards::{Shards, names},
};
use crate::{
    bundle::{self, Parts},
    config::Config,
    data::{
        Kind, Record,
        image::{from_pixels, to_pixels},
        picture,
    },
    dist::{self, Group},
    error::{Context, Result, ensure, usage},
    nn::{
        params::{Params, Scope},
        weights::Values,
    },
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
    /// What the current step saw.
    seen: Option<Statistics>,
}

impl ImageTokenizerTask {
    /// A fresh tokenizer over the configuration's pictures.
    pub fn new(config: &Config, group: &Group) -> Result<Self> {
        let settings = &config.image_tokenizer;
        let hint = "its codebook is restarted in place on every rank: set train.shard_stage to 2";
        let sharded = config.train.shard_stage == 3 && group.world_size() > 1;
        ensure!(!sharded, usage("train.shard_stage = 3 is not for image tokenizers", hint));
        let kind = Kind::Pictures(u32::try_from(settings.image_size)?);
        let feed = Feed::new(config, kind, &[config.train.batch_size], group)?;
        let scope = Scope::from_seed(config.seed, DType::F32, &runtime::device()?);
        let model = ImageTokenizer::new(&scope, settings)?;
        let last_used = vec![0; settings.codebook_size];
        Ok(Self { config: config.clone(), model, params: scope.params(), feed, last_used, seen: None })
    }
}

/// What the parts of a step saw, as if they had been one: their means weighed by their pictures.
fn merge(parts: Vec<(f64, Statistics)>) -> Result<Statistics> {
    let mean = |f: &dyn Fn(&Statistics) -> f64| parts.iter().map(|(share, part)| share * f(part)).sum();
    let (l1, l2) = (mean(&|s| s.l1), mean(&|s| s.l2));
    let (codebook, commitment) = (mean(&|s| s.codebook), mean(&|s| s.commitment));
    let latents: Vec<&Tensor> = parts.iter().map(|(_, part)| &part.latents).collect();
    let latents = Tensor::cat(&latents, 0)?;
    let codes = parts.iter().flat_map(|(_, part)| part.codes.iter().copied()).collect();
    Ok(Statistics { l1, l2, codebook, commitment, codes, latents })
}

/// What all ranks saw, from what each saw: its means are its share of the step's.
fn gather(group: &Group, ours: Statistics) -> Result<Statistics> {
    let means = group.sum(&[ours.l1, ours.l2, ours.codebook, ours.commitment])?;
    let codes = group.gather(ours.codes)?.iter().flat_map(|codes| codes.iter().copied()).collect();
    let (_, height, width, dim) = ours.latents.dims4()?;
    let latents: Vec<f32> =
        group.gather(ours.latents.flatten_all()?.to_vec1()?)?.iter().flat_map(|part| part.iter().copied()).collect();
    let latents = Tensor::from_vec(latents, ((), height, width, dim), ours.latents.device())?;
    Ok(Statistics { l1: means[0], l2: means[1], codebook: means[2], commitment: means[3], codes, latents })
}

impl Task for ImageTokenizerTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn identity(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    fn units(&self) -> Vec<Vec<String>> {
        names(&self.model.segments())
    }

    fn gradients(&mut self, step: u64, _loss_scale: f64, shards: &mut Shards) -> Result<Measured> {
        let records = self.feed.next(step)?.swap_remove(0).1;
        let segments = self.model.segments();
        let (settings, mut seen) = (&self.config.train, Vec::new());
        let parts = settings.accumulation.min(records.len());
        for i in 0..parts {
            let part = &records[dist::part(records.len(), i, parts)];
            let share = part.len() as f64 / settings.batch_size as f64;
            let batch = PixelBatch::new(pixels(part)?, share);
            if i + 1 == parts {
                shards.last_micro_batch();
            }
            engine::accumulate(&segments, &batch, settings.recompute, shards)?;
            seen.push((share, batch.statistics.into_inner().context("the tokenizer left no statistics")?));
        }
        let seen = gather(shards.group(), merge(seen)?)?;
        let losses = vec![
            ("l1", seen.l1),
            ("l2", seen.l2),
            ("codebook", seen.codebook),
            ("commitment", seen.commitment),
            ("psnr", seen.psnr()),
            ("perplexity", seen.perplexity()),
        ];
        self.seen = Some(seen);
        Ok(Measured { losses, amount: settings.batch_size, unit: "images" })
    }

    fn samples(&self) -> Vec<String> {
        self.feed.names().to_vec()
    }

    fn after_step(&mut self, step: u64) -> Result<()> {
        let Some(seen) = self.seen.take() else { return Ok(()) };
        let (after, seed) = (self.config.image_tokenizer.restart_after, self.config.seed);
        let quantizer = self.model.quantizer();
        quantizer.restart_dead_codes(&mut self.last_used, &seen.latents, &seen.codes, after, seed, step)?;
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
        let scope = Scope::from_tensors(weights, DType::F32, &runtime::device()?);
        let model = ImageTokenizer::new(&scope, &self.config.image_tokenizer)?;
        let mut pictures = Vec::new();
        for row in records.chunks(SHEET.1) {
            let original = pixels(row)?;
            pictures.extend(from_pixels(&original)?);
            pictures.extend(from_pixels(&model.decode(&model.encode(&original)?)?)?);
        }
        picture::write_png(path, &picture::grid(&pictures, records.len().min(SHEET.1)))
    }

    fn publish(&self, weights: BTreeMap<String, Values>, folder: &Path) -> Result<()> {
        let attribution = bundle::attribution_of(&self.config.data.sources);
        let parts = Parts { config: &self.config, weights, vocab: None, attribution, image_tokenizer: None };
        bundle::write(folder, &parts, safetensors::Dtype::F32)
    }
}

fn pixels(records: &[Record]) -> Result<Tensor> {
    let pictures: Option<Vec<_>> = records.iter().map(|record| record.image.as_ref()).collect();
    Ok(to_pixels(pictures.context("a sample without a picture")?)?.to_device(&runtime::device()?)?)
}
