//! `vilg eval`

use super::{model::ModelOptions, sampling::Options};
use crate::{
    error::Result,
    eval::{self, Rate, retrieval},
    generate::{Decoding, Sampling},
    report,
};
use clap::Subcommand;
use serde_json::json;

/// Measure how well a model paints and describes
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Retrieval(RetrievalArgs),
    Caption(CaptionArgs),
    Recon(super::eval_recon::Args),
}

/// Paint captions, and look for each one's own picture among others of its style
#[derive(clap::Args)]
#[command(
    after_help = "The others are pictures with the same `style` in their JSON, a choice keyed by the seed. The nearest \
    has the least mean squared RGB difference after box-filtering both pictures to 16×16; ties count against the \
    model. What the picture itself reaches after the image tokenizer is about the most that painting can. Intervals \
    are Wilson's, 95 %."
)]
struct RetrievalArgs {
    #[command(flatten)]
    common: Common,
    /// More pictures, for styles of which the data has too few
    #[arg(long, value_name = "SRC")]
    pool: Option<String>,
    /// Pictures to choose from, its own included
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    candidates: u32,
    /// Paint so many candidates for each caption and keep the one that fits it best
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    best_of: u32,
    #[command(flatten)]
    sampling: Options,
}

/// Describe pictures, and count the captions that contain the `name_zh` of the picture's JSON
#[derive(clap::Args)]
#[command(after_help = "Case and spaces do not count. Intervals are Wilson's, 95 %.")]
struct CaptionArgs {
    #[command(flatten)]
    common: Common,
    /// Search with a beam of this width [default: the likeliest token each time]
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=64))]
    beam: Option<u32>,
}

#[derive(clap::Args)]
struct Common {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), a folder of shards, or a folder of pairs
    #[arg(long, value_name = "SRC")]
    data: String,
    /// Pairs to try, a choice keyed by the seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 400)]
    samples: usize,
    /// Seed of the choice of pairs and of the sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Retrieval(args) => run_retrieval(&args, json),
        Command::Caption(args) => run_caption(&args, json),
        Command::Recon(args) => super::eval_recon::run(&args, json),
    }
}

fn run_retrieval(args: &RetrievalArgs, json: bool) -> Result<()> {
    let common = &args.common;
    let (bundle, models) = common.model.load()?;
    let sampling = args.sampling.over(&bundle.config.sample);
    let settings = retrieval::Settings {
        data: &common.data,
        pool: args.pool.as_deref(),
        samples: common.samples,
        candidates: args.candidates as usize,
        sampling,
        best_of: args.best_of as usize,
        seed: common.seed,
    };
    let result = retrieval::run(&models, &settings)?;
    if json {
        let Sampling { temperature, top_k, top_p, guidance } = sampling;
        let drawn = json!({ "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance,
            "best_of": args.best_of, "seed": common.seed });
        report::json(&json!({ "data": common.data, "result": result, "sampling": drawn }));
        return Ok(());
    }
    report::result(format_args!("nearest of {} by {}", result.candidates, result.distance));
    report::result(format_args!("top-1  {}  chance {:.1} %", line(&result.top1), 100.0 * result.chance_top1));
    report::result(format_args!("top-5  {}  chance {:.1} %", line(&result.top5), 100.0 * result.chance_top5));
    let (one, five) = (line(&result.reconstructed_top1), line(&result.reconstructed_top5));
    report::result(format_args!("the pictures themselves, through the image tokenizer: top-1  {one}, top-5  {five}"));
    Ok(())
}

fn run_caption(args: &CaptionArgs, json: bool) -> Result<()> {
    let common = &args.common;
    let (_, models) = common.model.load()?;
    let decoding = match args.beam {
        Some(width) => Decoding::Beam { width: width as usize },
        None => Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 },
    };
    let accuracy = eval::caption::run(&models, &common.data, common.samples, &decoding, common.seed)?;
    if json {
        report::json(&json!({ "data": common.data, "accuracy": accuracy, "beam": args.beam, "seed": common.seed }));
    } else {
        report::result(format_args!("the caption contains the name  {}", line(&accuracy)));
    }
    Ok(())
}

/// `23.0 % (92 of 400, 95 % interval 19.1 to 27.4 %)`
fn line(rate: &Rate) -> String {
    let Rate { hits, of, rate, interval: [low, high] } = rate;
    let percent = |share: f64| share * 100.0;
    format!("{:.1} % ({hits} of {of}, 95 % interval {:.1} to {:.1} %)", percent(*rate), percent(*low), percent(*high))
}
