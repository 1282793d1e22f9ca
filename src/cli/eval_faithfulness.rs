//! `vilg eval faithfulness`

use super::{eval_samples::SampleOptions, ranking::RankingOptions, sampling::Options, vqa::warn_untrained};
use crate::{
    bundle::Bundle,
    error::Result,
    eval::faithfulness::{Settings, run as measure},
    generate::Models,
    ops::packed::Format,
    report,
};
use serde_json::json;

/// Measure how faithful generated images are to their captions: a VQA model answers questions about them (TIFA)
#[derive(clap::Args)]
#[command(
    after_help = "For each caption an image is generated, and the VQA model is asked those `questions` of the sample's JSON whose \
    answer the caption contains. The same questions about the real images show how far it can be trusted. Intervals are \
    95 % Wilson intervals."
)]
pub struct Args {
    #[command(flatten)]
    samples: SampleOptions,
    /// Model folder of the VQA model, or folder of its training run: a model that has learnt to answer questions
    #[arg(long, value_name = "DIR")]
    vqa: String,
    #[command(flatten)]
    ranking: RankingOptions,
    #[command(flatten)]
    sampling: Options,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let SampleOptions { data, samples, seed, model } = &args.samples;
    let (bundle, models) = model.load()?;
    let vqa = Bundle::open(&args.vqa)?;
    warn_untrained(&vqa);
    let vqa = Models::load(&vqa, Format::Bf16)?;
    let ranker = args.ranking.load()?;
    let sampling = args.sampling.over(&bundle.config.sample)?;
    let settings = Settings { data, samples: *samples, sampling, best_of: ranker.best_of(), seed: *seed };
    let found = measure(&models, &vqa, &settings)?;
    if json {
        report::json(&json!({ "data": data, "faithfulness": found, "vqa": args.vqa, "sampling": sampling,
            "best_of": args.ranking.best_of, "rank": ranker.name(), "seed": seed }));
        return Ok(());
    }
    report::result(format_args!("right answers about generated images  {}", found.generated.all));
    report::result(format_args!("about the real images                 {}", found.real.all));
    for ((kind, generated), real) in found.generated.types.iter().zip(found.real.types.values()) {
        report::result(format_args!("{kind}  {generated}  real {real}"));
    }
    Ok(())
}
