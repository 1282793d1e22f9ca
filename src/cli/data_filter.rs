//! `vilg data filter`

use super::{cache::CacheOptions, model::calibrate_command, output};
use crate::{
    bundle::Bundle,
    data::{
        embeddings::PairEmbedder,
        filter::{
            BlockedWords, DuplicateRules, Filter, Outcome, PAGE_START, Rule, Settings, TextRules, Unit, disk_bytes,
            input, page, sample,
        },
    },
    dist,
    error::{Hint, Result, ensure, failed, usage},
    generate::Matching,
    report,
};
use clap::builder::NonEmptyStringValueParser;
use image::RgbImage;
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// How `filter.json` begins.
const REPORT_START: &str = "{\n  \"inputs\":";
/// Seconds that `--plan` scans.
const PLAN_SECONDS: f64 = 10.0;
/// Web pairs that the paper filtered.
const PAPER_ROWS: f64 = 800e6;
/// Pairs that the paper trained on.
const PAPER_PAIRS: f64 = 145e6;

/// Filter image-text pairs by the rules of the paper (§3.2.1), and remove duplicates
#[derive(clap::Args)]
#[command(
    after_help = "Rules in order; a row counts under the first that it breaks: bad, too-long, no-noun, special-characters, \
    blocked-word, small-image, aspect-ratio, low-similarity, frequent-caption, duplicate-caption, duplicate-image. \
    Run the same command again to resume. Under torchrun, mpirun or srun, the ranks share the inputs. \
    The exit code is 1 if no row has a usable caption."
)]
pub struct Args {
    /// Tar shards or folders as for `vilg data inspect`, or tables (.jsonl, .csv, .tsv, .parquet) and folders of them
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Folder to write to; for one table, also a file with the table's extension
    #[arg(short, long, value_name = "PATH", required_unless_present = "plan")]
    output: Option<PathBuf>,
    /// Do not read images: only the rules about text
    #[arg(long)]
    text_only: bool,
    /// Maximum length of a caption; the paper keeps fewer than 15 words (0: off)
    #[arg(long, default_value_t = 14, value_name = "N")]
    max_length: usize,
    /// What the length is counted in
    #[arg(long, default_value = "words", value_name = "UNIT")]
    unit: Unit,
    /// Keep captions without a noun
    #[arg(long)]
    keep_without_noun: bool,
    /// Keep captions with special characters (docs/data.md lists them)
    #[arg(long)]
    keep_special_characters: bool,
    /// File with words that no caption may contain, one on each line
    #[arg(long, value_name = "FILE")]
    blocked_words: Option<PathBuf>,
    /// Minimum length of the shorter side of an image in pixels (0: off)
    #[arg(long, default_value_t = 64, value_name = "PIXELS")]
    min_side: u32,
    /// Maximum ratio of the longer to the shorter side of an image (0: off)
    #[arg(long, default_value_t = 3.0, value_name = "RATIO")]
    max_aspect_ratio: f64,
    /// Column or JSON field with the similarity of image and caption; without it, that rule is off
    #[arg(long, value_name = "NAME", group = "similarity")]
    similarity_column: Option<String>,
    /// Model folder of a matcher that computes the similarity of image and caption in shards; embeddings that `vilg data
    /// embed` stored beside the shards are used
    #[arg(long, value_name = "DIR", group = "similarity", conflicts_with = "text_only")]
    matcher: Option<String>,
    /// Keep pairs whose similarity is above this: the number of the column, or the calibrated score of the matcher
    #[arg(long, default_value_t = 0.5, value_name = "X", requires = "similarity", allow_negative_numbers = true)]
    min_similarity: f64,
    /// Keep pairs whose cosine is above this, for a matcher that is not calibrated
    #[arg(
        long,
        value_name = "X",
        requires = "matcher",
        conflicts_with = "min_similarity",
        allow_negative_numbers = true
    )]
    min_cosine: Option<f64>,
    /// Folder of the embeddings that `vilg data embed -o` wrote; by default beside the shards
    #[arg(long, value_name = "DIR", requires = "matcher")]
    embeddings: Option<PathBuf>,
    /// Leave out captions that occur more often than this, such as 点击查看大图 (0: off)
    #[arg(long, default_value_t = 10, value_name = "N")]
    max_caption_repeats: usize,
    /// Keep only the first of equal captions (without case, spaces and punctuation)
    #[arg(long)]
    unique_captions: bool,
    /// Keep duplicates of images
    #[arg(long)]
    keep_duplicate_images: bool,
    /// Bits of the 64-bit perceptual hash in which near images may differ (0: equal hashes)
    #[arg(long, default_value_t = 4, value_name = "BITS", value_parser = clap::value_parser!(u32).range(0..=8))]
    image_distance: u32,
    /// Mirrored images are duplicates too
    #[arg(long)]
    mirrored: bool,
    /// JSON fields of a shard with the captions, separated by commas, and `txt` for the text file, as data.caption_keys of
    /// the training [default: captions, else caption, else the text file]
    #[arg(long, value_name = "KEYS", value_delimiter = ',', value_parser = NonEmptyStringValueParser::new())]
    caption_keys: Vec<String>,
    /// Column of a table that holds the caption
    #[arg(long, default_value = "caption", value_name = "NAME")]
    caption_column: String,
    /// Column of a table that holds the width of the image in pixels
    #[arg(long, default_value = "width", value_name = "NAME")]
    width_column: String,
    /// Column of a table that holds the height of the image in pixels
    #[arg(long, default_value = "height", value_name = "NAME")]
    height_column: String,
    /// Measure the speed on the first inputs and print time and memory for the paper's data; write nothing
    #[arg(long)]
    plan: bool,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let mut settings = settings(&args)?;
    let inputs = input::find(&args.sources, &args.cache.data())?;
    let loaded = args.matcher.as_ref().map(|model| load(model, &inputs, &args)).transpose()?;
    let embed = |images: &[RgbImage], texts: &[String]| match &loaded {
        Some(loaded) => loaded.matching.embed_pairs(images, texts),
        None => Ok([Vec::new(), Vec::new()]),
    };
    let matcher = loaded.as_ref().map(|loaded| PairEmbedder {
        digest: loaded.digest.clone(),
        image_size: loaded.matching.image_size(),
        embedding: loaded.matching.embedding(),
        folder: args.embeddings.clone(),
        embed: &embed,
    });
    settings.min_similarity = match &loaded {
        Some(loaded) => Some(loaded.min_cosine),
        None => args.similarity_column.as_ref().map(|_| args.min_similarity),
    };
    if args.plan {
        return plan(&inputs, &settings, matcher.as_ref(), json);
    }
    let similarity = similarity(&args, loaded.as_ref());
    let output = args.output.unwrap_or_default();
    let is_file = input::is_file_output(&inputs, &output)?;
    let files = report_files(&output, is_file);
    for (path, start) in files.iter().zip([REPORT_START, PAGE_START]) {
        output::check_report(path, start, "rename it, or choose another output with -o")?;
    }
    let place = dist::place()?;
    let (rank, world_size) = place.map_or((0, 1), |place| (place.rank, place.world_size));
    let bar = report::counter("rows, counted twice");
    let filter = Filter { settings, matcher: matcher.as_ref(), inputs, output, is_file, rank, world_size };
    let outcome = filter.run(&|rows| bar.inc(rows))?;
    bar.finish_and_clear();
    let summary = Summary { outcome: &outcome, similarity };
    if rank == 0 {
        write_report(&files, &summary)?;
    }
    if json {
        report::json(&summary)
    } else {
        print(&outcome)
    }
    let usable = outcome.report.rules.iter().any(|count| count.rule == Rule::Bad && count.remaining > 0);
    let hint = "for a table, name the column of the captions with --caption-column";
    ensure!(usable, failed("no row has a usable caption", hint));
    Ok(())
}

