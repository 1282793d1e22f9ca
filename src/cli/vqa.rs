//! `vilg vqa`

use super::{caption::DecodingOptions, model::ModelOptions};
use crate::{
    bundle::Bundle,
    data::image::open_square,
    error::{Result, ensure, usage},
    report,
};
use serde_json::json;
use std::path::PathBuf;

/// Answer Chinese questions about an image
#[derive(clap::Args)]
#[command(
    after_help = "Prints one answer on each line, after its question where there are several. The model must have learnt from \
    questions (train.vqa_batch_size); the built-in one has not. `score` in the JSON is the mean log probability of a token of \
    the answer, given image and question.\n\n\
    Example:\n  \
    vilg vqa scene.png 图中有几只羊？ 这是什么地方？ --model runs/scenes-vqa"
)]
pub struct Args {
    /// Image file (PNG, JPEG, WebP, GIF, BMP, TIFF)
    #[arg(value_name = "IMG")]
    image: PathBuf,
    /// Questions about the image
    #[arg(required = true, value_name = "QUESTION")]
    questions: Vec<String>,
    #[command(flatten)]
    decoding: DecodingOptions,
    #[command(flatten)]
    model: ModelOptions,
}

/// Warns if a model has not learnt from questions.
pub fn warn_untrained(bundle: &Bundle) {
    if bundle.config.train.vqa_batch_size == 0 {
        report::warn(format_args!("{} has not learnt to answer questions (train.vqa_batch_size = 0)", bundle.name()));
    }
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let empty = args.questions.iter().any(|question| question.trim().is_empty());
    ensure!(!empty, usage("a question is empty", "write it in quotes, such as \"图中有什么？\""));
    let (bundle, models) = args.model.load()?;
    warn_untrained(&bundle);
    let image = open_square(&args.image, models.image_tokenizer.image_size())?;
    let codes = models.encode(std::slice::from_ref(&image))?.swap_remove(0);
    let questions: Vec<&str> = args.questions.iter().map(String::as_str).collect();
    let codes = vec![codes; questions.len()];
    let answers = models.answer(&codes, &questions, &args.decoding.decoding(), args.decoding.number())?;
    for (question, answer) in questions.iter().zip(answers).flat_map(|(q, all)| all.into_iter().map(move |a| (q, a))) {
        let (text, score) = (&answer.text, answer.score);
        if json {
            let image = report::path(&args.image);
            report::json(&json!({ "image": image, "question": question, "answer": text, "score": score }));
        } else if questions.len() > 1 {
            report::result(format_args!("{question}\t{text}"));
        } else {
            report::result(text);
        }
    }
    Ok(())
}
