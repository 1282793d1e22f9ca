//! What a generator learns from in a step: sequences of both directions (paper §2.2) and, in end-to-end training, the images
//! that they are made of.

use super::{joint, pixels::pixels};
use crate::{
    config::{Config, LossReduction, Train},
    data::{self, Question, questions},
    dist::{self, Group},
    error::{Context, Result, ensure, failed},
    model::{Batch, Generator, Modality, Tokens, flops},
    random::Random,
    runtime,
    text::WordPiece,
    tokenizer::{ADVERSARIAL_TERMS, ImageTokenizer, PixelBatch, RECONSTRUCTION, discriminator::LogitEma, psnr},
    train::StepMetrics,
};
use candle_core::Tensor;
use std::{cell::Cell, rc::Rc};

/// Sequences that a step learns from, with a loss of their own.
pub struct Objective {
    /// Of the loss in the metrics.
    name: &'static str,
    weight: fn(&Train) -> f64,
    sequence: Sequence,
}

/// What a sequence is made of.
#[derive(Clone, Copy)]
enum Sequence {
    /// Text → image. Captions are dropped with `condition_dropout`.
    Image,
    /// Image → text.
    Caption,
    /// Image and question → answer.
    Answer,
}

/// In the order of the batch sizes that the loader is given.
pub const OBJECTIVES: [Objective; 3] = [
    Objective { name: "image", weight: |train| train.image_loss_weight, sequence: Sequence::Image },
    Objective { name: "text", weight: |train| train.text_loss_weight, sequence: Sequence::Caption },
    Objective { name: "answer", weight: |train| train.answer_loss_weight, sequence: Sequence::Answer },
];

/// Makes micro-batches of samples.
pub struct BatchMaker<'a> {
    pub config: &'a Config,
    pub text: &'a WordPiece,
    pub model: &'a Generator,
    /// Encodes the images of samples, where these have no codes or where it is trained too.
    pub encoder: Option<&'a ImageTokenizer>,
    /// Whether the sequences of image → text train the encoder.
    pub trains_encoder: bool,
    pub loss_scale: f64,
    pub empty_steps: &'a EmptySteps,
    /// Statistics of the discriminator, if it is trained in this step.
    pub logit_ema: Option<LogitEma>,
}

/// Steps in a row that had nothing to predict, by objective.
pub type EmptySteps = [Cell<u32>; OBJECTIVES.len()];

/// After this many steps in a row without a text to predict, the data most likely has none.
const MAX_EMPTY_STEPS: u32 = 100;

