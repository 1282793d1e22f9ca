//! `vilg eval recon`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    config::Precision,
    data::picture,
    error::Result,
    eval::{
        inception::Inception,
        reconstruction::{self, Outcome, Settings},
    },
    report, runtime,
    tokenizer::perceptual::Perceptual,
};
use serde_json::json;
use std::path::PathBuf;

/// Turn pictures into codes and back with one or several image tokenizers, and compare
#[derive(clap::Args)]
#[command(
    after_help = "PSNR and SSIM (scikit-image's, windows of 7 × 7) are means over pictures. LPIPS and the Fréchet \
    distance (between VGG-16's last features, their mean over space; not comparable with the FID) need \
    `--lpips`, the FID needs `--inception`, and thousands of pictures to mean something. Use: the share of the codebook that any picture chose."
)]
pub struct Args {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of pictures
    #[arg(long, value_name = "SRC")]
    data: String,
    /// Pictures, a choice keyed by the seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400)]
    samples: usize,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Model folder with the image tokenizer; several are compared on the same pictures
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: Vec<String>,
    /// Folder that `vilg import lpips` wrote
    #[arg(long, value_name = "DIR")]
    lpips: Option<PathBuf>,
    /// Folder that `vilg import inception` wrote
    #[arg(long, value_name = "DIR")]
    inception: Option<PathBuf>,
    /// PNG file of the first 12 pictures above what each tokenizer made of them
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let open = |folder: &PathBuf| Perceptual::open(folder, Precision::F32, &runtime::device()?);
    let perceptual = args.lpips.as_ref().map(open).transpose()?;
    let inception = args.inception.as_ref().map(|folder| Inception::open(folder, &runtime::device()?)).transpose()?;
    let settings = Settings {
        data: &args.data,
        samples: args.samples,
        seed: args.seed,
        perceptual: perceptual.as_ref(),
        inception: inception.as_ref(),
    };
    let shown = if args.sheet.is_some() { 12 } else { 0 };
    let mut outcomes = Vec::new();
    for model in &args.model {
        outcomes.push(reconstruction::run(&Bundle::open(model)?.image_tokenizer()?, &settings, shown)?);
    }
    if let Some(file) = &args.sheet {
        picture::write_png(file, &reconstruction::sheet(&outcomes))?;
    }
    if json {
        for (model, outcome) in args.model.iter().zip(&outcomes) {
            report::json(&json!({ "model": model, "data": args.data, "result": outcome.result }));
        }
    } else {
        let header = ["tokenizer", "pictures", "PSNR", "SSIM", "LPIPS", "Fréchet (VGG)", "FID", "use", "perplexity"];
        let rows = args.model.iter().zip(&outcomes).map(|(model, outcome)| row(model, outcome));
        report::table(&header, &rows.collect::<Vec<_>>());
    }
    Ok(())
}

fn row(model: &str, Outcome { result, .. }: &Outcome) -> Vec<String> {
    let known = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    vec![
        model.to_owned(),
        result.pictures.to_string(),
        format!("{:.2} dB", result.psnr),
        known(result.ssim),
        known(result.lpips),
        known(result.frechet_vgg),
        known(result.fid),
        format!("{:.1} %", 100.0 * result.codebook_used),
        format!("{:.0}", result.perplexity),
    ]
}
