//! `vilg eval reranking`

use super::{eval_samples::RetrievalOptions, sampling::Options};
use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    eval::{
        reranking::{self, Accuracy},
        retrieval::{DISTANCE, Settings},
    },
    generate::{BestOf, Matching, Ranking},
    report,
};
use serde_json::json;
use std::path::PathBuf;

/// Measure what re-ranking gains: the best of 1, 4, 16.. K candidates by the generator, by a matcher, and by both
#[derive(clap::Args)]
#[command(
    after_help = "A candidate is right if its caption's real image is the nearest, as in `vilg eval retrieval`. For both, \
    the score is the generator's plus the weighted cosine; the weight is fitted on one half of the captions and all \
    figures are those of the other half. Use it as --matcher-weight. `any` counts groups with at least one right \
    candidate: no ranking can do better. Intervals are 95 % bootstrap intervals over captions."
)]
pub struct Args {
    #[command(flatten)]
    data: RetrievalOptions,
    /// Number of candidates to generate for each caption
    #[arg(long, value_name = "K", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1024),
        allow_negative_numbers = true)]
    best_of: u32,
    /// Model folder of the image–text matcher, folder of its training run, or `demo` for the built-in matcher
    #[arg(long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    matcher: String,
    /// Draw accuracy against K as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    sampling: Options,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let common = &args.data.common;
    let (bundle, models) = common.model.load()?;
    let matching = Matching::open(&Bundle::open(&args.matcher)?.matcher_folder()?)?;
    let sampling = args.sampling.over(&bundle.config.sample)?;
    let ranking = Ranking::Both { matching: &matching, weight: 1.0 };
    let settings = Settings {
        data: &common.data,
        pool: args.data.pool.as_deref(),
        samples: common.samples,
        candidates: args.data.candidates as usize,
        sampling,
        best_of: BestOf { count: args.best_of as usize, ranking },
        seed: common.seed,
    };
    let result = reranking::run(&models, &settings)?;
    if let Some(path) = &args.plot {
        result.plot(path)?;
    }
    if json {
        report::json(&json!({ "data": common.data, "result": result, "sampling": sampling, "seed": common.seed }));
        return Ok(());
    }
    report::result(format_args!("top-1 among {} by {DISTANCE}, {} captions", result.candidates, result.prompts));
    report::result(format_args!("fitted on the other half: --matcher-weight {}", result.matcher_weight));
    report::result("| K | own | matcher | both | any |");
    report::result("| --- | --- | --- | --- | --- |");
    let cell = |Accuracy { rate, interval: [low, high] }| {
        format!("{:.1} % ({:.0}–{:.0})", 100.0 * rate, 100.0 * low, 100.0 * high)
    };
    for row in &result.rows {
        let [own, matcher, both, any] = [row.own, row.matcher, row.both, row.any].map(cell);
        report::result(format_args!("| {} | {own} | {matcher} | {both} | {any} |", row.best_of));
    }
    Ok(())
}
