//! `vilg caption`

use super::{
    model::ModelOptions,
    sampling::{from_0_to_100, probability},
};
use crate::{
    data::image::open_square,
    error::{Result, ensure, failed},
    generate::{Caption, Decoding, Sampling},
    report,
};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Pictures read and described at once.
const BATCH: usize = 64;

/// Describe pictures in Chinese
#[derive(clap::Args)]
#[command(
    after_help = "Prints a line a caption, after its picture's name where there are several. A picture that cannot be \
    read is reported and the others go on; the exit code is then 1. `score` in the JSON is the mean \
    log-probability of a token of the caption, given the picture."
)]
pub struct Args {
    /// Pictures (PNG, JPEG, WebP, GIF, BMP, TIFF)
    #[arg(required = true, value_name = "IMG")]
    images: Vec<PathBuf>,
    /// Captions for each picture, the best first
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    number: u32,
    /// Search for the likeliest captions with a beam of this width, at least N, instead of sampling
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=64),
        conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    beam: Option<u32>,
    /// Divides the logits; 0 takes the likeliest token [default: 0 for one caption, 1 for several]
    #[arg(long, value_name = "T", value_parser = from_0_to_100, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Draw only from the K likeliest tokens; 0: from all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw only from the likeliest tokens that make up this probability; 1: from all
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability, allow_negative_numbers = true)]
    top_p: f64,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelOptions,
}

impl Args {
    fn decoding(&self) -> Decoding {
        if let Some(width) = self.beam {
            return Decoding::Beam { width: width.max(self.number) as usize };
        }
        let temperature = self.temperature.unwrap_or(if self.number == 1 { 0.0 } else { 1.0 });
        let sampling = Sampling { temperature, top_k: self.top_k, top_p: self.top_p, guidance: 1.0 };
        Decoding::Sample { sampling, seed: self.seed }
    }
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let (_, models) = args.model.load()?;
    let (decoding, mut unread) = (args.decoding(), 0);
    for paths in args.images.chunks(BATCH) {
        let (mut read, mut pictures) = (Vec::new(), Vec::new());
        for path in paths {
            match open_square(path, models.image_tokenizer.image_size()) {
                Ok(picture) => {
                    read.push(path);
                    pictures.push(picture);
                }
                Err(e) => {
                    report::error(&e);
                    unread += 1;
                }
            }
        }
        let captions = models.describe(&models.encode(&pictures)?, &decoding, args.number as usize)?;
        for (path, captions) in read.into_iter().zip(&captions) {
            captions.iter().for_each(|caption| print(path, caption, &args, json));
        }
    }
    let hint = "the others are described; PNG, JPEG, WebP, GIF, BMP and TIFF are read";
    let message = format!("{unread} of {} pictures cannot be read", args.images.len());
    ensure!(unread == 0, failed(message, hint));
    Ok(())
}

fn print(path: &Path, caption: &Caption, args: &Args, json: bool) {
    if json {
        report::json(&json!({ "image": path.display().to_string(), "caption": caption.text, "score": caption.score }));
    } else if args.images.len() > 1 {
        report::result(format_args!("{}\t{}", path.display(), caption.text));
    } else {
        report::result(&caption.text);
    }
}
