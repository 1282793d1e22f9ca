//! `vilg train`

use super::{config::Source, summary::Summary};
use crate::{
    config::Config,
    dist::Ranks,
    error::{Result, ensure, usage},
    report,
    train::{self, Plan, Resume},
};
use serde_json::json;
use std::{num::NonZeroUsize, time::Duration};

/// Train what the configuration's `task` says; the results lie in runs/NAME
#[derive(clap::Args)]
#[command(
    after_help = "Ctrl-C, SIGTERM, SIGUSR1 and --time-limit finish the step, write a checkpoint and leave (exit codes 130 and \
    75); the same command goes on from there with the same bits as if nothing had happened."
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// auto: from the newest whole checkpoint; never: only from the beginning; or a checkpoint's folder
    #[arg(long, value_name = "auto|never|PATH", default_value = "auto")]
    resume: String,
    /// Ranks that train together in this process, each on its share of the threads; `train.shard_stage` says what they split.
    /// Where mpirun or srun starts several processes (feature `mpi`), each is a rank
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::MIN)]
    nproc: NonZeroUsize,
    /// Stop with a checkpoint (exit code 75) before so much time is over: 90s, 45m, 12h or 2d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    time_limit: Option<Duration>,
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
    let ranks = Ranks::find(args.nproc.get())?;
    train::run(&config, &resume, &ranks, args.time_limit)?;
    if json && ranks.leads() {
        report::json(&json!({ "model": train::model_folder(&config), "steps": config.train.steps }));
    }
    Ok(())
}

/// A number and its unit.
fn duration(text: &str) -> Result<Duration, String> {
    let wanted = || format!("`{text}` is no time: 90s, 45m, 12h or 2d");
    let unit = text.chars().last().ok_or_else(wanted)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(wanted()),
    };
    let number: u32 = text[..text.len() - 1].parse().map_err(|_| wanted())?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
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
