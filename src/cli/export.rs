//! `vilg export`

use crate::{
    bundle::{Bundle, Changes},
    error::Result,
    report,
};
use clap::ValueEnum;
use safetensors::Dtype;
use serde_json::json;
use std::path::PathBuf;

/// Copy a model folder: in another precision, with an adapter or another decoder, or under another project's tensor names
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, the folder of a training run, or `demo`
    #[arg(long, value_name = "DIR|NAME", default_value = crate::bundle::DEMO_NAME)]
    model: String,
    /// Merge this low-rank adapter (LoRA) into the weights: its folder, or that of its training run
    #[arg(long, value_name = "DIR", conflicts_with = "names")]
    adapter: Option<PathBuf>,
    /// Folder to write; with `--names llamagen-vq` or `chinese-clip`: .safetensors file to write. An existing model folder
    /// is replaced
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Number format of the copied weights
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Precision,
    /// Replace the generator's image tokenizer by this one. Encoder and codebook must be the same: only the decoder may
    /// have been trained further (train.freeze)
    #[arg(long, value_name = "DIR")]
    image_tokenizer: Option<String>,
    /// Names of the tensors. A VQGAN already has the names of taming-transformers, a dVAE those of DALL-E
    #[arg(long, value_enum, default_value = "ours", conflicts_with = "image_tokenizer")]
    names: Names,
    /// Leave out the reconstructor of an end-to-end generator: the copy decodes with its image tokenizer
    #[arg(long, conflicts_with = "names")]
    two_stage: bool,
    /// Replace the output even if it is not a model folder (or, with the names of another project, not a .safetensors file)
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Names {
    /// A model folder of vilg
    Ours,
    /// The image tokenizer alone, with the tensor names of LlamaGen's VQ tokenizer
    LlamagenVq,
    /// A matcher, with the tensor names of OFA-Sys's Chinese-CLIP
    ChineseClip,
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
    let mut bundle = Bundle::open(&args.model)?;
    if let Some(adapter) = &args.adapter {
        bundle = bundle.with_adapter(adapter)?;
    }
    match args.names {
        Names::Ours => {
            let tokenizer = args.image_tokenizer.as_deref().map(Bundle::open).transpose()?;
            bundle.export(
                &args.output,
                dtype,
                &Changes { tokenizer: tokenizer.as_ref(), two_stage: args.two_stage },
                args.force,
            )?;
        }
        Names::LlamagenVq => bundle.export_llamagen(&args.output, dtype, args.force)?,
        Names::ChineseClip => bundle.export_chinese_clip(&args.output, dtype, args.force)?,
    }
    if json {
        report::json(&json!({ "path": report::path(&args.output) }));
    } else {
        report::note(format_args!("wrote {}", args.output.display()));
    }
    Ok(())
}
