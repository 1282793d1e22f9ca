//! `vilg data inspect`

use super::cache::CacheOptions;
use crate::{
    data::{
        Source,
        inspect::{Findings, Inspection, Spread, inspect},
    },
    error::{Result, failed},
    report,
};

/// Read every sample and print counts, image sizes, caption lengths, and bad samples by cause
#[derive(clap::Args)]
#[command(after_help = "The exit code is 1 if one of the paths contains no readable image or codes.")]
pub struct Args {
    /// Tar shards (`dir/{00000..00012}.tar`, `dir/*.tar`), folders of shards, folders of images, or URLs of remote shards
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let cache = args.cache.data();
    let sources = args.paths.iter().map(|path| Source::open_with(path, 1.0, &cache)).collect::<Result<Vec<_>>>()?;
    let bar = report::bar(sources.iter().map(Source::len).sum(), "reading");
    let inspections = sources.iter().map(|source| inspect(source, |n| bar.inc(n))).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    for inspection in &inspections {
        if json { report::json(inspection) } else { print(inspection) }
    }
    if let Some(Inspection { path, .. }) = inspections.iter().find(|inspection| !inspection.found.usable()) {
        let hint = "a source is tar shards, or a folder with images and their captions (`a.jpg` and `a.txt`)";
        return Err(failed(format_args!("`{path}` has no usable sample"), hint));
    }
    Ok(())
}

fn print(inspection: &Inspection) {
    let Inspection { path, shards, found } = inspection;
    report::result(format_args!("{path}: {} samples in {} shards", found.samples, shards.len()));
    let rows: Vec<Vec<String>> =
        shards.iter().map(|s| vec![s.name.clone(), s.samples.to_string(), s.bad.to_string()]).collect();
    report::table(&["shard", "samples", "bad"], &rows);
    report::result(format_args!("images: {}; samples of codes: {}", found.images, found.codes));
    for (name, spread) in spreads(found) {
        if let Some(s) = spread.summary() {
            report::result(format_args!("{name}: {} to {}, median {}, mean {:.1}", s.min, s.max, s.median, s.mean));
        }
    }
    let bad = if found.bad.total() == 0 { "none".to_owned() } else { found.bad.to_string() };
    report::result(format_args!("bad: {bad}"));
    if found.ignored.total() > 0 {
        report::result(format_args!("ignored: {}", found.ignored));
    }
    if let Some((key, caption)) = &found.example {
        report::result(format_args!("example: {key} {caption}"));
    }
}

fn spreads(found: &Findings) -> [(&'static str, &Spread); 4] {
    [
        ("width", &found.widths),
        ("height", &found.heights),
        ("captions a sample", &found.captions),
        ("characters a caption", &found.caption_lengths),
    ]
}
