//! `vilg data build`

use super::{cache::CacheOptions, output};
use crate::{
    data::{
        Cause,
        build::{Builder, Columns, Format, ICONV, Keys, Request, Settings, guess, open},
    },
    error::{Result, ensure, failed, usage},
    report,
};
use std::path::PathBuf;

/// Build tar shards from a data set in another format. Run the same command again to resume
#[derive(clap::Args)]
#[command(
    after_help = "The output is a folder of shards in the layout of img2dataset: 00000.tar, 00001.tar, ... with KEY.jpg, \
    KEY.txt and KEY.json, and 00000_stats.json beside each. Images keep their bytes. The JSON has all captions, the other \
    fields of the row, and `questions` if the data set has them. Bad rows are left out and counted by cause. \
    Each shard records its source: a finished one is kept, and shards of another source or of other settings are never \
    replaced. The exit code is 1 if no row can be used."
)]
pub struct Args {
    /// Annotations, table, list of captions, folder of images, or shards (docs/data.md lists the formats)
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Folder to write the shards to
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Format of the source; by default its content decides
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Folder of the images that the source names; by default the folder of the source
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Split to build, if the source has several
    #[arg(long, value_name = "NAME")]
    split: Option<String>,
    /// Column of the image in a table: its file name, or its bytes in a parquet file
    #[arg(long, value_name = "NAME")]
    image_column: Option<String>,
    /// The image column has base64 text
    #[arg(long)]
    base64: bool,
    /// Column of captions in a table, a text or a list of texts; can be repeated
    #[arg(long, value_name = "NAME")]
    caption_column: Vec<String>,
    /// Column of a unique key in a table
    #[arg(long, value_name = "NAME")]
    key_column: Option<String>,
    /// Keys of the samples: the number of the row, or the id that the source has for it
    #[arg(long, default_value = "number", value_name = "KEYS")]
    keys: Keys,
    /// Number of rows of a shard
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    samples_per_shard: u64,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let columns =
        Columns { image: args.image_column, base64: args.base64, captions: args.caption_column, key: args.key_column };
    let request = Request {
        source: args.source.clone(),
        images: args.images,
        split: args.split.clone(),
        columns: columns.clone(),
        cache: args.cache.data(),
    };
    let format = args.format.map_or_else(|| guess(&request), Ok)?;
    let message = format!("{} is not a table but has the format {format}", args.source);
    let hint = "column options are for tables; data.caption_keys chooses among the JSON fields of shards";
    ensure!(format == Format::Table || columns == Columns::default(), usage(message, hint));
    let builder = Builder {
        reader: open(&request, format)?,
        source: PathBuf::from(&args.source),
        output: args.output.clone(),
        settings: Settings {
            format,
            samples: args.samples_per_shard,
            keys: args.keys,
            split: args.split,
            columns,
            images: String::new(),
        },
    };
    let bar = report::counter("building");
    let done = builder.run(|rows| bar.inc(rows))?;
    bar.finish_and_clear();
    output::add_attribution(std::slice::from_ref(&args.source), &args.output)?;
    if done.bad.total() > 0 {
        report::warn(format_args!("left out: {}", done.bad));
    }
    if done.ignored.total() > 0 {
        report::warn(format_args!("ignored: {}", done.ignored));
    }
    if json {
        report::json(&done);
    } else {
        let (output, kept) = (args.output.display(), done.skipped_shards);
        report::result(format_args!(
            "{output}: {} samples of {} rows ({format}) in {} shards; {kept} shards were finished before",
            done.samples,
            done.rows,
            done.shards + kept
        ));
    }
    let hint = if done.bad.has(Cause::NotUtf8) {
        ICONV
    } else if done.bad.has(Cause::NoImage) {
        "name the folder of the images with --images"
    } else {
        "docs/data.md describes what each format must contain"
    };
    ensure!(done.samples > 0, failed(format_args!("no row can be used: {}", done.bad), hint));
    Ok(())
}
