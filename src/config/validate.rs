//! Checks the values of a configuration, alone and together.

use super::{
    Architecture, Config, Data, ImageTokenizer, Model, QuantizerKind, Text, Train,
    check::{Check, Problem},
    flat::values,
    validate_matcher::matcher,
};
use crate::error::{Result, usage};

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    /// The first problem, as a usage error.
    pub fn validate(&self) -> Result<()> {
        match self.problems()?.into_iter().next() {
            Some(problem) => Err(usage(problem.message, problem.hint)),
            None => Ok(()),
        }
    }

    /// All invalid values.
    ///
    /// # Errors
    /// A number does not fit into TOML.
    pub fn problems(&self) -> Result<Vec<Problem>> {
        let mut check = Check::new(values(self)?);
        let plain = !self.name.is_empty() && !self.name.starts_with('.') && !self.name.contains(['/', '\\', '\0']);
        check.that(plain, "name", "be a plain folder name", "the run's folder is runs/NAME");
        data(&mut check, &self.data);
        text(&mut check, &self.text);
        image_tokenizer(&mut check, &self.image_tokenizer);
        model(&mut check, &self.model);
        self.end_to_end.check(&mut check);
        matcher(&mut check, &self.matcher, &self.text);
        self.lora.check(&mut check, self.task, &self.train.init_from);
        train(&mut check, &self.train, self.task.is_generator());
        self.sample.check(&mut check);
        Ok(check.problems())
    }
}

fn data(check: &mut Check, data: &Data) {
    for source in &data.sources {
        check.that(
            !source.path.is_empty(),
            "data.sources",
            "each have a path",
            "a folder, or tar shards like dir/*.tar",
        );
        let ok = source.weight > 0.0 && source.weight <= 1e6;
        check.that(ok, "data.sources", "have weights above 0, at most 1e6", "leave out a source that is not wanted");
    }
    let ok = (1..=4096).contains(&data.prefetch);
    check.that(ok, "data.prefetch", "be from 1 to 4096", "batches to read ahead: 4 to 8 are usual");
    check.that(
        (1..=256).contains(&data.workers),
        "data.workers",
        "be from 1 to 256",
        "1 is enough for shards of codes",
    );
    check.that(
        data.shuffle_buffer <= 1_000_000,
        "data.shuffle_buffer",
        "be at most 1,000,000",
        "1000 samples of each stream are usual; 0 reads samples at random",
    );
    check.that(
        data.caption_keys.iter().all(|key| !key.is_empty()),
        "data.caption_keys",
        "have no empty name",
        "name JSON fields of the samples, or leave the list empty",
    );
    check.within("data", &[("max_bad_ratio", data.max_bad_ratio)], 0.0, 1.0, "0.05 stops at more than 5 % bad samples");
    let ok = data.cache_gb > 0.0 && data.cache_gb <= 1e6;
    check.that(
        ok,
        "data.cache_gb",
        "be above 0, at most 1e6",
        "the disk space for remote shards, in GB: 100 is the default",
    );
}

fn text(check: &mut Check, text: &Text) {
    let ok = (3..=4096).contains(&text.max_tokens);
    check.that(
        ok,
        "text.max_tokens",
        "be from 3 to 4096",
        "it counts [CLS] and [SEP]: a caption of 30 tokens needs 32",
    );
}

