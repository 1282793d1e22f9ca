//! `vilg train`

use super::{config::Source, plan, summary::Summary};
use crate::{
    bundle::DEMO_NAME,
    config::Config,
    data::remote::{is_remote, shown},
    dist::Ranks,
    error::Result,
    report,
    train::{
        self, Plan, Resume,
        held::held,
        sizes::{Sizes, check_ranks, samples},
    },
};
use serde_json::json;
use std::{num::NonZeroUsize, path::Path, time::Duration};

/// Train what the configuration's `task` says and write the results to runs/NAME
#[derive(clap::Args)]
#[command(
    after_help = "Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and --time-limit finish the current step, write a checkpoint and exit (exit codes 130 and \
    75). The same command resumes from it; the result is bit-equal to an uninterrupted run.\n\n\
    With --json, each step prints its metrics as one line of JSON."
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Where to start: auto (the newest complete checkpoint, if any), never (from the beginning; an error if there are
    /// checkpoints) or the folder of a checkpoint
    #[arg(long, value_name = "auto|never|PATH", default_value = "auto")]
    resume: String,
    /// Number of ranks to run in this process, each with its share of the threads; `train.zero_stage` says what is sharded
    /// over them. If torchrun, srun or mpirun (feature `mpi`) starts several processes, each process is one rank
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::MIN)]
    nproc: NonZeroUsize,
    /// Write a checkpoint and stop (exit code 75) before this time is over: 90s, 45m, 12h or 2d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    time_limit: Option<Duration>,
    /// Print the number of parameters, the tokens per step and the data sources found, without training
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: also print the samples and the memory of each of N ranks; data missing on this machine is a warning
    #[arg(long, value_name = "N", requires = "dry_run", value_parser = clap::value_parser!(u32).range(1..=65536))]
    world_size: Option<u32>,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let config = args.source.load("emoji")?;
    if args.dry_run {
        return match args.world_size {
            Some(ranks) => dry_run_of_ranks(&config, ranks as usize, json),
            None => dry_run(&config, json),
        };
    }
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        path => Resume::From(path.into()),
    };
    let ranks = Ranks::find(args.nproc.get())?;
    train::run(&config, &resume, &ranks, args.time_limit, json)?;
    if json && ranks.leads() {
        let (name, folder) = train::output(&config);
        report::json(&json!({ name: report::path(&folder), "steps": config.train.steps }));
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
    let sizes = Sizes::of(config)?;
    let (summary, plan) = (Summary::new(config, &sizes), train::plan(config, &sizes)?);
    if json {
        report::json(&json!({ "summary": summary, "plan": plan }));
    } else {
        summary.print();
        print(&plan);
    }
    Ok(())
}

/// A dry run of any number of ranks on any machine.
fn dry_run_of_ranks(config: &Config, ranks: usize, json: bool) -> Result<()> {
    let sizes = Sizes::of(config)?;
    check_ranks(sizes.spec, config, ranks)?;
    let summary = Summary::new(config, &sizes);
    let (plan, missing) = train::plan_without(config, &sizes)?;
    let (remote, missing): (Vec<_>, Vec<_>) = missing.into_iter().partition(|path| is_remote(path));
    remote
        .iter()
        .for_each(|url| report::warn(format_args!("data.sources: `{}` is remote and not opened here", shown(url))));
    let mut absent: Vec<String> = missing.iter().map(|path| format!("data.sources: `{path}`")).collect();
    let required = sizes.spec.files(config).into_iter().filter(|file| file.required);
    let missing_files = required.filter(|file| file.path != DEMO_NAME && !Path::new(file.path).exists());
    absent.extend(missing_files.map(|file| format!("{}: `{}`", file.key, file.path)));
    absent.iter().for_each(|what| report::warn(format_args!("{what} is not there")));
    let (shares, stage) = (sizes.shares(config, ranks), config.train.zero_stage);
    let held = held(config, &sizes, &shares, stage);
    let batches = batches(&sizes, config, ranks);
    if json {
        let rank = plan::held_json(stage, &held, None);
        let batches: Vec<_> = batches
            .iter()
            .map(|(direction, least, most)| json!({ "batch": direction, "least": least, "most": most }))
            .collect();
        report::json(&json!({
            "summary": summary, "plan": plan, "not_there": absent,
            "ranks": {
                "world_size": ranks, "samples_a_micro_step": batches, "smallest": shares.smallest,
                "largest": shares.largest, "held": rank,
            },
        }));
        return Ok(());
    }
    summary.print();
    print(&plan);
    missing.iter().for_each(|path| report::result(format_args!("  {path}: not there")));
    report::result("");
    plan::print_shares(&shares);
    for (batch, least, most) in batches {
        let samples = if least == most { least.to_string() } else { format!("{least} to {most}") };
        report::result(format_args!("  samples a rank and micro-step: {samples} of {batch}"));
    }
    report::result(format_args!("\nGB a rank on processors at train.zero_stage = {stage}, the fullest one's:"));
    plan::print_held(&[plan::held_row(format!("  {stage}"), &held, None)]);
    Ok(())
}

/// The smallest and the largest micro-batch of any rank, of each kind of batch.
fn batches(sizes: &Sizes, config: &Config, ranks: usize) -> Vec<(&'static str, usize, usize)> {
    let used = sizes.spec.batch_sizes(&config.train).into_iter().filter(|(_, size)| *size > 0);
    used.map(|(key, size)| {
        let (least, most) = samples(size, ranks, config.train.accumulation);
        (key, least, most)
    })
    .collect()
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
    let epochs = plan.epochs.map_or("unknown epochs".into(), |epochs| format!("{epochs:.1} epochs"));
    report::result(format_args!(
        "\nplan: {} steps of {} samples and at most {} predicted tokens; {epochs}",
        plan.steps, plan.samples_a_step, plan.tokens_a_step
    ));
}
