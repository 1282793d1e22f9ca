//! The task `generator`: both directions in every step, the summed loss (paper §2.2). The task `end-to-end` is the same
//! with a reconstructor. What is known of it without running it is in `generator_spec`.

use super::{
    Fingerprint, Publisher, Task, joint,
    objectives::{BatchMaker, EmptySteps, Seen},
    origins::{BASE, Base, IMAGE_TOKENIZER, fingerprint, open_image_tokenizer},
    reconstruction::{self, Discriminated},
    samples, vocabulary,
};
use crate::{
    bundle::{self, Bundle, Parts},
    config::{self, Config, Precision},
    data::{self, Kind},
    dist::Group,
    error::{Result, ensure, failed},
    model::{Batch, Generator, end_to_end::SCOPE},
    nn::{
        lora,
        params::{Fresh, Params, Scope},
        segment::Segment,
    },
    runtime,
    text::WordPiece,
    tokenizer::{self, ImageTokenizer, Statistics},
    train::{
        StepMetrics,
        data_loader::DataLoader,
        engine,
        shards::{Shards, names},
    },
};
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::{collections::HashMap, path::Path, time::Duration};

/// The generator in training.
pub struct GeneratorTask {
    /// With the image tokenizer's own settings filled in.
    config: Config,
    model: Generator,
    params: Params,
    /// What the parameters begin with, where they are random: in full precision.
    fresh: Option<Fresh>,
    text: WordPiece,
    image_tokenizer: Bundle,
    /// Encodes the images of samples, where these have no codes or where it is trained too.
    encoder: Option<ImageTokenizer>,
    data_loader: DataLoader,
    /// What low-rank adapters are trained for.
    base: Option<Base>,
    empty_steps: EmptySteps,
    /// Of the discriminator in end-to-end training.
    discriminated: Discriminated,
    /// What the current step saw of an image tokenizer that is trained too.
    seen_images: Option<Statistics>,
}

impl GeneratorTask {
    /// A fresh generator over the configuration's vocabulary, image tokenizer and code shards.
    ///
    /// # Errors
    /// One of the three is missing, or the codes are of another tokenizer.
    pub fn new(config: &Config, group: &Group) -> Result<Self> {
        // On the CPU products round f32 weights themselves, or not at all.
        let kept = if runtime::device()?.is_cpu() { Precision::F32 } else { config.train.precision };
        Self::kept_in(kept, config, group)
    }

    /// The same with weights of linear layers in `kept`, f32 or the precision of their products.
    pub fn kept_in(kept: Precision, config: &Config, group: &Group) -> Result<Self> {
        let (mut config, base) = (config.clone(), Base::of(config)?);
        let text = vocabulary::load(&config.text)?;
        let image_tokenizer = open_image_tokenizer(&config.image_tokenizer.path)?;
        config.image_tokenizer = image_tokenizer.config.image_tokenizer.clone().with_losses_of(&config.image_tokenizer);
        let kind = match config.task {
            config::Task::EndToEnd => reconstruction::sample_kind(&config, &config.image_tokenizer),
            _ => Kind::Codes,
        };
        let encodes = !kind.has_codes() && !joint::is_on(&config);
        let mut encoder = encodes.then(|| image_tokenizer.image_tokenizer()).transpose()?;
        let batches = config.train.generator_batches();
        let data_loader = DataLoader::new(&config, kind, &batches, group)?;
        let ours = match data_loader.dataset().codes() {
            Some(codes) => image_tokenizer.makes_codes_of(&codes.tokenizer)?,
            None => !kind.has_codes(),
        };
        let hint = "encode the images again with `vilg data encode`, or name the tokenizer that made the codes";
        ensure!(ours, failed("the codes in data.sources are not of the tokenizer in image_tokenizer.path", hint));

        let (device, seed) = (runtime::device()?, config.seed);
        // Every rank would hold the whole model for a moment.
        let scope = match super::spec(config.task).starts_empty(&config, group.world_size()) {
            true => Scope::empty_from_seed(seed, &device),
            false => Scope::from_seed(seed, DType::F32, &device),
        };
        let scope = scope.in_precision(kept);
        let model = build(Generator::in_training, &scope, &config, &text)?;
        // After the generator, whose segments take the parameters that are there.
        if joint::is_on(&config) {
            encoder = Some(joint::image_tokenizer(&scope, &config)?);
        }
        let (params, fresh) = (scope.params(), scope.fresh().filter(|_| config.train.init_from.is_empty()));
        if config.task.has_reconstructor() {
            reconstruction::check_images(&data_loader, kind)?;
            reconstruction::start(&config, &params, &image_tokenizer)?;
        }
        if let Some(trained) = encoder.as_ref().filter(|_| joint::is_on(&config)) {
            joint::start(trained, &config)?;
        }
        Ok(Self {
            model,
            params,
            fresh,
            text,
            image_tokenizer,
            encoder,
            data_loader,
            base,
            empty_steps: EmptySteps::default(),
            discriminated: Discriminated::default(),
            seen_images: None,
            config,
        })
    }

