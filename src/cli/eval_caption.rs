//! `vilg eval caption`

use super::{captioning::CaptioningOptions, model::ModelOptions};
use crate::{
    error::Result,
    eval::{
        caption_metrics::{self, Sample, Scores},
        captioning::Settings,
    },
    report,
};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Measure captions against references: BLEU, METEOR, ROUGE-L and CIDEr
#[derive(clap::Args)]
#[command(
    after_help = "Tokens are characters: code points without white space; letters keep their case. Name this convention \
    beside published figures, for others cut captions into words.\n\n\
    The metrics are those of COCO's evaluation (pycocoevalcap). Its `CIDEr` is CIDEr-D; `CIDEr_plain` has neither clipping nor \
    length penalty. METEOR matches equal characters only, which is all that METEOR 1.5 does for Chinese; for Latin words, \
    which it stems, see --meteor-jar. CIDEr weighs by the references of all images: that of few images means little.\n\n\
    REFERENCES look like {\"images\": [{\"id\": 1}], \"annotations\": [{\"image_id\": 1, \"caption\": \"一只猫\"}]}, \
    RESULTS like [{\"image_id\": 1, \"caption\": \"一只猫\"}]. With --json, `per_image` has the scores of each image."
)]
pub struct Args {
    /// JSON file with the references of each image, in COCO's format
    #[arg(long, value_name = "REFERENCES", required_unless_present = "data", requires = "results")]
    references: Option<PathBuf>,
    /// JSON file with one caption for each image, in COCO's format
    #[arg(long, value_name = "RESULTS", requires = "references")]
    results: Option<PathBuf>,
    /// Caption images first: shards or a folder of image-caption pairs, whose captions are the references
    #[arg(long, value_name = "SRC", conflicts_with_all = ["references", "results"])]
    data: Option<String>,
    /// Number of samples of --data to caption, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400, requires = "data", allow_negative_numbers = true)]
    samples: usize,
    /// Random seed of the choice of samples
    #[arg(long, value_name = "N", default_value_t = 0, requires = "data", allow_negative_numbers = true)]
    seed: u64,
    /// Leave out punctuation (Unicode category P), in captions and references
    #[arg(long)]
    drop_punctuation: bool,
    /// Also score with the original METEOR: the path of meteor-1.5.jar, with its folder `data` beside it; needs Java
    #[arg(long, value_name = "FILE")]
    meteor_jar: Option<PathBuf>,
    #[command(flatten)]
    captioning: CaptioningOptions,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let samples = samples(args)?;
    if samples.len() < 2 {
        report::warn("CIDEr of a single image is 0: its weights come from the references of several images");
    }
    let scores = caption_metrics::measure(&samples, args.drop_punctuation, args.meteor_jar.as_deref())?;
    let references: usize = samples.iter().map(|sample| sample.references.len()).sum();
    if json {
        let metrics: Map<String, Value> =
            scores.iter().map(|(name, s)| ((*name).to_owned(), s.corpus.into())).collect();
        report::json(&json!({
            "data": args.data, "references": args.references.as_deref().map(report::path),
            "results": args.results.as_deref().map(report::path), "images": samples.len(), "reference_count": references,
            "tokens": "characters", "drop_punctuation": args.drop_punctuation, "beam": args.captioning.beam,
            "length_penalty": args.captioning.length_penalty(), "metrics": metrics, "per_image": per_image(&samples, &scores),
        }));
        return Ok(());
    }
    let without = if args.drop_punctuation { ", without punctuation" } else { "" };
    report::result(format_args!("{} images, {references} references; tokens are characters{without}", samples.len()));
    let rows = scores.iter().map(|(name, scores)| vec![label(name).to_owned(), format!("{:.4}", scores.corpus)]);
    report::table(&["metric", "score"], &rows.collect::<Vec<_>>());
    Ok(())
}

fn samples(args: &Args) -> Result<Vec<Sample>> {
    if let (Some(references), Some(results)) = (&args.references, &args.results) {
        return caption_metrics::read(references, results);
    }
    let data = args.data.as_deref().unwrap_or_default();
    let (_, models) = args.model.load()?;
    let settings = Settings { data, samples: args.samples, seed: args.seed, decoding: args.captioning.decoding() };
    caption_metrics::caption(&models, &settings)
}

fn label(name: &str) -> &str {
    match name {
        "CIDEr" => "CIDEr (CIDEr-D)",
        "CIDEr_plain" => "CIDEr without clipping and length penalty",
        name => name,
    }
}

fn per_image(samples: &[Sample], scores: &[(&str, Scores)]) -> Vec<Value> {
    let image = |(at, sample): (usize, &Sample)| {
        let mut object = Map::new();
        object.insert("image_id".to_owned(), json!(sample.id));
        object.insert("caption".to_owned(), sample.caption.as_str().into());
        let of_image =
            scores.iter().filter_map(|(name, s)| Some(((*name).to_owned(), Value::from(*s.images.get(at)?))));
        object.extend(of_image);
        Value::Object(object)
    };
    samples.iter().enumerate().map(image).collect()
}
