//! `vilg data translate`

use super::{cache::CacheOptions, output};
use crate::{
    data::{
        filter::input,
        translate::{Address, Outcome, Settings, Translation, Translator},
    },
    dist,
    error::{Hint, Result, ensure, failed},
    report,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// How `translate.json` begins.
const REPORT_START: &str = "{\n  \"rows\":";

/// Translate captions by a command or an HTTP service of your choice
#[derive(clap::Args)]
#[command(after_help = "The translator gets JSON lines {\"id\":7,\"text\":\"a cat\"} and answers each with a line \
    {\"id\":7,\"text\":\"一只猫\"} or {\"id\":7,\"error\":\"why\"}, in any order. Run the same command again to resume. \
    Under torchrun, mpirun or srun, the ranks share the inputs. The exit code is 1 if no caption has a translation.")]
#[command(group = clap::ArgGroup::new("translator").required(true).args(["command", "url"]))]
pub struct Args {
    /// Tar shards, folders or tables, as for `vilg data filter`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Folder to write to; for one table, also a file with the table's extension
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Program with its arguments, started once per worker: JSON lines on its stdin and from its stdout
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
    /// HTTP service: JSON lines in the body of a POST and of its answer
    #[arg(long, value_name = "http://HOST:PORT/PATH")]
    url: Option<String>,
    /// Number of texts sent at once
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Number of programs, or of requests at the same time
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Further attempts after a failure, with pauses that double from 0.2 s up to 30 s
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    retries: u32,
    /// Seconds that an answer may take: of a program from one answer to the next, of a service for a whole request
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Keep rows whose caption cannot be translated, with that caption; otherwise they are left out
    #[arg(long)]
    keep_untranslated: bool,
    /// File of known translations, as JSON lines; default: `.translate/cache.jsonl` in the output folder
    #[arg(long, value_name = "FILE")]
    cache: Option<PathBuf>,
    /// Column of a table that holds the caption
    #[arg(long, default_value = "caption", value_name = "NAME")]
    caption_column: String,
    /// New column or JSON field for the caption before its translation
    #[arg(long, default_value = "caption_original", value_name = "NAME")]
    original_column: String,
    #[command(flatten)]
    shards: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let inputs = input::find(&args.sources, &args.shards.data())?;
    let is_file = input::is_file_output(&inputs, &args.output)?;
    let address = match (args.command, args.url) {
        (Some(command), _) => Address::Command(command),
        (None, url) => Address::Url(url.unwrap_or_default()),
    };
    let timeout = Duration::from_secs(args.timeout);
    let translators = (0..args.workers).map(|_| Translator::new(&address, args.retries, timeout));
    let mut translators = translators.collect::<Result<Vec<_>>>()?;
    let place = dist::place()?;
    let (rank, world_size) = place.map_or((0, 1), |place| (place.rank, place.world_size));
    let settings = Settings {
        caption_column: args.caption_column,
        original_column: args.original_column,
        keep_untranslated: args.keep_untranslated,
        batch: args.batch as usize,
    };
    let translation =
        Translation { settings, inputs, output: args.output, is_file, cache: args.cache, rank, world_size };
    let path = report_file(&translation);
    output::check_report(&path, REPORT_START, "rename it, or choose another output with -o")?;
    let bar = report::counter("rows");
    let outcome = translation.run(&mut translators, &|rows| bar.inc(rows))?;
    bar.finish_and_clear();
    fs::write(&path, serde_json::to_string_pretty(&outcome)?)
        .hint(format_args!("cannot write {}", path.display()), "choose another output with -o")?;
    if json {
        report::json(&outcome);
    } else {
        print(&outcome);
    }
    let none = outcome.inputs > 0 && outcome.report.translated == 0;
    let hint = "the causes are above; for a table, name the column of the captions with --caption-column";
    ensure!(!none, failed("no caption was translated", hint));
    Ok(())
}

/// `translate.json` in the output folder, or `NAME.translate.json` beside an output file; other ranks add their number.
fn report_file(translation: &Translation) -> PathBuf {
    let name = match translation.rank {
        0 => "translate.json".to_owned(),
        rank => format!("translate.rank{rank}.json"),
    };
    let output: &Path = &translation.output;
    if translation.is_file { output.with_extension(name) } else { output.join(name) }
}

fn print(outcome: &Outcome) {
    let report = &outcome.report;
    for (cause, failed) in &report.failed {
        report::result(format_args!(
            "without a translation: {} {cause} ({})",
            failed.count,
            failed.examples.join("; ")
        ));
    }
    if report.bad.total() > 0 {
        report::result(format_args!("bad: {}", report.bad));
    }
    let counts = format!("translated {} of {} rows in {} inputs", report.translated, report.rows, outcome.inputs);
    report::result(format_args!("{counts}: {} different captions, {} were known", outcome.asked, outcome.known));
    if outcome.finished_before > 0 {
        report::result(format_args!("{} outputs were finished before", outcome.finished_before));
    }
}
