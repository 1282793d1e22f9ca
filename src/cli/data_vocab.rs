//! `vilg data vocab`

use super::cache::CacheOptions;
use crate::{
    config::{self, Normalization},
    data::{BadCounts, Dataset, Kind, questions},
    error::{Hint, Result, failed},
    report, text,
};
use std::{fs, path::PathBuf};

/// Train a WordPiece vocabulary on all captions, questions and answers
#[derive(clap::Args)]
pub struct Args {
    /// Shards or folders, as for `vilg data inspect`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Vocabulary file to write, one token per line
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Maximum vocabulary size, special tokens included
    #[arg(long, default_value_t = 8192, value_name = "N", value_parser = clap::value_parser!(u32).range(6..=1_000_000))]
    size: u32,
    /// Maximum number of samples to read, spread evenly over the sources
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    samples: u64,
    /// Conversion of the captions before words are counted; train with the same `text.normalize`
    #[arg(long, value_enum, default_value_t = Normalization::None, value_name = "SCRIPT")]
    normalize: Normalization,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let source = |path: &String| config::Source { path: path.clone(), weight: 1.0 };
    let data = config::Data { sources: args.sources.iter().map(source).collect(), ..args.cache.data() };
    let dataset = Dataset::open(&data, Kind::Captions)?;
    let total: u64 = dataset.shares().iter().map(|(samples, _)| samples).sum();
    let bar = report::bar(total, "reading captions");
    let (mut captions, mut bad, mut ignored) = (Vec::new(), dataset.bad.clone(), BadCounts::default());
    let mut read = 0;
    for record in dataset.records(total.div_ceil(args.samples)) {
        read += 1;
        bar.set_position(read * total.div_ceil(args.samples));
        match record {
            Ok(record) => {
                let asked = questions(&record.meta).into_iter().flat_map(|one| [one.question, one.answer]);
                for text in record.captions.iter().cloned().chain(asked) {
                    captions.push(text::normalize(&text, args.normalize)?.into_owned());
                }
                record.ignored.into_iter().for_each(|one| ignored.add(one));
            }
            Err(one) => bad.add(one),
        }
    }
    bar.finish_and_clear();
    bad.check_fetched()?;
    if captions.is_empty() {
        return Err(failed(format_args!("no captions: {bad}"), "`vilg data inspect` shows what a source contains"));
    }
    if bad.total() > 0 {
        report::warn(format_args!("left out: {bad}"));
    }
    if ignored.total() > 0 {
        report::warn(format_args!("ignored: {ignored}"));
    }
    let vocab = text::train(captions.iter().map(String::as_str), args.size as usize)?;
    let file = args.output.display();
    fs::write(&args.output, &vocab).hint(format_args!("cannot write {file}"), "choose another file with -o")?;
    let (tokens, captions) = (vocab.lines().count(), captions.len());
    if json {
        report::json(
            &serde_json::json!({"file": report::path(&args.output), "tokens": tokens, "captions": captions, "bad": bad}),
        );
    } else {
        report::result(format_args!("{file}: {tokens} tokens from {captions} captions"));
    }
    Ok(())
}
