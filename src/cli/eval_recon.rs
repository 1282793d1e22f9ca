//! `vilg eval recon`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    config::Precision,
    data::image_file,
    error::Result,
    eval::{
        fid::{Inception, Weights},
        reconstruction::{self, Outcome, Settings},
    },
    report, runtime,
    tokenizer::perceptual::Perceptual,
};
use serde_json::json;
use std::path::PathBuf;

/// Measure image tokenizers: encode and decode images, and compare the results with the originals
#[derive(clap::Args)]
#[command(
    after_help = "PSNR (in dB) and SSIM (as scikit-image computes it, 7 × 7 windows) are means over images. LPIPS and \
    the Fréchet distance of VGG-16 features (averaged over positions; not comparable with FID) need --lpips; FID (protocol \
    pytorch-fid) needs --inception and thousands of images. The color error is the mean CIE76 difference of pixels that are \
    saturated in the original, by their hue; about 2.3 is just visible. `use` is the share of codebook entries used by at least one image."
)]
pub struct Args {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of images
    #[arg(long, value_name = "SRC")]
    data: String,
    /// Number of images to measure, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400, allow_negative_numbers = true)]
    samples: usize,
    /// Random seed of the choice of images
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Model folder with the image tokenizer; repeat the option to compare several tokenizers on the same images
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: Vec<String>,
    /// Folder written by `vilg import lpips`
    #[arg(long, value_name = "DIR")]
    lpips: Option<PathBuf>,
    /// Folder written by `vilg import inception`
    #[arg(long, value_name = "DIR")]
    inception: Option<PathBuf>,
    /// PNG file to write: the first 12 images, with their reconstructions by each tokenizer below
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    args.sheet.as_ref().map_or(Ok(()), |sheet| super::output::check(sheet, "--sheet"))?;
    let open = |folder: &PathBuf| Perceptual::open(folder, Precision::F32, &runtime::device()?);
    let perceptual = args.lpips.as_ref().map(open).transpose()?;
    let open = |folder: &PathBuf| Inception::open(folder, Weights::TensorFlow, &runtime::device()?);
    let inception = args.inception.as_ref().map(open).transpose()?;
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
        image_file::write_png(file, &reconstruction::sheet(&outcomes))?;
    }
    if json {
        for (model, outcome) in args.model.iter().zip(&outcomes) {
            report::json(&json!({ "model": model, "data": args.data, "result": outcome.result }));
        }
    } else {
        let header = ["tokenizer", "images", "PSNR", "SSIM", "LPIPS", "Fréchet (VGG)", "FID", "use", "perplexity"];
        let rows = args.model.iter().zip(&outcomes).map(|(model, outcome)| row(model, outcome));
        report::table(&header, &rows.collect::<Vec<_>>());
        let hues = outcomes.first().map_or(Vec::new(), |outcome| outcome.result.colors.clone());
        let header: Vec<&str> = ["color error (ΔE)"].into_iter().chain(hues.iter().map(|sector| sector.hue)).collect();
        let rows = args.model.iter().zip(&outcomes).map(|(model, outcome)| colors(model, outcome));
        report::table(&header, &rows.collect::<Vec<_>>());
    }
    Ok(())
}

fn colors(model: &str, Outcome { result, .. }: &Outcome) -> Vec<String> {
    let errors =
        result.colors.iter().map(|sector| sector.delta_e.map_or("-".to_owned(), |error| format!("{error:.1}")));
    [model.to_owned()].into_iter().chain(errors).collect()
}

fn row(model: &str, Outcome { result, .. }: &Outcome) -> Vec<String> {
    let known = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    vec![
        model.to_owned(),
        result.images.to_string(),
        format!("{:.2} dB", result.psnr),
        known(result.ssim),
        known(result.lpips),
        known(result.frechet_vgg),
        known(result.fid),
        format!("{:.1} %", 100.0 * result.codebook_used),
        format!("{:.0}", result.perplexity),
    ]
}