/// What a run did, and what decided on the similarity of its pairs.
#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    outcome: &'a Outcome,
    /// None where that rule was off.
    #[serde(skip_serializing_if = "Option::is_none")]
    similarity: Option<Value>,
}

/// The column or the matcher with its digest, and the number above which a pair is kept.
fn similarity(args: &Args, loaded: Option<&Loaded>) -> Option<Value> {
    let column = || args.similarity_column.as_ref();
    let Some(Loaded { digest, min_cosine, .. }) = loaded else {
        return column().map(|column| json!({ "column": column, "min_similarity": args.min_similarity }));
    };
    let score = args.min_cosine.is_none().then_some(args.min_similarity);
    Some(json!({ "matcher": args.matcher, "digest": digest, "min_cosine": min_cosine, "min_similarity": score }))
}

/// The matcher, and the cosine above which a pair is kept.
struct Loaded {
    matching: Matching,
    digest: String,
    min_cosine: f64,
}

fn load(model: &str, inputs: &[input::Input], args: &Args) -> Result<Loaded> {
    let table = inputs.iter().find(|input| input.kind == input::InputKind::Table);
    let what = table.map_or(String::new(), |table| format!("{} is a table, which has no images", table.path.display()));
    ensure!(
        table.is_none(),
        usage(what, "build shards first (`vilg data build`), or name a column with --similarity-column")
    );
    let bundle = Bundle::open(model)?.matcher_folder()?;
    let matching = Matching::open(&bundle)?;
    let what = format!("{model} is not calibrated, so that its cosines are no scores");
    let hint = format!("{}, or give --min-cosine", calibrate_command(model));
    let min_cosine =
        args.min_cosine.or_else(|| matching.cosine_of(args.min_similarity)).ok_or_else(|| usage(what, hint))?;
    Ok(Loaded { digest: bundle.matcher_digest()?, matching, min_cosine })
}

