//! `vilg export`

use crate::{bundle::Bundle, error::Result, report};
use clap::ValueEnum;
use safetensors::Dtype;
use serde_json::json;
use std::path::PathBuf;

/// Copy a model folder with its weights in another precision
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or `demo`
    #[arg(long, value_name = "DIR|NAME", default_value = crate::bundle::DEMO_NAME)]
    model: String,
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Precision of the copy's weights
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Precision,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
    F16,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let dtype = match args.dtype {
        Precision::F32 => Dtype::F32,
        Precision::Bf16 => Dtype::BF16,
        Precision::F16 => Dtype::F16,
    };
    Bundle::open(&args.model)?.export(&args.output, dtype)?;
    if json {
        report::json(&json!({ "path": args.output }));
    } else {
        report::note(format_args!("wrote {}", args.output.display()));
    }
    Ok(())
}
