//! `vilg data embed`

use super::{cache::CacheOptions, model::MatcherOption};
use crate::{
    config,
    data::{Embedder, Shard, Source, embeddings::PairEmbedder},
    dist,
    error::{Result, ensure, failed, usage},
    report,
};
use std::path::PathBuf;

/// Embed the images and captions of shards with a matcher. Run the same command again to resume
#[derive(clap::Args)]
#[command(
    after_help = "Beside each shard NAME.tar, two files are written: NAME.tar.embeddings.npy, f32 of shape (samples, 2, \
    embedding) with image and first caption in the order of the samples, and NAME.tar.embeddings.json with the keys. For \
    the images of a folder they are images.embeddings.npy and .json in it. The row of a bad sample is NaN. Finished \
    embeddings are kept while shard and model are unchanged. `vilg data filter --matcher` uses them. Under torchrun, \
    mpirun or srun, the ranks share the shards."
)]
pub struct Args {
    /// Shards or folders, as for `vilg data inspect`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    #[command(flatten)]
    matcher: MatcherOption,
    /// Folder to write to, under the names of the shards; by default beside the shards. Remote shards need it
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Batch size: number of samples that are read together
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,
    /// Stop when more than this share of the samples is bad, from 0 to 1 (0: stop at the first bad sample)
    #[arg(long, default_value_t = config::Data::default().max_bad_ratio, value_name = "RATIO")]
    max_bad_ratio: f64,
    #[command(flatten)]
    cache: CacheOptions,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let (bundle, matching) = args.matcher.load()?;
    let cache = args.cache.data();
    let sources = args.sources.iter().map(|path| Source::open_with(path, 1.0, &cache)).collect::<Result<Vec<_>>>()?;
    if let Some(source) = sources.iter().find(|source| source.shards.iter().any(|shard| shard.remote_file().is_some()))
        && args.output.is_none()
    {
        return Err(usage(
            format_args!("`{}` is remote: embeddings cannot be written there", source.path),
            "name a folder with -o",
        ));
    }
    let place = dist::place()?;
    let (rank, world_size) = place.map_or((0, 1), |place| (place.rank, place.world_size));
    let embedder = Embedder {
        matcher: PairEmbedder {
            digest: bundle.matcher_digest()?,
            image_size: matching.image_size(),
            embedding: matching.embedding(),
            folder: args.output.clone(),
            embed: &|images, texts| matching.embed_pairs(images, texts),
        },
        batch_size: args.batch.into(),
        max_bad_ratio: args.max_bad_ratio,
        rank,
        world_size,
    };
    let shards: Vec<&Shard> = sources.iter().flat_map(|source| &source.shards).collect();
    let (own, samples) = embedder.own(&shards).fold((0, 0), |(own, samples), shard| (own + 1, samples + shard.len()));
    let bar = report::bar(samples, "embedding");
    let done = embedder.run(&sources, |n| bar.inc(n))?;
    bar.finish_and_clear();
    if done.bad.total() > 0 {
        report::warn(format_args!("rows of NaN: {}", done.bad));
    }
    if json {
        report::json(&done);
    } else {
        let (shards, skipped) = (done.shards, done.skipped_shards);
        report::result(format_args!(
            "{} samples in {shards} shards; {skipped} shards were finished before",
            done.samples
        ));
    }
    ensure!(
        done.samples > 0 || done.skipped_shards > 0 || own == 0,
        failed(format_args!("no samples: {}", done.bad), "`vilg data inspect PATH` shows what a source contains")
    );
    Ok(())
}