impl BatchMaker<'_> {
    /// The micro-batches of one objective, whose samples start at position `first` of the step; the losses of all ranks add
    /// up to `weight` · mean over all target tokens, or over all sequences (`train.loss_reduction`), plus, for images that
    /// are trained end to end, `end_to_end.reconstruction_weight` · mean over all images.
    pub fn batches(
        &self,
        objective: usize,
        first: u64,
        records: &[data::Record],
        step: u64,
        group: &Group,
    ) -> Result<Vec<Batch>> {
        let settings = &self.config.train;
        let empty_steps = &self.empty_steps[objective];
        let objective = &OBJECTIVES[objective];
        let weight = (objective.weight)(settings);
        if records.is_empty() || weight == 0.0 {
            return Ok(Vec::new());
        }
        let parts = settings.accumulation.min(records.len());
        let mut batches = Vec::with_capacity(parts);
        for range in (0..parts).map(|i| dist::part(records.len(), i, parts)) {
            batches.push(self.batch(objective, first + range.start as u64, &records[range], step)?);
        }
        let targets: usize = batches.iter().map(Batch::targets).sum();
        let sums = group.sum(&[targets as f64, records.len() as f64])?;
        let count = match settings.loss_reduction {
            LossReduction::Mean => sums[0],
            LossReduction::Sum => sums[1],
        };
        let empty = if sums[0] == 0.0 { empty_steps.get() + 1 } else { 0 };
        empty_steps.set(empty);
        let hint = "the field `questions` of a sample's JSON lists them (docs/data.md)";
        let what = format_args!("no sample of {empty} steps has a text to predict for the loss `{}`", objective.name);
        ensure!(empty < MAX_EMPTY_STEPS, failed(what, hint));
        batches.iter_mut().for_each(|batch| batch.loss_scale = weight / count.max(1.0) * self.loss_scale);
        Ok(batches)
    }

    /// FLOPs of a micro-batch, forward and backward; its longest text decides how many positions it has.
    pub fn flops(&self, batch: &Batch) -> Result<f64> {
        let (tokenizer, samples) = (&self.config.image_tokenizer, batch.samples());
        let outputs = match batch.target().0.modality {
            Modality::Image => tokenizer.codebook_size,
            Modality::Text => self.text.vocab_size(),
        };
        let sequence = flops::training(self.config, &batch.layout(self.model.grid())?, outputs);
        let images = batch.pixels.as_ref().map_or(0.0, |_| flops::reconstructor(tokenizer, samples));
        let sources = batch.source_pixels.as_ref().map_or(0.0, |_| flops::tokenizer(tokenizer, samples));
        Ok(samples as f64 * sequence + images + sources)
    }

    fn batch(&self, objective: &Objective, first: u64, records: &[data::Record], step: u64) -> Result<Batch> {
        let of_text = !matches!(objective.sequence, Sequence::Image);
        let trained = self.encoder.filter(|_| self.trains_encoder && of_text);
        let sources =
            trained.map(|_| joint::batch(self.config, records, (step, first), self.loss_scale)).transpose()?;
        let codes = match trained.zip(sources.as_ref()) {
            Some((encoder, sources)) => encoder.draw(&sources.pixels, sources.relaxation)?,
            None => self.codes(records)?,
        };
        let mut batch = match objective.sequence {
            Sequence::Image => self.image_batch(codes, first, records, step),
            Sequence::Caption => Batch::image_to_text(codes, self.targets(records.iter().map(|r| r.caption.as_str()))?),
            Sequence::Answer => self.answer_batch(codes, first, records, step),
        }?;
        batch.source_pixels = sources.map(Rc::new);
        batch.tokenizer_gradient = self.config.end_to_end.tokenizer_gradient(step);
        Ok(batch)
    }

    fn image_batch(&self, codes: Tensor, first: u64, records: &[data::Record], step: u64) -> Result<Batch> {
        let captions = records.iter().zip(first..).map(|(record, index)| {
            let mut random = Random::keyed(self.config.seed, "condition dropout", step, index);
            let dropped = random.unit() < self.config.train.condition_dropout;
            if dropped { "" } else { record.caption.as_str() }
        });
        let batch = Batch::text_to_image(self.sources(captions)?, codes)?;
        let weight = self.config.end_to_end.reconstruction_weight;
        let Some(end_to_end) = self.model.end_to_end().filter(|_| weight > 0.0) else { return Ok(batch) };
        let share = weight * records.len() as f64 / self.config.train.batch_size as f64;
        let pixels = PixelBatch::new(pixels(records)?, share);
        let pixels = PixelBatch { loss_scale: self.loss_scale, step, logit_ema: self.logit_ema, ..pixels };
        let mut batch = end_to_end.arrange(batch);
        batch.generator_gradient = self.config.end_to_end.generator_gradient(step);
        batch.pixels = Some(Rc::new(pixels));
        Ok(batch)
    }

    /// One question of each sample, chosen at random for this visit. A sample without questions predicts nothing.
    fn answer_batch(&self, codes: Tensor, first: u64, records: &[data::Record], step: u64) -> Result<Batch> {
        let chosen: Vec<Question> = records
            .iter()
            .zip(first..)
            .map(|(record, index)| {
                let mut all = questions(&record.meta);
                let mut random = Random::keyed(self.config.seed, "question", step, index);
                if all.is_empty() {
                    Question::default()
                } else {
                    all.swap_remove(random.below(all.len() as u64) as usize)
                }
            })
            .collect();
        let asked = self.sources(chosen.iter().map(|question| question.question.as_str()))?;
        let answers = self.targets(chosen.iter().map(|question| question.answer.as_str()))?;
        Batch::visual_question(codes, asked, answers)
    }

    /// Source texts, padded to the longest: positions that no row needs would only cost time.
    fn sources<'t>(&self, texts: impl Iterator<Item = &'t str>) -> Result<Tokens> {
        Tokens::of_texts(self.text, texts, self.config.text.max_tokens, &runtime::device()?)
    }

    /// Target texts, padded to the longest. The end of a cut text is not a target, and an empty text predicts nothing.
    fn targets<'t>(&self, texts: impl Iterator<Item = &'t str>) -> Result<Tokens> {
        let encode = |text: &str| match text.is_empty() {
            true => Ok(vec![self.text.cls()]),
            false => self.text.encode_target(text, self.config.text.max_tokens),
        };
        let rows = texts.map(encode).collect::<Result<Vec<_>>>()?;
        // A target predicts at least one token.
        let width = rows.iter().map(Vec::len).max().unwrap_or(0).max(2);
        Tokens::pad(&rows, width, self.text.pad(), &runtime::device()?)
    }

    /// Codes in raster order (samples, n) u32: those of the samples, or of their images.
    fn codes(&self, records: &[data::Record]) -> Result<Tensor> {
        if let Some(encoder) = self.encoder {
            return encoder.encode(&pixels(records)?);
        }
        let mut codes = Vec::new();
        for record in records {
            codes
                .extend(record.codes.as_deref().context("a sample without codes")?.iter().map(|&code| u32::from(code)));
        }
        Ok(Tensor::from_vec(codes, (records.len(), self.model.grid().len()), &runtime::device()?)?)
    }
}

