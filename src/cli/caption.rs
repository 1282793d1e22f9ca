//! `vilg caption`

use super::{
    demo_check::{DemoCheck, LEAST},
    model::ModelOptions,
    sampling::{from_0_to_100, length_penalty, probability},
};
use crate::{
    data::image::open_square,
    error::{Result, ensure, failed},
    generate::{Caption, Decoding, Sampling},
    report,
};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Number of images that are read and captioned together.
const BATCH: usize = 64;

/// Write Chinese captions for images
#[derive(clap::Args)]
#[command(
    after_help = "Prints one caption on each line, after the file name of its image where there are several images. An \
    image that cannot be read is reported and skipped; the exit code is then 1. `score` in the JSON is the mean log \
    probability of a caption token, given the image; with the demo, `match` is the probability by the built-in matcher that \
    image and caption are a pair.\n\n\
    Beam search extends the B most likely partial captions by one token at a time, and ends when none of them can \
    overtake the B best finished captions. Captions are ranked by ln p(caption) / tokens^A, where A is \
    --length-penalty."
)]
pub struct Args {
    /// Image files (PNG, JPEG, WebP, GIF, BMP, TIFF)
    #[arg(required = true, value_name = "IMG")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    decoding: DecodingOptions,
    #[command(flatten)]
    model: ModelOptions,
}

/// How texts are decoded.
#[derive(clap::Args)]
pub struct DecodingOptions {
    /// Number of texts for each image or question, best first
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64),
        allow_negative_numbers = true)]
    number: u32,
    /// Use beam search of width B instead of sampling; a B below N counts as N
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=64), allow_negative_numbers = true,
        conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    beam: Option<u32>,
    /// Length penalty A of beam search, from 0 to 10: 1 ranks texts by mean log probability per token, lower values
    /// prefer short texts, higher values prefer long ones
    #[arg(long, value_name = "A", default_value_t = 1.0, value_parser = length_penalty, requires = "beam",
        allow_negative_numbers = true)]
    length_penalty: f64,
    /// Sampling temperature, from 0 to 100: divides the logits; 0 always takes the most likely token [default: 0 for
    /// one text, 1 for several]
    #[arg(long, value_name = "T", value_parser = from_0_to_100, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Top-k sampling: sample only from the K most likely tokens; 0: from all
    #[arg(long, value_name = "K", default_value_t = 0, allow_negative_numbers = true)]
    top_k: usize,
    /// Nucleus sampling: sample only from the most likely tokens whose probabilities add up to P, above 0; 1: from all
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability, allow_negative_numbers = true)]
    top_p: f64,
    /// Random seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
}

impl DecodingOptions {
    /// Texts for each image or question.
    pub fn number(&self) -> usize {
        self.number as usize
    }

    pub fn decoding(&self) -> Decoding {
        if let Some(width) = self.beam {
            return Decoding::Beam { width: width.max(self.number) as usize, length_penalty: self.length_penalty };
        }
        let temperature = self.temperature.unwrap_or(if self.number == 1 { 0.0 } else { 1.0 });
        let sampling = Sampling { temperature, top_k: self.top_k, top_p: self.top_p, ..Sampling::GREEDY };
        Decoding::Sample { sampling, seed: self.seed }
    }
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let (_, models) = args.model.load()?;
    let check = DemoCheck::new(args.model.is_demo())?;
    let (decoding, mut unread) = (args.decoding.decoding(), 0);
    for paths in args.images.chunks(BATCH) {
        let (mut read, mut images) = (Vec::new(), Vec::new());
        for path in paths {
            match open_square(path, models.image_tokenizer.image_size()) {
                Ok(image) => {
                    read.push(path);
                    images.push(image);
                }
                Err(e) => {
                    report::error(&e);
                    unread += 1;
                }
            }
        }
        let captions = models.caption(&models.encode(&images)?, &decoding, args.decoding.number())?;
        let texts = |captions: &Vec<Caption>| captions.iter().map(|caption| caption.text.clone()).collect();
        let scores = check.scores(&images, &captions.iter().map(texts).collect::<Vec<_>>())?;
        for ((path, captions), scores) in read.into_iter().zip(&captions).zip(scores) {
            if !scores.is_empty() && scores.iter().all(|score| score.is_some_and(|score| score < LEAST)) {
                let path = path.display();
                report::warn(format_args!(
                    "{path}: the caption may be wrong: the demo only knows emoji of single things"
                ));
            }
            captions.iter().zip(scores).for_each(|(caption, score)| print(path, caption, score, &args, json));
        }
    }
    let hint = "the others have their captions; PNG, JPEG, WebP, GIF, BMP and TIFF can be read";
    let message = format!("{unread} of {} images cannot be read", args.images.len());
    ensure!(unread == 0, failed(message, hint));
    Ok(())
}

fn print(path: &Path, caption: &Caption, matches: Option<f64>, args: &Args, json: bool) {
    if json {
        report::json(&json!({ "image": report::path(path), "caption": caption.text, "score": caption.score,
            "match": matches }));
    } else if args.images.len() > 1 {
        report::result(format_args!("{}\t{}", path.display(), caption.text));
    } else {
        report::result(&caption.text);
    }
}
