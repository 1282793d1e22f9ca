//! `vilg train`

use super::{config::Source, summary::Summary};
use crate::{
    config::Config,
    error::{Result, ensure, usage},
    report,
    train::{self, Plan, Resume},
};
use serde_json::json;
use std::num::NonZeroUsize;

/// Train what the configuration's `task` says; the results lie in runs/NAME
#[derive(clap::Args)]
#[command(
    after_help = "Ctrl-C, SIGTERM and SIGUSR1 finish the step, write a checkpoint and leave (exit codes 130 and \
    75); the same command goes on from there with the same bits as if nothing had happened."
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// auto: from the newest whole checkpoint; never: only from the beginning; or a checkpoint's folder
    #[arg(long, value_name = "auto|never|PATH", default_value = "auto")]
    resume: String,
    /// Ranks that train together on this machine, each on its share of the threads; `train.shard_stage` says what they split
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::MIN)]
    nproc: NonZeroUsize,
    /// Print parameters, tokens a step and the sources found, and train nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let hint = "`vilg config init emoji -o emoji.toml` writes one to start from";
    ensure!(args.source.config.is_some() || !args.source.sets.is_empty(), usage("--config is missing", hint));
    let config = Config::load(args.source.config.as_deref(), &args.source.sets)?;
    if args.dry_run {
        return dry_run(&config, json);
    }
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        path => Resume::From(path.into()),
    };
    train::run(&config, &resume, args.nproc.get())?;
    if json {
        report::json(&json!({ "model": train::model_folder(&config), "steps": config.train.steps }));
    }
    Ok(())
}

fn dry_run(config: &Config, json: bool) -> Result<()> {
    let summary = Summary::new(config)?;
    let plan = train::plan(config)?;
    if json {
        report::json(&json!({ "summary": summary, "plan": plan }));
    } else {
        summary.print();
        print(&plan);
    }
    Ok(())
}

fn print(plan: &Plan) {
    report::result("\ndata:");
    let header = ["  source", "shards", "samples", "weight"];
    let rows: Vec<Vec<String>> = plan
        .sources
        .iter()
        .map(|s| vec![format!("  {}", s.path), s.shards.to_string(), s.samples.to_string(), s.weight.to_string()])
        .collect();
    report::table(&header, &rows);
    report::result(format_args!(
        "\nplan: {} steps of {} samples and at most {} predicted tokens; {:.1} epochs",
        plan.steps, plan.samples_a_step, plan.tokens_a_step, plan.epochs
    ));
}