/// What this rank's micro-batches saw.
#[derive(Default)]
pub struct Seen {
    /// Loss and number of target tokens of each objective.
    tokens: [[f64; 2]; OBJECTIVES.len()],
    /// Reconstruction loss and squared error, both as shares of the step's mean.
    images: [f64; 2],
    /// Model FLOPs.
    flops: f64,
    /// Terms of the GAN loss, as shares of the step's mean.
    adversarial: [f64; ADVERSARIAL_TERMS.len()],
}

impl Seen {
    /// Adds a micro-batch of an objective with its loss, which is not scaled, and its FLOPs.
    pub fn add(&mut self, objective: usize, batch: &Batch, mut loss: f64, flops: f64) {
        self.flops += flops;
        if let Some(pixels) = &batch.pixels
            && let Some(statistics) = pixels.statistics.take()
        {
            let [reconstruction, squares] = [RECONSTRUCTION, "l2"].map(|name| pixels.share * statistics.term(name));
            self.images[0] += reconstruction;
            self.images[1] += squares;
            for (sum, name) in self.adversarial.iter_mut().zip(ADVERSARIAL_TERMS) {
                *sum += pixels.share * statistics.term(name);
            }
            loss -= reconstruction;
        }
        self.tokens[objective][0] += loss;
        self.tokens[objective][1] += batch.targets() as f64;
    }

    /// The metrics of a step, of all ranks. `adversarial`: it had a GAN loss.
    pub fn metrics(self, config: &Config, adversarial: bool, group: &Group) -> Result<StepMetrics> {
        let others = group.sum(&[self.images[0], self.images[1], self.flops])?;
        let (images, flops) = (&others[..2], others[2]);
        let mut metrics = StepMetrics { losses: Vec::new(), figures: Vec::new(), amount: 0, unit: "tokens", flops };
        for (objective, seen) in OBJECTIVES.iter().zip(group.sum(self.tokens.as_flattened())?.chunks(2)) {
            if seen[1] > 0.0 {
                metrics.losses.push((objective.name, seen[0] / (objective.weight)(&config.train)));
                metrics.amount += seen[1] as usize;
            }
        }
        if images[1] > 0.0 {
            let [reconstruction, squares] = [0, 1].map(|i| images[i] / config.end_to_end.reconstruction_weight);
            metrics.losses.push((RECONSTRUCTION, reconstruction));
            metrics.figures.push(("psnr", psnr(squares)));
            if adversarial {
                let means = group.sum(&self.adversarial)?;
                let means = means.iter().map(|sum| sum / config.end_to_end.reconstruction_weight);
                metrics.figures.extend(ADVERSARIAL_TERMS.into_iter().zip(means));
            }
        }
        Ok(metrics)
    }
}
