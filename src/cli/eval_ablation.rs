//! `vilg eval ablation`

use super::{features::FeatureOptions, sampling::Options};
use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    eval::ablation::{self, Codes, Distances, Settings},
    generate::Reconstructor,
    report,
};
use serde_json::json;
use std::path::PathBuf;

/// Compare end-to-end with two-stage training: both generators, and the codes of real images, through both reconstructors
#[derive(clap::Args)]
#[command(
    after_help = "Table 7 of the paper: the Fréchet distance between real images and images of the same captions. The \
    features are Inception's with --inception (the distance is then the FID), else a matcher's. Codes of the two-stage \
    generator are also read by the end-to-end generator, whose reconstructor works on its hidden states. Run the same \
    command again to resume. Intervals are 95 % bootstrap intervals over images; the training seeds are pairs of models."
)]
pub struct Args {
    /// Model folders of two-stage generators, one for each training seed
    #[arg(long, value_name = "DIR", required = true, num_args = 1..)]
    two_stage: Vec<String>,
    /// Model folders of the end-to-end generators, in the same order
    #[arg(long, value_name = "DIR", required = true, num_args = 1..)]
    end_to_end: Vec<String>,
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of image-caption pairs
    #[arg(long, value_name = "SRC")]
    data: String,
    /// Folder to write: features, and a sheet of the first 12 prompts
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Number of captions, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 1000, allow_negative_numbers = true)]
    samples: usize,
    /// Random seed of the choice of captions and of the sampling
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Number of bootstrap draws; 0: no intervals. With --inception each takes minutes
    #[arg(long, value_name = "N", default_value_t = 200, allow_negative_numbers = true)]
    bootstrap: usize,
    #[command(flatten)]
    features: FeatureOptions,
    /// Model folder of the matcher whose image embeddings are compared, or `demo` for the built-in one
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME, conflicts_with = "inception")]
    matcher: String,
    #[command(flatten)]
    sampling: Options,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let features = args.features.load(&args.matcher)?;
    let defaults = match args.two_stage.first() {
        Some(model) => Bundle::open(model)?.config.sample,
        None => Default::default(),
    };
    let settings = Settings {
        two_stage: args.two_stage.clone(),
        end_to_end: args.end_to_end.clone(),
        data: args.data.clone(),
        samples: args.samples,
        seed: args.seed,
        features: features.name(),
        sampling: args.sampling.over(&defaults)?,
    };
    let table = ablation::run(&settings, &features, args.bootstrap, &args.output)?;
    if json {
        report::json(&json!({ "settings": settings, "rows": table }));
    } else {
        report::result("| codes | reconstructor | distance | against two-stage |");
        report::result("| --- | --- | --- | --- |");
        table.iter().for_each(|row| report::result(line(row)));
    }
    Ok(())
}

/// A row in Markdown.
fn line(measured: &Distances) -> String {
    let codes = match measured.row.codes {
        Codes::TwoStage => "two-stage generator",
        Codes::EndToEnd => "end-to-end generator",
        Codes::Gold => "real images",
    };
    let reconstructor = match measured.row.reconstructor {
        Reconstructor::TwoStage => "two-stage",
        Reconstructor::EndToEnd => "end-to-end",
    };
    let bounds = |interval: Option<[f64; 2]>| interval.map_or(String::new(), |[a, b]| format!(" ({a:.4} to {b:.4})"));
    let distance = format!("{:.4}{}", measured.mean, bounds(measured.interval));
    let difference =
        match measured.row.codes != Codes::EndToEnd && measured.row.reconstructor == Reconstructor::TwoStage {
            true => "-".to_owned(),
            false => format!("{:+.4}{}", measured.difference, bounds(measured.difference_interval)),
        };
    format!("| {codes} | {reconstructor} | {distance} | {difference} |")
}
