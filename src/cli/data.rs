//! `vilg data`

use super::{data_build, data_embed, data_encode, data_fetch, data_filter, data_inspect, data_translate, data_vocab};
use crate::error::Result;
use clap::Subcommand;

/// Build, fetch, inspect and filter data, translate captions, encode images as image codes, make a vocabulary
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Build(data_build::Args),
    Inspect(data_inspect::Args),
    Fetch(data_fetch::Args),
    Filter(data_filter::Args),
    Translate(data_translate::Args),
    Embed(data_embed::Args),
    Encode(data_encode::Args),
    Vocab(data_vocab::Args),
}

pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Build(args) => data_build::run(args, json),
        Command::Inspect(args) => data_inspect::run(args, json),
        Command::Fetch(args) => data_fetch::run(args, json),
        Command::Filter(args) => data_filter::run(args, json),
        Command::Translate(args) => data_translate::run(args, json),
        Command::Embed(args) => data_embed::run(&args, json),
        Command::Encode(args) => data_encode::run(args, json),
        Command::Vocab(args) => data_vocab::run(args, json),
    }
}
