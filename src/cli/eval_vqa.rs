//! `vilg eval vqa`

use super::model::ModelOptions;
use crate::{
    error::Result,
    eval::vqa,
    generate::{Decoding, Sampling},
    report,
};
use serde_json::json;

/// Measure answers to questions about images: the share that is exactly right, by type of the question
#[derive(clap::Args)]
#[command(
    after_help = "All `questions` in the JSON of a sample are asked. Case and spaces are ignored. The last line is what the most \
    frequent answer to each question text would reach without looking at the image, told from the measured questions \
    themselves. Intervals are 95 % Wilson intervals."
)]
pub struct Args {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of images
    #[arg(long, value_name = "SRC")]
    data: String,
    /// Number of images, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400, allow_negative_numbers = true)]
    samples: usize,
    /// Random seed of the choice of images
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Use beam search of width B [default: greedy decoding]
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=64))]
    beam: Option<u32>,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let (_, models) = args.model.load()?;
    let decoding = match args.beam {
        Some(width) => Decoding::Beam { width: width as usize, length_penalty: 1.0 },
        None => Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 },
    };
    let accuracy = vqa::run(&models, &args.data, args.samples, &decoding, args.seed)?;
    if json {
        report::json(&json!({ "data": args.data, "accuracy": accuracy, "beam": args.beam, "seed": args.seed }));
        return Ok(());
    }
    report::result(format_args!("right answers  {}", accuracy.all));
    accuracy.types.iter().for_each(|(kind, rate)| report::result(format_args!("{kind}  {rate}")));
    report::result(format_args!("without the image  {}", accuracy.without_images));
    Ok(())
}
