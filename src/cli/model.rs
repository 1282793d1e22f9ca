//! The options of commands that run a generator.

use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    generate::Models,
    ops::packed::Format,
    report,
};
use std::time::Instant;

/// Options that choose the model and the precision of its weights.
#[derive(clap::Args)]
pub struct ModelOptions {
    /// Model folder, folder of a training run (its `model` is used), or `demo` for the built-in model
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
    /// Number format of the weights during generation: bf16 is as good as f32 and faster, int8 halves the memory of
    /// bf16
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Bf16)]
    precision: Format,
}

impl ModelOptions {
    /// Opens the model folder and loads its generator, image tokenizer and vocabulary.
    ///
    /// # Errors
    /// The folder is missing, incomplete or damaged.
    pub fn load(&self) -> Result<(Bundle, Models)> {
        let bundle = Bundle::open(&self.model)?;
        let begun = Instant::now();
        let models = Models::load(&bundle, self.precision)?;
        report::detail(format_args!("model {} loaded in {:.1} s", self.model, begun.elapsed().as_secs_f64()));
        Ok((bundle, models))
    }
}
