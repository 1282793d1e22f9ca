//! `vilg data`

use super::{data_encode, data_inspect, data_vocab};
use crate::error::Result;
use clap::Subcommand;

/// Inspect data, encode images as image codes, make a vocabulary
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(data_inspect::Args),
    Encode(data_encode::Args),
    Vocab(data_vocab::Args),
}

pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Inspect(args) => data_inspect::run(args, json),
        Command::Encode(args) => data_encode::run(args, json),
        Command::Vocab(args) => data_vocab::run(args, json),
    }
}
