//! The task `generator`: both directions in every step, the summed loss (paper §2.2). The task `end-to-end` is the same
//! with a reconstructor.

use super::{
    FileKind, Fingerprint, InputFile, Sequences, Task, TaskSpec,
    objectives::{BatchMaker, EmptySteps, Seen},
    origins::{BASE, Base, IMAGE_TOKENIZER, fingerprint, open_image_tokenizer},
    reconstruction::{self, Discriminated},
    samples, vocabulary,
};
use crate::{
    bundle::{self, Bundle, Parts},
    config::{self, AttentionKind, Config, Precision, Train},
    data::{self, Kind},
    dist::Group,
    error::{Result, ensure, failed, usage},
    model::{Generator, Layout, end_to_end::SCOPE},
    nn::{
        lora,
        params::{Fresh, Params, Scope},
        pattern::Grid,
        weights::Values,
    },
    runtime,
    text::WordPiece,
    tokenizer::{self, ImageTokenizer},
    train::{
        StepMetrics,
        data_loader::DataLoader,
        engine,
        inputs::Inputs,
        shards::{Shards, names},
    },
};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::Duration,
};

/// Text → image and image → text.
#[derive(Debug)]
pub struct Spec;

impl TaskSpec for Spec {
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(GeneratorTask::new(config, group)?))
    }

    /// Where the weights are random and sharded, a rank need not hold them all at any time.
    fn starts_empty(&self, config: &Config, world_size: usize) -> bool {
        let train = &config.train;
        let sharded = world_size > 1 && train.hsdp_shard_size != 1 && train.zero_stage == 3;
        sharded && train.init_from.is_empty()
    }

    fn sample_kind(&self, _config: &Config, _inputs: &Inputs) -> Kind {
        Kind::Codes
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        let keys = ["train.batch_size", "train.caption_batch_size", "train.vqa_batch_size"];
        keys.into_iter().zip(train.generator_batches()).collect()
    }

    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>> {
        let (codes, grid) = (inputs.tokenizer.codebook_size, inputs.tokenizer.grid());
        let scope = Scope::empty_from_seed(config.seed, &Device::Cpu);
        let config = reconstruction::of_sizes(config, &inputs.tokenizer);
        let model = Generator::in_training(&scope, &config, inputs.vocabulary, codes, grid)?;
        Ok(model.segments().iter().map(|segment| segment.params().clone()).collect())
    }

    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        &[
            ("text embedding", &["text_embedding."]),
            ("text positions", &["text_position."]),
            ("image embedding", &["image_embedding."]),
            ("image positions", &["image_row.", "image_column.", "image_start"]),
            ("blocks", &["blocks."]),
            ("final norm", &["norm."]),
            ("text head", &["text_head."]),
            ("image head", &["image_head."]),
            ("map to code vectors", &["end_to_end.map."]),
            ("reconstructor", &["end_to_end.reconstructor."]),
        ]
    }

    fn sequences(&self, config: &Config, inputs: &Inputs) -> Vec<Sequences> {
        let (height, width) = inputs.tokenizer.grid();
        let (train, grid, text) = (&config.train, Grid { height, width }, config.text.max_tokens);
        let mut all = vec![
            Sequences {
                name: "text to image",
                layout: Layout::text_to_image(text, grid),
                outputs: inputs.tokenizer.codebook_size,
                batch_size: train.batch_size,
                weight: train.image_loss_weight,
            },
            Sequences {
                name: "image to text",
                layout: Layout::image_to_text(grid, text),
                outputs: inputs.vocabulary,
                batch_size: train.caption_batch_size,
                weight: train.text_loss_weight,
            },
        ];
        all.extend((train.vqa_batch_size > 0).then(|| Sequences {
            name: "image and question to answer",
            layout: Layout::visual_question(grid, text, text),
            outputs: inputs.vocabulary,
            batch_size: train.vqa_batch_size,
            weight: train.answer_loss_weight,
        }));
        all
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        let file = |key, path, kind| InputFile { key, path, kind, required: true };
        vec![
            file("text.vocab", &config.text.vocab, FileKind::File),
            file("image_tokenizer.path", &config.image_tokenizer.path, FileKind::Model),
        ]
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.expect(config::Task::Generator)?;
        let what = "an end-to-end generator has a reconstructor, which has no place here";
        let two_stage = !model.config.task.has_reconstructor();
        ensure!(two_stage, usage(what, "drop it with `vilg export --two-stage`, or set task = \"end-to-end\""));
        Ok(model)
    }

    fn fingerprint_of(&self, config: &Config, model: &Bundle) -> Result<Fingerprint> {
        let mut all = fingerprint(&model.text()?, model)?;
        if config.lora.is_on() {
            all.insert(BASE.into(), model.base_digest()?);
        }
        Ok(all)
    }

    /// Adapters, of which a model folder has none.
    fn starts_anew(&self, name: &str, _model: &Bundle) -> bool {
        lora::is_adapter(name)
    }

    fn meaning_keys(&self, config: &Config) -> &'static [&'static str] {
        match config.model.attention {
            AttentionKind::Sparse => {
                &["model.heads", "model.attention", "model.row_extent", "model.conv_border", "model.conv_size"]
            }
            AttentionKind::Dense => &["model.heads", "model.attention"],
        }
    }
}

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
    /// Encodes the images of samples without codes.
    encoder: Option<ImageTokenizer>,
    data_loader: DataLoader,
    /// What low-rank adapters are trained for.
    base: Option<Base>,
    empty_steps: EmptySteps,
    /// Of the discriminator in end-to-end training.
    discriminated: Discriminated,
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
        let encoder = if kind.has_codes() { None } else { Some(image_tokenizer.image_tokenizer()?) };
        let batches = config.train.generator_batches();
        let data_loader = DataLoader::new(&config, kind, &batches, group)?;
        let ours = match data_loader.dataset().codes() {
            Some(codes) => image_tokenizer.makes_codes_of(&codes.tokenizer)?,
            None => encoder.is_some(),
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
        let (params, fresh) = (scope.params(), scope.fresh().filter(|_| config.train.init_from.is_empty()));
        if config.task.has_reconstructor() {
            reconstruction::check_images(&data_loader, kind)?;
            reconstruction::start_reconstructor(&config, &params, &image_tokenizer)?;
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
            config,
        })
    }

    /// The metrics of this rank's samples of step `step`, by objective. With `activation_checkpointing` the gradients of
    /// `loss_scale` times the loss are added to those in `shards`.
    fn pass(
        &self,
        config: &Config,
        samples: &[(u64, Vec<data::Record>)],
        step: u64,
        loss_scale: f64,
        activation_checkpointing: Option<usize>,
        shards: &mut Shards,
    ) -> Result<StepMetrics> {
        let training = activation_checkpointing.is_some();
        let logit_ema = self.discriminated.at(config, step).filter(|_| training);
        let (text, model, encoder) = (&self.text, &self.model, self.encoder.as_ref());
        let empty_steps = &self.empty_steps;
        let maker = BatchMaker { config, text, model, encoder, loss_scale, empty_steps, logit_ema };
        let mut batches = Vec::new();
        for (i, (first, records)) in samples.iter().enumerate() {
            let parts = maker.batches(i, *first, records, step, shards.group())?;
            batches.extend(parts.into_iter().map(|batch| (i, batch)));
        }
        let segments = self.model.segments();
        let mut seen = Seen::default();
        for (i, (objective, batch)) in batches.iter().enumerate() {
            if i + 1 == batches.len() && training {
                shards.last_micro_batch();
            }
            let loss = match activation_checkpointing {
                Some(every) => engine::accumulate(&segments, batch, every, shards)?,
                None => engine::loss(&segments, batch, shards)?,
            };
            seen.add(*objective, batch, loss / loss_scale, maker.flops(batch)?);
        }
        seen.metrics(config, logit_ema.is_some(), shards.group())
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
        if reconstruction::starts_from_tokenizer(&self.config, name) {
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
            Some("text_head") => captions || answers,
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
        names(&self.model.segments())
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.next(step)?;
        let every = Some(self.config.train.activation_checkpointing);
        let metrics = self.pass(&self.config, &samples, step, loss_scale, every, shards)?;
        self.discriminated.see(&metrics.figures);
        Ok(metrics)
    }

    fn loss_changes_at(&self, step: u64) -> bool {
        self.config.task.has_reconstructor() && self.config.image_tokenizer.loss_changes_at(step)
    }

    fn after_step(&mut self, _step: u64, _shards: &mut Shards) -> Result<()> {
        self.discriminated.follow();
        Ok(())
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
        self.pass(&Config { train, ..self.config.clone() }, &samples, batch, 1.0, None, shards)
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

    fn publish(&self, mut weights: BTreeMap<String, Values>, folder: &Path) -> Result<()> {
        weights.retain(|name, _| !tokenizer::is_of_training(name));
        let sources = bundle::attribution_of(&self.config.data.sources);
        if let Some(Base { name, digest }) = &self.base {
            return bundle::write_adapter(folder, &self.config.lora, [name, digest], weights, &sources);
        }
        let attribution = if sources.is_empty() { self.image_tokenizer.attribution() } else { sources };
        let parts = Parts {
            config: &self.config,
            weights,
            vocab: Some(self.text.vocab_text()),
            attribution,
            image_tokenizer: Some(self.image_tokenizer.clone()),
        };
        bundle::write(folder, &parts, safetensors::Dtype::F32)
    }
}
