//! The options of commands that run a generator or a matcher.

use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    generate::{Matching, Models},
    ops::packed::Format,
    report,
};
use clap::ValueEnum;
use std::{path::PathBuf, time::Instant};

/// Options that choose the model and the precision of its weights.
#[derive(clap::Args)]
pub struct ModelOptions {
    /// Model folder, folder of a training run (its `model` is used), or `demo` for the built-in model
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
    /// Folder of a low-rank adapter (LoRA) that was trained for this model, or of its training run
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Number format of the weights during generation: bf16 is as good as f32 and faster, int8 halves the memory of
    /// bf16
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Bf16)]
    precision: Format,
}

impl ModelOptions {
    /// Opens the model folder and loads its generator, image tokenizer and vocabulary.
    ///
    /// # Errors
    /// The folder is missing, incomplete or damaged, or the adapter is of another model.
    pub fn load(&self) -> Result<(Bundle, Models)> {
        let mut bundle = Bundle::open(&self.model)?;
        if let Some(adapter) = &self.adapter {
            bundle = bundle.with_adapter(adapter)?;
        }
        let begun = Instant::now();
        let models = Models::load(&bundle, self.precision)?;
        report::detail(format_args!("model {} loaded in {:.1} s", self.model, begun.elapsed().as_secs_f64()));
        Ok((bundle, models))
    }

    /// Whether the model is the built-in one, without an adapter.
    pub fn is_demo(&self) -> bool {
        self.model == DEMO_NAME && self.adapter.is_none()
    }

    /// Digest of what generates images: the generator with its adapter, its image tokenizer and the precision.
    ///
    /// # Errors
    /// A file of weights cannot be read.
    pub fn digest(&self, bundle: &Bundle) -> Result<String> {
        let precision = self.precision.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        let tokenizer = bundle.image_tokenizer_folder()?.weights_digest()?;
        let adapter = bundle.adapter_digest()?.map_or(String::new(), |digest| format!(" {digest}"));
        Ok(format!("{}{adapter} {tokenizer} {precision}", bundle.weights_digest()?))
    }
}

/// The option that chooses a matcher.
#[derive(clap::Args)]
pub struct MatcherOption {
    /// Model folder of a matcher, folder of its training run, or `demo` for the built-in matcher
    #[arg(short, long = "model", visible_alias = "matcher", value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
}

impl MatcherOption {
    /// Opens the model folder and loads its matcher.
    ///
    /// # Errors
    /// The folder is missing, incomplete or damaged, or holds another kind of model.
    pub fn load(&self) -> Result<(Bundle, Matching)> {
        let bundle = Bundle::open(&self.model)?.matcher_folder()?;
        let begun = Instant::now();
        let matching = Matching::open(&bundle)?;
        report::detail(format_args!("matcher {} loaded in {:.1} s", self.model, begun.elapsed().as_secs_f64()));
        Ok((bundle, matching))
    }

    /// How the model is named on the command line.
    pub fn name(&self) -> &str {
        &self.model
    }

    /// Says that the model is not calibrated, and what to do.
    pub fn calibrate_hint(&self) -> String {
        format!("{} is not calibrated ({})", self.model, calibrate_command(&self.model))
    }
}

/// How a matcher is calibrated.
pub fn calibrate_command(model: &str) -> String {
    format!("run `vilg eval matcher --data SRC --model {model} --calibrate`")
}
