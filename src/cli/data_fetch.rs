//! `vilg data fetch`

use crate::{
    data::remote::{self, Fetch, Fetched, Limits, State},
    error::{Result, ensure, usage},
    report,
};
use std::{path::PathBuf, time::Duration};

/// Copy remote shards to a folder: s3://, oss://, https://, hf:// or pipe:COMMAND
#[derive(clap::Args)]
#[command(
    after_help = "Run the same command again to resume: finished shards are skipped if they are intact and unchanged on the \
    server. Credentials are read from environment variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, \
    AWS_ENDPOINT_URL; OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET, OSS_ENDPOINT; HF_TOKEN, HF_ENDPOINT. \
    All but pipe: need a build with the feature `remote`."
)]
pub struct Args {
    /// URLs of shards: `s3://BUCKET/PATH/{00000..00099}.tar`, `s3://BUCKET/PATH/*.tar`, `hf://datasets/OWNER/NAME/PATH`
    #[arg(required = true, value_name = "URL")]
    sources: Vec<String>,
    /// Folder to write to
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Number of downloads at the same time
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    downloads: u16,
    /// Maximum time without progress in seconds, after which a download is tried again
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// Maximum number of attempts in sequence without progress
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    attempts: u32,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    if let Some(local) = args.sources.iter().find(|source| !remote::is_remote(source)) {
        let hint = "write s3://BUCKET/PATH, oss://BUCKET/PATH, https://HOST/PATH, hf://datasets/OWNER/NAME/PATH or pipe:COMMAND";
        return Err(usage(format_args!("`{local}` is not a remote URL"), hint));
    }
    let mut shards = Vec::new();
    for source in &args.sources {
        shards.extend(remote::list(source)?);
    }
    ensure!(!args.output.is_file(), usage(format_args!("{} is a file", args.output.display()), "-o needs a folder"));
    let stall = Duration::from_secs(args.timeout.into());
    let limits = Limits { stall, attempts: args.attempts, ..Limits::default() };
    let bar = report::counter("bytes");
    let fetch = Fetch { shards, output: args.output, limits, threads: args.downloads.into() };
    let fetched = fetch.run(&|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let downloaded: Vec<&Fetched> = fetched.iter().filter(|shard| shard.state == State::Downloaded).collect();
    let bytes: u64 = downloaded.iter().map(|shard| shard.bytes).sum();
    if json {
        report::json(&serde_json::json!({
            "shards": fetched,
            "downloaded": downloaded.len(),
            "finished_before": fetched.len() - downloaded.len(),
            "bytes_downloaded": bytes,
        }));
    } else {
        let output = fetch.output.display();
        report::result(format_args!("{} shards in {output}", fetched.len()));
        report::result(format_args!("downloaded: {} ({bytes} bytes)", downloaded.len()));
        report::result(format_args!("finished before: {}", fetched.len() - downloaded.len()));
    }
    Ok(())
}