fn image_tokenizer(check: &mut Check, t: &ImageTokenizer) {
    let key = |name: &str| format!("image_tokenizer.{name}");
    let (levels, multipliers) = (t.channel_multipliers.len(), &t.channel_multipliers);
    let ok = (1..=8).contains(&levels) && multipliers.iter().all(|m| (1..=64).contains(m));
    check.that(ok, &key("channel_multipliers"), "have 1 to 8 entries from 1 to 64", "[1, 1, 2, 4] is f = 8");
    let (step, hint) = match t.architecture {
        Architecture::Vqgan => (32, "GroupNorm uses 32 groups"),
        Architecture::Dvae => (4, "the inner layers of a block have a quarter of the channels"),
    };
    let ok = t.channels > 0 && t.channels.is_multiple_of(step) && t.channels <= 4096;
    check.that(ok, &key("channels"), format_args!("be a multiple of {step}, at most 4096"), hint);
    let f = 1_usize << levels.saturating_sub(1).min(16);
    let ok = (1..=4096).contains(&t.image_size) && t.image_size.is_multiple_of(f);
    let hint = format!("{levels} levels downsample by {f}: use a multiple of {f}");
    check.that(ok, &key("image_size"), format_args!("be divisible by {f}, at most 4096"), hint);
    let sides: Vec<usize> = (0..levels.min(16)).map(|level| t.image_size >> level).collect();
    let ok = t.attention_sides.iter().all(|side| sides.contains(side));
    check.that(
        ok,
        &key("attention_sides"),
        "be side lengths of the feature maps",
        format!("the levels have sides {sides:?}"),
    );
    check.that((1..=64).contains(&t.residual_blocks), &key("residual_blocks"), "be from 1 to 64", "taming uses 2");
    check.that(
        (1..=65536).contains(&t.latent_channels),
        &key("latent_channels"),
        "be from 1 to 65536",
        "taming uses 256",
    );
    let ok = (2..=65536).contains(&t.codebook_size);
    check.that(ok, &key("codebook_size"), "be from 2 to 65536", "shards of codes store 16 bits per code");
    check.that(
        (1..=65536).contains(&t.code_dim),
        &key("code_dim"),
        "be from 1 to 65536",
        "8 is usual with l2_normalize, else 256",
    );
    let product = t.fsq_levels.iter().try_fold(1u32, |product, size| product.checked_mul(*size));
    let fits = product == u32::try_from(t.codebook_size).ok() && t.fsq_levels.iter().all(|size| *size >= 2);
    let ok = t.quantizer != QuantizerKind::Fsq || (fits && t.fsq_levels.len() == t.code_dim);
    let must = "be code_dim integers of at least 2 whose product is codebook_size";
    check.that(ok, &key("fsq_levels"), must, "[8, 8, 8, 4] gives 2,048 codes of 4 dimensions");
    let ok = t.temperature.iter().all(|t| t.is_finite() && *t > 0.0);
    check.that(ok, &key("temperature"), "be above 0", "DALL-E uses [1.0, 0.0625]");
    check.that(
        t.temperature_steps >= 1,
        &key("temperature_steps"),
        "be at least 1",
        "use a third of train.steps or more",
    );
    let weights = [
        ("kl_weight", t.kl_weight),
        ("commitment", t.commitment),
        ("entropy_weight", t.entropy_weight),
        ("l1_weight", t.l1_weight),
        ("l2_weight", t.l2_weight),
        ("perceptual_weight", t.perceptual_weight),
        ("adversarial_weight", t.adversarial_weight),
        ("lecam_weight", t.lecam_weight),
    ];
    check.within("image_tokenizer", &weights, 0.0, f64::INFINITY, "weight of a loss term");
    let ok = t.perceptual_weight == 0.0 || t.image_size >= 16;
    check.that(
        ok,
        &key("image_size"),
        "be at least 16 with a perceptual loss",
        "its network halves the side length four times",
    );
    let ok = (0.0..1.0).contains(&t.codebook_decay);
    check.that(
        ok,
        &key("codebook_decay"),
        "be at least 0 and below 1",
        "0.99 is usual; 0 trains the codebook by gradients",
    );
    let ok = !t.codebook_is_averaged() || !t.legacy_beta;
    check.that(
        ok,
        &key("legacy_beta"),
        "be false with codebook_decay",
        "an EMA codebook has no codebook loss for beta to weight",
    );
    let share = [("channel_permutation", t.channel_permutation)];
    check.within("image_tokenizer", &share, 0.0, 1.0, "0.4 keeps rare hues");
    let share = [("discriminator_ceiling", t.discriminator_ceiling)];
    check.within(
        "image_tokenizer",
        &share,
        0.5,
        1.0,
        "0.85 keeps the discriminator from overpowering the decoder; 1 always trains it",
    );
    let ok = (1..=4096).contains(&t.discriminator_channels);
    check.that(ok, &key("discriminator_channels"), "be from 1 to 4096", "taming uses 64");
    let ok = (1..=8).contains(&t.discriminator_layers)
        && (t.adversarial_weight == 0.0 || t.image_size >> t.discriminator_layers > 2);
    let hint = format!("each layer halves the side length of {} pixels; more than 2 must remain", t.image_size);
    check.that(ok, &key("discriminator_layers"), "be from 1 to 8 and fit the image", hint);
    let dvae = t.architecture == Architecture::Dvae;
    let ok = !dvae || t.quantizer == QuantizerKind::Gumbel;
    check.that(ok, &key("quantizer"), "be gumbel when architecture is dvae", "the encoder of a dVAE outputs logits");
    let ok = dvae || t.l1_weight != 0.0 || t.l2_weight != 0.0;
    check.that(ok, &key("l2_weight"), "not be 0 together with l1_weight", "the tokenizer needs a pixel loss to learn");
}

