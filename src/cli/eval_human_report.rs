//! `vilg eval human report`

use super::output;
use crate::{
    error::{Hint, Result},
    eval::human::{
        statistics::Mean,
        study::Study,
        summary::{self, Aspect, Summary},
    },
    report,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Columns of the raw ratings.
const COLUMNS: [&str; 8] = ["rater", "item", "aspect", "prompt", "system", "question", "value", "time"];

/// Report the ratings of a study: means, agreement, pass rates, aspects and differences, as Markdown tables
#[derive(clap::Args)]
#[command(
    after_help = "Means are over items, each item by the mean of its ratings. Intervals are 95 % t-intervals over items: they \
    say how sure a mean is for other prompts or images, not for other raters. Agreement is Krippendorff's alpha with the ordinal \
    metric: 1 is perfect, 0 that of chance. The pass rate is the share of ratings that took an answer for a person's; \
    `majority` counts answers that more than half of their raters took for one, with a Wilson interval.\n\n\
    A study need not be finished, and may be served meanwhile."
)]
pub struct Args {
    /// Study file
    #[arg(value_name = "STUDY")]
    study: PathBuf,
    /// CSV file to write: the raw ratings, one on each line
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let study = Study::open(&args.study)?;
    let summary = summary::summarize(&study)?;
    if let Some(file) = &args.csv {
        write_csv(file, &study)?;
    }
    if json {
        let mut object = json!({ "study": report::path(&args.study) });
        if let (Value::Object(object), Value::Object(summary)) = (&mut object, json!(summary)) {
            object.extend(summary);
        }
        report::json(&object);
    } else {
        print(&summary);
    }
    if summary.raters.iter().any(|rater| rater.rated < rater.pages) {
        report::note("the study is not finished; the figures are those of the ratings so far");
    }
    Ok(())
}

fn write_csv(file: &Path, study: &Study) -> Result<()> {
    output::check(file, "--csv")?;
    output::check_report(file, &COLUMNS.join(","), "rename it, or name another file with --csv")?;
    let (items, outputs) = (study.items()?, study.outputs()?);
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(COLUMNS)?;
    for rating in study.ratings()? {
        let Some(output) = outputs.get(&rating.output) else { continue };
        let Some(item) = items.get(&output.item) else { continue };
        let system = study.systems.get(usize::try_from(output.system - 1)?).map_or("", |system| &system.name);
        let (rater, value, at) = (rating.rater.to_string(), rating.value.to_string(), rating.at.to_string());
        csv.write_record([&rater, &item.key, &item.aspect, &item.prompt, system, &rating.question, &value, &at])?;
    }
    let message = || format!("cannot write {}", file.display());
    let bytes = csv.into_inner().hint(message(), "try again")?;
    std::fs::write(file, bytes).hint(message(), "choose another file with --csv")
}

fn print(summary: &Summary) {
    let Summary { title, items, systems, ratings, .. } = summary;
    report::result(format_args!("# {title}\n"));
    report::result(format_args!(
        "{items} items, {} systems, {ratings} ratings. Intervals: {}.\n",
        systems.len(),
        summary.intervals
    ));
    let rows =
        summary.raters.iter().map(|rater| vec![rater.rater.to_string(), format!("{} of {}", rater.rated, rater.pages)]);
    markdown(&["rater", "rated pages"], rows.collect());
    print_means(summary);
    if !summary.pass_rates.is_empty() {
        let rows = summary.pass_rates.iter().map(|rate| {
            let share = Mean {
                mean: 100.0 * rate.share.mean,
                interval: rate.share.interval.map(|b| b.map(|x| 100.0 * x)),
                ..rate.share
            };
            vec![rate.system.clone(), format!("{:.1} %", share.mean), interval(&share, 1), rate.majority.to_string()]
        });
        report::result("## Taken for a person's\n");
        markdown(&["system", "pass rate", "interval", "majority"], rows.collect());
    }
    if !summary.aspects.is_empty() {
        report::result("## By aspect\n");
        print_aspects(summary);
    }
    if !summary.differences.is_empty() {
        let rows = summary.differences.iter().map(|one| {
            let (pair, counts) =
                (format!("{} - {}", one.a, one.b), format!("{} / {} / {}", one.wins, one.ties, one.losses));
            vec![
                pair,
                one.question.to_owned(),
                format!("{:+.3}", one.mean.mean),
                interval(&one.mean, 3),
                one.mean.items.to_string(),
                counts,
            ]
        });
        report::result("## Paired differences\n");
        markdown(&["systems", "question", "difference", "interval", "items", "better / equal / worse"], rows.collect());
    }
}

fn print_means(summary: &Summary) {
    report::result("## Means\n");
    let mut rows = Vec::new();
    for question in &summary.questions {
        let [low, high] = question.scale;
        let name = format!("{} ({low} to {high})", question.question);
        let alpha = question.alpha.map_or("-".to_owned(), |alpha| format!("{alpha:.3}"));
        for one in &question.systems {
            let mean = &one.mean;
            let cells = [name.clone(), one.system.clone(), format!("{:.3}", mean.mean), interval(mean, 3)];
            rows.push(cells.into_iter().chain([mean.items.to_string(), alpha.clone()]).collect());
        }
    }
    for one in &summary.overall {
        let mean = &one.mean;
        let cells = ["mean of all".to_owned(), one.system.clone(), format!("{:.3}", mean.mean), interval(mean, 3)];
        rows.push(cells.into_iter().chain([mean.items.to_string(), "-".to_owned()]).collect());
    }
    markdown(&["question", "system", "mean", "interval", "items", "alpha"], rows);
}

/// One line for each aspect and system, one column for each question.
fn print_aspects(summary: &Summary) {
    let questions = summary.questions.iter().map(|question| question.question);
    let header: Vec<&str> = ["aspect", "items", "system"].into_iter().chain(questions).collect();
    let row = |aspect: &Aspect, system: &String| {
        let cell = |question: &summary::AspectQuestion| {
            let found = question.systems.iter().find(|one| one.system == *system);
            found.map_or("-".to_owned(), |one| format!("{:.3}", one.mean.mean))
        };
        let names = [aspect.aspect.clone(), aspect.items.to_string(), system.clone()];
        names.into_iter().chain(aspect.questions.iter().map(cell)).collect()
    };
    let rows = summary.aspects.iter().flat_map(|aspect| summary.systems.iter().map(move |system| row(aspect, system)));
    markdown(&header, rows.collect());
}

fn interval(mean: &Mean, digits: usize) -> String {
    mean.interval.map_or("-".to_owned(), |[low, high]| format!("{low:.digits$} to {high:.digits$}"))
}

/// Prints a Markdown table whose columns are aligned.
fn markdown(header: &[&str], rows: Vec<Vec<String>>) {
    let line = |cells: Vec<String>| -> Vec<String> {
        let cells = cells.into_iter().map(|cell| format!("| {}", cell.replace('|', "\\|").replace('\n', " ")));
        cells.chain(["|".to_owned()]).collect()
    };
    let rule = vec!["---".to_owned(); header.len()];
    let header = header.iter().map(ToString::to_string).collect();
    let lines: Vec<Vec<String>> = [header, rule].into_iter().chain(rows).map(line).collect();
    report::table(&[], &lines);
    report::result("");
}
