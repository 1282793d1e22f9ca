//! What is known of the task `generator` without running it; [`GeneratorTask`] runs it.

use super::{
    FileKind, Fingerprint, InputFile, Sequences, Task, TaskSpec,
    generator::GeneratorTask,
    joint,
    origins::{BASE, fingerprint},
    reconstruction,
};
use crate::{
    bundle::Bundle,
    config::{self, AttentionKind, Config, Train},
    data::Kind,
    dist::Group,
    error::{Result, ensure, usage},
    model::{Generator, Layout},
    nn::{
        lora,
        params::{Params, Scope},
        pattern::Grid,
    },
    train::inputs::Inputs,
};
use candle_core::Device;

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
        let tokenizer = joint::is_on(&config).then(|| joint::image_tokenizer(&scope, &config)).transpose()?;
        let chain = joint::chain(&config, &model, tokenizer.as_ref());
        Ok(chain.iter().map(|segment| segment.params().clone()).collect())
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
            ("image tokenizer", &["image_tokenizer."]),
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
