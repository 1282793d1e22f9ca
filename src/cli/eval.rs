//! `vilg eval`

use super::{
    captioning::CaptioningOptions,
    eval_samples::{RetrievalOptions, SampleOptions},
    ranking::RankingOptions,
    sampling::Options,
};
use crate::{
    error::Result,
    eval::{captioning::Settings, naming, retrieval},
    report,
};
use clap::Subcommand;
use serde_json::json;

/// Measure the quality of a model
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Retrieval(RetrievalArgs),
    Reranking(super::eval_reranking::Args),
    Fid(super::eval_fid::Args),
    Caption(super::eval_caption::Args),
    Naming(NamingArgs),
    Recon(super::eval_recon::Args),
    Matcher(super::eval_matcher::Args),
    Ablation(super::eval_ablation::Args),
    T2i(super::eval_t2i::Args),
    Faithfulness(super::eval_faithfulness::Args),
    Vqa(super::eval_vqa::Args),
    Human(super::eval_human::Args),
}

/// Measure text-to-image: generate images from captions and look up each caption's real image among others of its style
#[derive(clap::Args)]
#[command(
    after_help = "The other images have the same `style` in their JSON and are chosen by --seed. The nearest image has the \
    smallest mean squared RGB difference after box-filtering both to 16×16; ties count against the model. Upper bound: \
    real images after a tokenizer round trip. Intervals are 95 % Wilson intervals."
)]
struct RetrievalArgs {
    #[command(flatten)]
    data: RetrievalOptions,
    #[command(flatten)]
    ranking: RankingOptions,
    #[command(flatten)]
    sampling: Options,
}

/// Measure image-to-text: the share of captions that contain the `name_zh` of the image's JSON
#[derive(clap::Args)]
#[command(after_help = "Case and spaces are ignored. Intervals are 95 % Wilson intervals.")]
struct NamingArgs {
    #[command(flatten)]
    common: SampleOptions,
    #[command(flatten)]
    captioning: CaptioningOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Retrieval(args) => run_retrieval(&args, json),
        Command::Reranking(args) => super::eval_reranking::run(&args, json),
        Command::Fid(args) => super::eval_fid::run(&args, json),
        Command::Caption(args) => super::eval_caption::run(&args, json),
        Command::Naming(args) => run_naming(&args, json),
        Command::Recon(args) => super::eval_recon::run(&args, json),
        Command::Matcher(args) => super::eval_matcher::run(&args, json),
        Command::Ablation(args) => super::eval_ablation::run(&args, json),
        Command::Faithfulness(args) => super::eval_faithfulness::run(&args, json),
        Command::T2i(args) => super::eval_t2i::run(&args, json),
        Command::Vqa(args) => super::eval_vqa::run(&args, json),
        Command::Human(args) => super::eval_human::run(&args, json),
    }
}

fn run_retrieval(args: &RetrievalArgs, json: bool) -> Result<()> {
    let common = &args.data.common;
    let (bundle, models) = common.model.load()?;
    let ranker = args.ranking.load()?;
    let sampling = args.sampling.over(&bundle.config.sample)?;
    let settings = retrieval::Settings {
        data: &common.data,
        pool: args.data.pool.as_deref(),
        samples: common.samples,
        candidates: args.data.candidates as usize,
        sampling,
        best_of: ranker.best_of(),
        seed: common.seed,
    };
    let result = retrieval::run(&models, &settings)?;
    if json {
        let mut drawn = json!(sampling);
        drawn["best_of"] = json!(args.ranking.best_of);
        drawn["rank"] = json!(ranker.name());
        drawn["seed"] = json!(common.seed);
        report::json(&json!({ "data": common.data, "result": result, "sampling": drawn }));
        return Ok(());
    }
    report::result(format_args!("nearest of {} by {}", result.candidates, result.distance));
    report::result(format_args!("top-1  {}  chance {:.1} %", result.top1, 100.0 * result.chance_top1));
    report::result(format_args!("top-5  {}  chance {:.1} %", result.top5, 100.0 * result.chance_top5));
    let (one, five) = (result.reconstructed_top1, result.reconstructed_top5);
    report::result(format_args!("upper bound (real images after a tokenizer round trip): top-1  {one}, top-5  {five}"));
    Ok(())
}

fn run_naming(args: &NamingArgs, json: bool) -> Result<()> {
    let SampleOptions { data, samples, seed, model } = &args.common;
    let (_, models) = model.load()?;
    let settings = Settings { data, samples: *samples, seed: *seed, decoding: args.captioning.decoding() };
    let accuracy = naming::run(&models, &settings)?;
    if json {
        report::json(&json!({ "data": data, "accuracy": accuracy, "beam": args.captioning.beam,
            "length_penalty": args.captioning.length_penalty(), "seed": seed }));
    } else {
        report::result(format_args!("the caption contains the name  {accuracy}"));
    }
    Ok(())
}