    /// The chain in training.
    fn segments(&self) -> Vec<Box<dyn Segment<Batch> + '_>> {
        joint::chain(&self.config, &self.model, self.encoder.as_ref())
    }

    /// The metrics of this rank's samples of step `step`, by objective, and what it saw of an image tokenizer that is trained
    /// too. With `activation_checkpointing` the gradients of `loss_scale` times the loss are added to those in `shards`.
    fn pass(
        &self,
        config: &Config,
        samples: &[(u64, Vec<data::Record>)],
        step: u64,
        loss_scale: f64,
        activation_checkpointing: Option<usize>,
        shards: &mut Shards,
    ) -> Result<(StepMetrics, Option<Statistics>)> {
        let training = activation_checkpointing.is_some();
        let logit_ema = self.discriminated.at(config, step).filter(|_| training);
        let (text, model, encoder) = (&self.text, &self.model, self.encoder.as_ref());
        let empty_steps = &self.empty_steps;
        let joint = joint::is_on(config);
        let trains_encoder = joint && training;
        let maker = BatchMaker { config, text, model, encoder, trains_encoder, loss_scale, empty_steps, logit_ema };
        let mut batches = Vec::new();
        if joint {
            // The images are encoded before the passes begin.
            shards.all_gather(joint::SEGMENT, None)?;
        }
        for (i, (first, records)) in samples.iter().enumerate() {
            let parts = maker.batches(i, *first, records, step, shards.group())?;
            batches.extend(parts.into_iter().map(|batch| (i, batch)));
        }
        if joint {
            shards.reshard(joint::SEGMENT)?;
        }
        let segments = self.segments();
        let (mut seen, mut images) = (Seen::default(), joint::Seen::default());
        for (i, (objective, batch)) in batches.iter().enumerate() {
            if i + 1 == batches.len() && training {
                shards.last_micro_batch();
            }
            let loss = match activation_checkpointing {
                Some(every) => engine::accumulate(&segments, batch, every, shards)?,
                None => engine::loss(&segments, batch, shards)?,
            };
            seen.add(*objective, batch, loss / loss_scale, maker.flops(batch)?);
            images.add(encoder, batch)?;
        }
        let mut metrics = seen.metrics(config, logit_ema.is_some(), shards.group())?;
        let images = trains_encoder.then(|| images.gather(config, shards.group())).transpose()?;
        if let Some(images) = &images {
            metrics.figures.extend([("tokenizer_psnr", images.psnr()), ("perplexity", images.perplexity())]);
        }
        Ok((metrics, images))
    }
}

/// Makes a generator: [`Generator::new`] or [`Generator::in_training`].
type Make = fn(&Scope, &Config, usize, usize, (usize, usize)) -> Result<Generator>;

fn build(make: Make, scope: &Scope, config: &Config, text: &WordPiece) -> Result<Generator> {
    let tokenizer = &config.image_tokenizer;
    make(scope, config, text.vocab_size(), tokenizer.codebook_size, tokenizer.grid())
}