fn settings(args: &Args) -> Result<Settings> {
    let min_cosine = args.min_cosine.unwrap_or_default();
    let numbers = [
        ("max-aspect-ratio", args.max_aspect_ratio),
        ("min-similarity", args.min_similarity),
        ("min-cosine", min_cosine),
    ];
    for (name, number) in numbers {
        ensure!(
            number.is_finite(),
            usage(format_args!("--{name} {number} is not a number"), "write a number such as 0.5")
        );
    }
    let text = TextRules {
        max_length: (args.max_length > 0).then_some(args.max_length),
        unit: args.unit,
        noun: !args.keep_without_noun,
        no_special_characters: !args.keep_special_characters,
        blocked: args.blocked_words.as_deref().map(BlockedWords::read).transpose()?,
    };
    let duplicates = DuplicateRules {
        max_caption_repeats: (args.max_caption_repeats > 0).then_some(args.max_caption_repeats),
        unique_captions: args.unique_captions,
        image_distance: (!args.keep_duplicate_images && !args.text_only).then_some(args.image_distance),
        mirrored: args.mirrored,
    };
    Ok(Settings {
        text,
        text_only: args.text_only,
        min_side: args.min_side,
        max_aspect_ratio: (args.max_aspect_ratio > 0.0).then_some(args.max_aspect_ratio),
        similarity_column: args.similarity_column.clone(),
        min_similarity: None,
        duplicates,
        caption_keys: args.caption_keys.clone(),
        caption_column: args.caption_column.clone(),
        width_column: args.width_column.clone(),
        height_column: args.height_column.clone(),
    })
}

/// `filter.json` and `filter.html` in the output folder, or `NAME.filter.json` beside an output file.
fn report_files(output: &Path, is_file: bool) -> [PathBuf; 2] {
    ["filter.json", "filter.html"].map(|name| if is_file { output.with_extension(name) } else { output.join(name) })
}

fn write_report(files: &[PathBuf; 2], summary: &Summary<'_>) -> Result<()> {
    let contents = [serde_json::to_string_pretty(summary)?, page(&summary.outcome.report)?];
    for (path, content) in files.iter().zip(contents) {
        fs::write(path, content)
            .hint(format_args!("cannot write {}", path.display()), "choose another output with -o")?;
    }
    Ok(())
}

fn print(outcome: &Outcome) {
    let report = &outcome.report;
    let rows: Vec<Vec<String>> = report
        .rules
        .iter()
        .map(|count| vec![count.rule.to_string(), count.left_out.to_string(), count.remaining.to_string()])
        .collect();
    report::table(&["rule", "left out", "remaining"], &rows);
    if report.bad.total() > 0 {
        report::result(format_args!("bad: {}", report.bad));
    }
    report::result(format_args!("kept {} of {} rows in {} inputs", report.kept, report.rows, report.inputs));
    if outcome.finished_before > 0 {
        report::result(format_args!("{} outputs were finished before", outcome.finished_before));
    }
}

/// Prints the cost of filtering the paper's data on machines like this one.
fn plan(inputs: &[input::Input], settings: &Settings, matcher: Option<&PairEmbedder<'_>>, json: bool) -> Result<()> {
    let sampled = sample(inputs, settings, matcher, PLAN_SECONDS)?;
    let hours = |rows: f64| rows / sampled.rows_per_second / 3600.0;
    let share = sampled.passed as f64 / sampled.rows as f64;
    // The paper's pairs are those that pass.
    let [rows_memory, pairs_memory] = [(PAPER_ROWS, share * PAPER_ROWS), (PAPER_PAIRS, PAPER_PAIRS)]
        .map(|(rows, passed)| settings.memory_bytes(rows, passed));
    let disk = disk_bytes(PAPER_ROWS);
    if json {
        report::json(&json!({
            "rows_scanned": sampled.rows,
            "rows_per_second": sampled.rows_per_second,
            "share_passed": share,
            "hours_800m_rows": hours(PAPER_ROWS),
            "hours_145m_pairs": hours(PAPER_PAIRS),
            "memory_bytes_800m_rows": rows_memory,
            "memory_bytes_145m_pairs": pairs_memory,
            "disk_bytes_800m_rows": disk,
        }));
        return Ok(());
    }
    let gigabytes = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let lines = [
        ["rows scanned", &sampled.rows.to_string()],
        ["rows that pass, before duplicates", &format!("{:.0} %", 100.0 * share)],
        ["rows/s in this process", &format!("{:.0}", sampled.rows_per_second)],
        ["800 million rows, first pass", &format!("{:.1} h / number of ranks", hours(PAPER_ROWS))],
        ["145 million pairs, first pass", &format!("{:.1} h / number of ranks", hours(PAPER_PAIRS))],
        ["memory of each rank to compare 800 million rows", &gigabytes(rows_memory)],
        ["memory of each rank to compare 145 million pairs", &gigabytes(pairs_memory)],
        ["features of 800 million rows on disk", &gigabytes(disk)],
    ];
    report::table(&[], &lines.map(|line| line.map(str::to_owned).to_vec()));
    Ok(())
}
