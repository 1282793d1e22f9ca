//! `vilg data encode`

use crate::{
    bundle::{self, Bundle},
    config,
    data::{CodesInfo, Encoder, Source},
    error::{Hint, Result},
    report,
};
use std::{fs, path::PathBuf};

/// Turn shards of pictures into shards of image codes; run it again to go on where it stopped
#[derive(clap::Args)]
pub struct Args {
    /// Shards or folders, as for `vilg data inspect`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Model folder with the image tokenizer
    #[arg(short, long, value_name = "DIR")]
    model: String,
    /// Folder for the shards; those that stand there already are kept
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Pictures that are encoded at once
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch: usize,
    /// Stop when more than this share of the samples is bad
    #[arg(long, default_value_t = config::Data::default().max_bad_ratio, value_name = "RATIO")]
    max_bad_ratio: f64,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let model = Bundle::open(&args.model)?;
    let tokenizer = model.image_tokenizer()?;
    let (height, width) = tokenizer.grid();
    let info =
        CodesInfo { tokenizer: model.digest()?, grid: [height, width], codebook_size: tokenizer.codebook_size()? };
    let sources = args.sources.iter().map(|path| Source::open(path, 1.0)).collect::<Result<Vec<_>>>()?;
    let encoder = Encoder {
        tokenizer: &tokenizer,
        info,
        output: args.output.clone(),
        batch_size: args.batch,
        max_bad_ratio: args.max_bad_ratio,
    };
    let bar = report::bar(sources.iter().map(Source::len).sum(), "encoding");
    let done = encoder.run(&sources, |n| bar.inc(n))?;
    bar.finish_and_clear();
    copy_attribution(&args)?;
    if done.bad.total() > 0 {
        report::warn(format_args!("left out: {}", done.bad));
    }
    if json {
        report::json(&done);
    } else {
        let (shards, skipped) = (done.shards, done.skipped_shards);
        let output = args.output.display();
        report::result(format_args!(
            "{output}: {} samples in {shards} shards; {skipped} shards were there",
            done.samples
        ));
    }
    Ok(())
}

/// The licences of the pictures hold for their codes as well.
fn copy_attribution(args: &Args) -> Result<()> {
    let sources: Vec<config::Source> =
        args.sources.iter().map(|path| config::Source { path: path.clone(), weight: 1.0 }).collect();
    let text = bundle::attribution_of(&sources);
    if text.is_empty() {
        return Ok(());
    }
    let path = args.output.join("ATTRIBUTION.md");
    fs::write(&path, text).hint(format_args!("cannot write {}", path.display()), "choose another folder with -o")
}
