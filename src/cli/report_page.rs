//! `vilg report`

use super::output;
use crate::{
    data::output::write_whole,
    error::{Hint, Result},
    report,
    run_report::{self, Contents, Evaluation, PAGE_START, Run},
};
use serde_json::{Value, json};
use std::{io::Write, path::PathBuf};

/// Write one HTML page about runs and evaluations: curves, samples, configurations, tables
#[derive(clap::Args)]
#[command(
    after_help = "RUN is a run folder (runs/NAME) of a finished or running training; several runs share each plot. EVAL is a \
    file that `vilg eval ... --json` wrote; tables have the paper's figures beside the same metrics.\n\n\
    The page needs no other files, no network and no scripts. Long curves are thinned; the smallest and the largest values \
    stay visible. Where a resumed run repeated a step, the later line counts. Lines that cannot be read are counted."
)]
pub struct Args {
    /// Run folders, and JSON files of evaluations
    #[arg(required = true, value_name = "RUN|EVAL")]
    inputs: Vec<PathBuf>,
    /// HTML file to write; an earlier report is replaced
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
    /// Number of sample images of each run, evenly spaced over its steps; 0: none
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(0..=100),
        allow_negative_numbers = true)]
    samples: u16,
    /// Replace the output file even if it is not a report
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    output::check(&args.output, "-o")?;
    if !args.force {
        let hint = "rename it, choose another file with -o, or replace it with --force";
        output::check_report(&args.output, PAGE_START, hint)?;
    }
    let contents = run_report::read(&args.inputs, args.samples.into())?;
    for run in &contents.runs {
        run.problems.iter().for_each(|problem| report::warn(format_args!("{}: {problem}", run.name)));
    }
    let page = run_report::page(&contents)?;
    let cannot = format!("cannot write {}", args.output.display());
    write_whole(&args.output, |file| Ok(file.write_all(page.as_bytes()).map(|()| true)?))
        .hint(cannot, "choose another file with -o")?;
    if json {
        report::json(&summary(args, &contents, page.len()));
    } else {
        report::result(args.output.display());
    }
    Ok(())
}

/// What the page shows.
fn summary(args: &Args, Contents { runs, evaluations }: &Contents, bytes: usize) -> Value {
    let run = |run: &Run| {
        let metrics = &run.metrics;
        let last: serde_json::Map<String, Value> =
            metrics.curves.iter().filter_map(|(name, curve)| Some((name.clone(), json!(curve.last?.1)))).collect();
        json!({ "path": run.name, "lines": metrics.lines, "last_step": metrics.last_step, "last": last,
            "samples": run.samples.shown.len(), "problems": run.problems })
    };
    let evaluation = |evaluation: &Evaluation| json!({ "path": evaluation.file, "kind": evaluation.kind });
    json!({
        "path": report::path(&args.output), "bytes": bytes, "runs": runs.iter().map(run).collect::<Vec<_>>(),
        "evaluations": evaluations.iter().map(evaluation).collect::<Vec<_>>(),
    })
}
