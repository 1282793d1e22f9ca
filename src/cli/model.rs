//! The options of commands that run a generator.

use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    generate::Models,
    ops::packed::Format,
    report,
};
use std::time::Instant;

/// Which model runs, and how.
#[derive(clap::Args)]
pub struct ModelOptions {
    /// Model folder, the folder of a training run (its `model` is taken), or `demo` for the built-in model
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
    /// Format of the weights while tokens are generated: bf16 is as good as f32 and faster, int8 halves the memory of bf16
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Bf16)]
    precision: Format,
}

impl ModelOptions {
    /// Opens the model folder and loads its generator, image tokenizer and vocabulary.
    pub fn load(&self) -> Result<(Bundle, Models)> {
        let bundle = Bundle::open(&self.model)?;
        let begun = Instant::now();
        let models = Models::load(&bundle, self.precision)?;
        report::detail(format_args!("model {} loaded in {:.1} s", self.model, begun.elapsed().as_secs_f64()));
        Ok((bundle, models))
    }
}
