//! `vilg eval vqa`

use super::{captioning::CaptioningOptions, eval_samples::SampleOptions};
use crate::{error::Result, eval::vqa, report};
use serde_json::json;

/// Measure answers to questions about images: the share that is exactly right, by type of the question
#[derive(clap::Args)]
#[command(
    after_help = "All `questions` in the JSON of a sample are asked. Case and spaces are ignored. The last line is what the most \
    frequent answer to each question text would reach without looking at the image, counted in the measured questions \
    themselves. Intervals are 95 % Wilson intervals."
)]
pub struct Args {
    #[command(flatten)]
    samples: SampleOptions,
    #[command(flatten)]
    decoding: CaptioningOptions,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let SampleOptions { data, samples, seed, model } = &args.samples;
    let (_, models) = model.load()?;
    let accuracy = vqa::run(&models, data, *samples, &args.decoding.decoding(), *seed)?;
    if json {
        report::json(&json!({ "data": data, "accuracy": accuracy, "beam": args.decoding.beam,
            "length_penalty": args.decoding.length_penalty(), "seed": seed }));
        return Ok(());
    }
    report::result(format_args!("right answers  {}", accuracy.right.all));
    accuracy.right.types.iter().for_each(|(kind, rate)| report::result(format_args!("{kind}  {rate}")));
    report::result(format_args!("without the image  {}", accuracy.without_images));
    Ok(())
}