impl Task for GeneratorTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn fresh(&self, name: &str) -> Result<Option<Vec<f32>>> {
        if reconstruction::is_started(&self.config, name) {
            return Ok(None);
        }
        self.fresh.as_ref().map(|fresh| fresh.values(name)).transpose()
    }

    /// A head gets none where no sequence has its modality as target; A of an adapter gets none as long as B is zero.
    fn gets_gradient(&self, name: &str) -> bool {
        let train = &self.config.train;
        let images = train.image_loss_weight > 0.0 && train.batch_size > 0;
        let captions = train.text_loss_weight > 0.0 && train.caption_batch_size > 0;
        let answers = train.answer_loss_weight > 0.0 && train.vqa_batch_size > 0;
        match name.split('.').next() {
            _ if lora::is_a(name) => false,
            Some(SCOPE) => images && reconstruction::gets_gradient(&self.config, name),
            Some("image_head" | "image_start") => images,
            Some("text_head" | joint::SCOPE) => captions || answers,
            _ => true,
        }
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        let mut all = fingerprint(&self.text, &self.image_tokenizer)?;
        all.extend(self.base.iter().map(|base| (BASE.into(), base.digest.clone())));
        Ok(all)
    }

    fn has_fingerprint(&self, name: &str, digest: &str) -> Result<bool> {
        if name == IMAGE_TOKENIZER {
            return self.image_tokenizer.makes_codes_of(digest);
        }
        Ok(self.fingerprint()?.get(name).is_some_and(|ours| ours == digest))
    }

    fn parameter_groups(&self) -> Vec<Vec<String>> {
        names(&self.segments())
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.next(step)?;
        let every = Some(self.config.train.activation_checkpointing);
        let (metrics, images) = self.pass(&self.config, &samples, step, loss_scale, every, shards)?;
        self.discriminated.see(&metrics.figures);
        self.seen_images = images;
        Ok(metrics)
    }

    fn loss_changes_at(&self, step: u64) -> bool {
        self.config.task.has_reconstructor() && self.config.image_tokenizer.loss_changes_at(step)
    }

    fn after_step(&mut self, _step: u64, shards: &mut Shards) -> Result<()> {
        self.discriminated.follow();
        match (&self.encoder, self.seen_images.take()) {
            (Some(trained), Some(seen)) => joint::follow(trained, &self.config.train, &seen, shards),
            _ => Ok(()),
        }
    }

    fn state(&self) -> Value {
        self.discriminated.state()
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        self.discriminated.restore(state);
        Ok(())
    }

    fn validate(&mut self, _step: u64, batch: u64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.validation(batch)?;
        let train = config::Train { condition_dropout: 0.0, ..self.config.train.clone() };
        Ok(self.pass(&Config { train, ..self.config.clone() }, &samples, batch, 1.0, None, shards)?.0)
    }

    fn data_wait(&self) -> Duration {
        self.data_loader.waited()
    }

    fn sources(&self) -> Vec<u64> {
        self.data_loader.dataset().sources.iter().map(data::Source::len).collect()
    }

    fn samples(&self) -> Vec<String> {
        self.data_loader.names().to_vec()
    }

    /// One image a prompt.
    fn sample(&self, mut weights: HashMap<String, Tensor>, path: &Path) -> Result<()> {
        lora::merge_all(&mut weights, self.config.lora.scale())?;
        let config = Config { lora: config::Lora::default(), ..self.config.clone() };
        let scope = Scope::from_tensors(weights, DType::F32, &runtime::device()?);
        let generator = build(Generator::new, &scope, &config, &self.text)?;
        samples::write(path, generator, &self.image_tokenizer, &self.text, &self.config)
    }

    fn output(&self) -> &'static str {
        if self.base.is_some() { bundle::ADAPTER } else { "model" }
    }

    fn publisher(&self) -> Publisher {
        let (config, vocab, base) = (self.config.clone(), self.text.vocab_text(), self.base.clone());
        let image_tokenizer = self.image_tokenizer.clone();
        Box::new(move |mut weights, folder| {
            weights.retain(|name, _| !tokenizer::is_of_training(name));
            let trained = joint::take_weights(&mut weights)?;
            let sources = bundle::attribution_of(&config.data.sources);
            if let Some(Base { name, digest }) = &base {
                return bundle::write_adapter(folder, &config.lora, [name, digest], weights, &sources);
            }
            let attribution = if sources.is_empty() { image_tokenizer.attribution() } else { sources };
            let parts = Parts {
                config: &config,
                weights,
                vocab: Some(vocab),
                attribution: attribution.clone(),
                image_tokenizer: Some(image_tokenizer.clone()),
            };
            if trained.is_empty() {
                return bundle::write(folder, &parts, safetensors::Dtype::F32);
            }
            let config = &image_tokenizer.image_tokenizer_folder()?.config;
            let tokenizer = Parts { config, weights: trained, vocab: None, attribution, image_tokenizer: None };
            bundle::write_with_tokenizer(folder, &parts, &tokenizer, safetensors::Dtype::F32)
        })
    }
}
