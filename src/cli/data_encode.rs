//! `vilg data encode`

use super::{cache::CacheOptions, output};
use crate::{
    bundle::Bundle,
    config,
    data::{CodesInfo, Encoder, Shard, Source},
    dist,
    error::{Result, ensure, failed},
    report,
};
use std::path::PathBuf;

/// Encode shards of images as shards of image codes. Run the same command again to resume
#[derive(clap::Args)]
#[command(
    after_help = "Each output shard records its source (samples, sizes, modification times) and the tokenizer. An output \
    shard is kept while its source is unchanged, encoded again when the source has changed, and never replaced by a \
    different source. Images from folders are stored under their path with dots replaced. A source shard without a usable sample is \
    reported, and the exit code is then 1. Under torchrun, mpirun or srun, the ranks share the shards."
)]
pub struct Args {
    /// Shards or folders, as for `vilg data inspect`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Model folder whose image tokenizer encodes the images
    #[arg(short, long, value_name = "DIR")]
    model: String,
    /// Folder to write the shards of codes to
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Keep the images beside their codes: for end-to-end training, which needs both
    #[arg(long)]
    keep_images: bool,
    /// Batch size: number of images encoded together
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,
    /// Stop when more than this share of the samples is bad, from 0 to 1 (0: stop at the first bad sample)
    #[arg(long, default_value_t = config::Data::default().max_bad_ratio, value_name = "RATIO")]
    max_bad_ratio: f64,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let model = Bundle::open(&args.model)?;
    let tokenizer = model.image_tokenizer()?;
    let (height, width) = tokenizer.grid();
    let info =
        CodesInfo { tokenizer: model.digest()?, grid: [height, width], codebook_size: tokenizer.codebook_size()? };
    let cache = args.cache.data();
    let sources = args.sources.iter().map(|path| Source::open_with(path, 1.0, &cache)).collect::<Result<Vec<_>>>()?;
    let place = dist::place()?;
    let (rank, world_size) = place.map_or((0, 1), |place| (place.rank, place.world_size));
    let encoder = Encoder {
        tokenizer: &tokenizer,
        info,
        output: args.output.clone(),
        keep_images: args.keep_images,
        batch_size: args.batch.into(),
        max_bad_ratio: args.max_bad_ratio,
        rank,
        world_size,
    };
    let shards: Vec<&Shard> = sources.iter().flat_map(|source| &source.shards).collect();
    let (own, samples) = encoder.own(&shards).fold((0, 0), |(own, samples), shard| (own + 1, samples + shard.len()));
    let bar = report::bar(samples, "encoding");
    let done = encoder.run(&sources, |n| bar.inc(n))?;
    bar.finish_and_clear();
    output::add_attribution(&args.sources, &args.output)?;
    if done.bad.total() > 0 {
        report::warn(format_args!("left out: {}", done.bad));
    }
    if done.ignored.total() > 0 {
        report::warn(format_args!("ignored: {}", done.ignored));
    }
    if json {
        report::json(&done);
    } else {
        let (shards, skipped) = (done.shards, done.skipped_shards);
        let output = args.output.display();
        report::result(format_args!(
            "{output}: {} samples in {shards} shards; {skipped} shards were finished before",
            done.samples
        ));
    }
    let message = format!("{} shards have no usable sample: {}", done.unusable_shards, done.bad);
    let hint = "repair or remove them and run this again; the other shards are complete";
    ensure!(done.unusable_shards == 0, failed(message, hint));
    ensure!(
        done.shards + done.skipped_shards > 0 || own == 0,
        failed(format_args!("no samples: {}", done.bad), "`vilg data inspect PATH` shows what a source contains")
    );
    Ok(())
}