fn model(check: &mut Check, model: &Model) {
    check.that((1..=1024).contains(&model.layers), "model.layers", "be from 1 to 1024", "the 10B model has 48");
    check.that((1..=65536).contains(&model.hidden), "model.hidden", "be from 1 to 65536", "the 10B model has 4096");
    let ok = model.heads > 0 && model.hidden.is_multiple_of(model.heads);
    let must = format!("divide model.hidden ({})", model.hidden);
    check.that(ok, "model.heads", must, "64 channels per head are usual");
    check.that((1..=64).contains(&model.mlp_ratio), "model.mlp_ratio", "be from 1 to 64", "4 is usual");
    let ok = model.conv_size % 2 == 1 && model.conv_size < 1024;
    check.that(ok, "model.conv_size", "be odd and below 1024", "the paper uses 11: 5 codes on each side of the query");
}

/// Upper limits that are far above all realistic runs and keep products of sizes within 64 bits.
const MOST_STEPS: u64 = 1_000_000_000_000;
const MOST_SAMPLES: usize = 1 << 20;
const MOST_SECONDS: u64 = 31_536_000;

fn train(check: &mut Check, t: &Train, generator: bool) {
    let ok = (1..=MOST_STEPS).contains(&t.steps);
    check.that(ok, "train.steps", format_args!("be from 1 to {MOST_STEPS}"), "one step is one update of the weights");
    let others = generator && t.caption_batch_size + t.vqa_batch_size > 0;
    let (least, hint) = match generator {
        true => (
            usize::from(!others),
            "text-to-image sequences per step; 0 only with a caption_batch_size or vqa_batch_size",
        ),
        false => (1, "samples per step"),
    };
    let must = format!("be from {least} to {MOST_SAMPLES}");
    check.that((least..=MOST_SAMPLES).contains(&t.batch_size), "train.batch_size", must, hint);
    for (key, size, what) in [
        ("train.caption_batch_size", t.caption_batch_size, "image-to-text sequences per step; 0: none"),
        ("train.vqa_batch_size", t.vqa_batch_size, "questions per step; 0: none"),
    ] {
        check.that(size <= MOST_SAMPLES, key, format_args!("be at most {MOST_SAMPLES}"), what);
    }
    let largest = if generator { t.generator_batches().into_iter().max().unwrap_or(0) } else { t.batch_size };
    let ok = (1..=largest).contains(&t.accumulation);
    check.that(
        ok,
        "train.accumulation",
        format_args!("be from 1 to the batch size ({largest})"),
        "gradient accumulation splits a step's samples into micro-batches",
    );
    let weights = [
        ("image_loss_weight", t.image_loss_weight),
        ("text_loss_weight", t.text_loss_weight),
        ("answer_loss_weight", t.answer_loss_weight),
        ("weight_decay", t.weight_decay),
        ("clip_norm", t.clip_norm),
    ];
    check.within("train", &weights, 0.0, f64::INFINITY, "0 turns it off");
    let weights = [t.image_loss_weight, t.text_loss_weight, t.answer_loss_weight];
    let trained = weights.into_iter().zip(t.generator_batches()).any(|(weight, size)| weight != 0.0 && size > 0);
    check.that(
        trained || !generator,
        "train.image_loss_weight",
        "not be 0 where no other loss has a weight and a batch size",
        "at least one direction must be trained",
    );
    check.within(
        "train",
        &[("condition_dropout", t.condition_dropout)],
        0.0,
        0.99,
        "0.1 is usual; with 0, classifier-free guidance has no effect",
    );
    for (key, rate) in [("train.learning_rate", t.learning_rate), ("train.muon_learning_rate", t.muon_learning_rate)] {
        check.that(
            rate.is_finite() && rate > 0.0,
            key,
            "be a finite number above 0",
            "for example 4.5e-4 (AdamW), 0.02 (Muon)",
        );
    }
    let ok = t.betas.iter().all(|b| (0.0..1.0).contains(b));
    check.that(ok, "train.betas", "be from 0 to below 1", "DALL-E uses [0.9, 0.96]");
    check.that(
        t.warmup_steps <= t.steps,
        "train.warmup_steps",
        "be at most train.steps",
        "a few hundred steps are usual",
    );
    let shares = [("decay_start", t.decay_start), ("final_lr_ratio", t.final_lr_ratio)];
    check.within("train", &shares, 0.0, 1.0, "it is a share of 1");
    check.that(
        (0.0..1.0).contains(&t.ema_decay),
        "train.ema_decay",
        "be from 0 to below 1",
        "0.999, or 0 to turn it off",
    );
    let hint = "0: nothing is sharded; 1: optimizer state; 2: also gradients; 3: also weights";
    check.that(t.zero_stage <= 3, "train.zero_stage", "be from 0 to 3", hint);
    let ok = (1..=MOST_SECONDS).contains(&t.rank_timeout);
    check.that(ok, "train.rank_timeout", format_args!("be from 1 to {MOST_SECONDS}"), "600 s are usual");
    let ok = t.hsdp_shard_size <= 65536;
    check.that(ok, "train.hsdp_shard_size", "be at most 65536", "the number of ranks per node is usual; 0: all ranks");
    let hint = "a resumed run repeats the steps since its last checkpoint";
    let ok = t.validation_batches >= 1;
    check.that(ok, "train.validation_batches", "be at least 1", "leave data.validation empty for no validation");
    check.that(t.log_every >= 1, "train.log_every", "be at least 1", "metrics.jsonl has every step");
    let ok = (0.0..=1e6).contains(&t.peak_tflops);
    check.that(ok, "train.peak_tflops", "be from 0 to 1000000", "989 for an H100 in bf16; 0: by the GPU's model");
    check.that(t.checkpoint_every >= 1, "train.checkpoint_every", "be at least 1", hint);
    let hint = "if the newest checkpoint is damaged, a run resumes from the previous one";
    check.that(t.keep_checkpoints >= 2, "train.keep_checkpoints", "be at least 2", hint);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Loaded;

    #[test]
    fn defaults_are_valid() {
        assert!(Config::default().problems().unwrap().is_empty());
    }

    /// Each row has one bad value, and exactly its key must be reported.
    #[test]
    fn bad_values_are_found() {
        let bad = [
            "name=../x",
            "data.sources=[{path=\"x\", weight=0.0}]",
            "data.prefetch=0",
            "data.prefetch=9223372036854775807",
            "data.sources=[{path=\"x\", weight=1e300}]",
            "data.workers=0",
            "data.max_bad_ratio=nan",
            "text.max_tokens=2",
            "image_tokenizer.channels=48",
            "image_tokenizer.channel_multipliers=[]",
            "image_tokenizer.image_size=250",
            "image_tokenizer.attention_sides=[31]",
            "image_tokenizer.residual_blocks=0",
            "image_tokenizer.codebook_size=65537",
            "image_tokenizer.commitment=-1.0",
            "image_tokenizer.codebook_decay=1.0",
            "image_tokenizer.entropy_weight=-1.0",
            "image_tokenizer.l2_weight=0",
            "image_tokenizer.perceptual_weight=-1",
            "image_tokenizer.temperature=[0.0, 1.0]",
            "image_tokenizer.temperature_steps=0",
            "image_tokenizer.kl_weight=inf",
            "image_tokenizer.discriminator_channels=0",
            "image_tokenizer.discriminator_layers=9",
            "image_tokenizer.lecam_weight=nan",
            "image_tokenizer.channel_permutation=1.5",
            "image_tokenizer.discriminator_ceiling=0.4",
            "model.layers=0",
            "model.heads=7",
            "model.heads=0",
            "model.conv_size=10",
            "end_to_end.map_width=65537",
            "end_to_end.reconstruction_weight=-1",
            "end_to_end.generator_gradient_scale=nan",
            "end_to_end.tokenizer_gradient_scale=-1",
            "end_to_end.tokenizer_temperature=0",
            "train.steps=0",
            "train.batch_size=1048577",
            "train.batch_size=9223372036854775807",
            "train.caption_batch_size=9223372036854775807",
            "train.vqa_batch_size=9223372036854775807",
            "train.answer_loss_weight=-1",
            "train.steps=9223372036854775807",
            "train.rank_timeout=9223372036854775807",
            "train.hsdp_shard_size=9223372036854775807",
            "train.log_every=0",
            "train.peak_tflops=-1",
            "train.validation_batches=0",
            "train.accumulation=65",
            "train.condition_dropout=1.5",
            "train.learning_rate=inf",
            "train.betas=[0.9, 1.0]",
            "train.warmup_steps=100001",
            "train.decay_start=1.1",
            "train.clip_norm=nan",
            "train.ema_decay=1",
            "train.zero_stage=4",
            "train.rank_timeout=0",
            "train.checkpoint_every=0",
            "train.keep_checkpoints=1",
            "sample.temperature=-0.5",
            "sample.top_p=0",
            "sample.guidance_start=-1",
            "sample.temperature_start=101",
        ];
        for set in bad {
            let problems = Loaded::read(None, &[set.to_owned()]).unwrap().config.problems().unwrap();
            let key = set.split('=').next().unwrap();
            assert!(problems.iter().any(|p| p.message.starts_with(&format!("`{key}` = "))), "{set}");
            assert!(problems.len() <= 2, "{set}");
        }
    }
}
