//! The options of commands that run a generator.

use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    generate::Models,
    ops::packed::Format,
};

/// Which model runs, and how.
#[derive(clap::Args)]
pub struct ModelOptions {
    /// Model folder, or `demo`
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
    /// What the weights are kept in while tokens are drawn: bf16 is as good as f32 and faster, int8 is smaller still
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Bf16)]
    precision: Format,
}

impl ModelOptions {
    /// Opens the model folder and loads what is in it.
    pub fn load(&self) -> Result<(Bundle, Models)> {
        let bundle = Bundle::open(&self.model)?;
        let models = Models::load(&bundle, self.precision)?;
        Ok((bundle, models))
    }
}
