//! `vilg eval t2i`

use super::{features::FeatureOptions, model::ModelOptions, prompts, ranking::RankingOptions, sampling::Options};
use crate::{
    bundle::Bundle,
    dist::{Group, Ranks},
    error::Result,
    eval::{
        self,
        t2i::{Evaluation, Mean, Scores, Settings, choose_prompts},
    },
    generate::Matching,
    report,
};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a rank waits for the others, which may have more images left.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Measure text-to-image as the paper does: FID and CLIP score of images of many prompts, each the best of several
#[derive(clap::Args)]
#[command(
    after_help = "The images are written to DIR/images with their captions, so that other commands can read them. Run the \
    same command again to resume. Under torchrun, mpirun or srun, the ranks share the prompts. The paper: --samples 30000 \
    on COCO, --best-of 60 (10 for a fine-tuned model), --protocol dm-gan.\n\n\
    The CLIP score is 100 times the mean cosine of image and caption by --matcher, negative ones counted as 0. A matcher \
    that ranks the candidates also scores the images, which makes its score higher than that of another matcher."
)]
pub struct Args {
    /// Prompts: a text file with one on each line, captions in COCO's format (.json), or shards or a folder of samples
    #[arg(long, value_name = "SRC")]
    prompts: String,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Real images to compare with: shards, a folder of images, or with --inception statistics of `vilg eval fid
    /// --save-stats` (.npz) [default: no distance is measured]
    #[arg(long, value_name = "SRC")]
    real: Option<String>,
    /// Number of prompts, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 30_000, allow_negative_numbers = true)]
    samples: usize,
    /// Random seed of the choice of prompts and of the sampling
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    #[command(flatten)]
    features: FeatureOptions,
    #[command(flatten)]
    ranking: RankingOptions,
    #[command(flatten)]
    sampling: Options,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let chosen = choose_prompts(&read_prompts(&args.prompts)?, args.samples, args.seed);
    Ranks::find(1)?.run(PATIENCE, |group| run_rank(args, chosen.clone(), group, json))
}

/// What each rank does: its share of the images; the first rank also measures all.
fn run_rank(args: &Args, (prompts, digest): (Vec<String>, String), group: &Group, json: bool) -> Result<()> {
    let matcher = Bundle::open(args.ranking.matcher_name())?.matcher_folder()?;
    let (matching, ranker) = (Matching::open(&matcher)?, args.ranking.load()?);
    let features = args.features.load(args.ranking.matcher_name())?;
    args.real.as_ref().map_or(Ok(()), |real| features.check(real))?;
    let (bundle, models) = args.model.load()?;
    let settings = Settings {
        prompts: digest,
        samples: prompts.len(),
        seed: args.seed,
        model: args.model.digest(&bundle)?,
        sampling: args.sampling.over(&bundle.config.sample)?,
        best_of: ranker.best_of().count,
        rank: ranker.description(),
        features: features.name(),
        matcher: matcher.matcher_digest()?,
    };
    let evaluation = Evaluation {
        settings,
        prompts,
        models: &models,
        best_of: ranker.best_of(),
        features: &features,
        matching: &matching,
    };
    let estimate = |seconds: f64| {
        if group.leads() {
            report::note(format_args!("the images will take about {} more", duration(seconds)));
        }
    };
    evaluation.generate(&args.output, group, estimate)?;
    if group.leads() {
        let scores = evaluation.score(&args.output, args.real.as_deref())?;
        print(args, &evaluation.settings, &scores, json);
    }
    group.barrier()
}

/// All prompts of a source.
fn read_prompts(source: &str) -> Result<Vec<String>> {
    let path = Path::new(source);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_lowercase();
    match extension.as_str() {
        "json" => eval::caption_metrics::captions(path),
        "txt" => prompts::collect(&[], Some(path)),
        _ => eval::captions(source),
    }
}

/// `3 h 25 min`, `12 min` or `40 s`.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h {:.0} min", (s / 3600.0).floor(), s % 3600.0 / 60.0),
    }
}

fn print(args: &Args, settings: &Settings, scores: &Scores, json: bool) {
    if json {
        report::json(&json!({ "prompts": args.prompts, "real": args.real, "settings": settings, "scores": scores }));
        return;
    }
    let Scores { images, distance, cosine, clip_score } = scores;
    report::result(format_args!("{images} images, best of {} ({})", settings.best_of, settings.rank));
    if let Some(distance) = distance {
        report::result(format_args!("distance  {distance:.4}  ({})", settings.features));
    }
    for (name, Mean { mean, interval: [low, high] }) in [("cosine", cosine), ("CLIP score", clip_score)] {
        report::result(format_args!("{name}  {mean:.4}  95 % interval {low:.4} to {high:.4}"));
    }
}
