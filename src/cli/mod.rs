//! The command line: one file a command, each with its `Args` and a `run` that calls the floors below.

mod bench;
mod caption;
mod completions;
mod config;
mod data;
mod data_encode;
mod data_inspect;
mod data_vocab;
mod doctor;
mod eval;
mod eval_recon;
mod export;
mod import;
mod man;
mod model;
mod plan;
mod reconstruct;
mod sampling;
mod summary;
mod t2i;
mod tokenize;
mod train;

use crate::{
    bundle,
    error::{Error, Result, usage},
    runtime::{self, Wanted},
};
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use std::ffi::OsString;

/// Paints Chinese text and describes pictures in Chinese, with one model for both directions.
#[derive(Parser)]
#[command(name = "vilg", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, \
    75 stopped by a signal after a checkpoint (start it again), 130 interrupted.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print the result as JSON: one object, or one line an item
    #[arg(long, global = true)]
    json: bool,
    /// Threads to compute with [default: one a core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Where to compute; auto: on a CUDA device where this build and machine have one, else on the CPU
    #[arg(long, global = true, value_name = "auto|cpu|cuda|cuda:N", default_value = "auto")]
    device: Wanted,
    /// Use a model folder although its parts do not belong together (manifest.json), with a warning
    #[arg(long, global = true)]
    allow_mismatch: bool,
}

#[derive(Subcommand)]
enum Command {
    #[command(name = "t2i")]
    T2i(t2i::Args),
    Caption(caption::Args),
    Eval(eval::Args),
    Train(train::Args),
    Plan(plan::Args),
    Tokenize(tokenize::Args),
    Reconstruct(reconstruct::Args),
    Export(export::Args),
    Import(import::Args),
    Config(config::Args),
    Data(data::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Parses `args` (the first is the program's name) and runs the command.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            // A closed pipe (`vilg --help | head`) is no failure.
            let _ = error.print();
            return Ok(());
        }
        Err(error) => return Err(usage_error(&error, &args)),
    };
    runtime::choose_device(cli.device);
    if cli.allow_mismatch {
        bundle::allow_mismatch();
    }
    runtime::start_threads(cli.threads.map(usize::from))?;
    match cli.command {
        // Its own threads hand work to the pool; with one thread it would wait for itself there.
        Command::Data(_) => dispatch(cli.command, cli.json),
        _ => runtime::on_threads(|| dispatch(cli.command, cli.json)),
    }
}

fn dispatch(command: Command, json: bool) -> Result<()> {
    match command {
        Command::T2i(args) => t2i::run(args, json),
        Command::Caption(args) => caption::run(args, json),
        Command::Eval(args) => eval::run(args, json),
        Command::Train(args) => train::run(args, json),
        Command::Plan(args) => plan::run(args, json),
        Command::Tokenize(args) => tokenize::run(args, json),
        Command::Reconstruct(args) => reconstruct::run(args, json),
        Command::Export(args) => export::run(args, json),
        Command::Import(args) => import::run(args, json),
        Command::Config(args) => config::run(args, json),
        Command::Data(args) => data::run(args, json),
        Command::Bench(args) => bench::run(args, json),
        Command::Doctor(args) => doctor::run(args, json),
        Command::Completions(args) => completions::run(args, json),
        Command::Man(args) => man::run(args, json),
    }
}

/// The whole command line as clap knows it: the source of help, completions and man page.
fn command() -> clap::Command {
    Cli::command()
}

/// clap's message in the form of ours: what is wrong, then a hint.
fn usage_error(error: &clap::Error, args: &[OsString]) -> Error {
    let help = format!("`{} --help` explains commands and options", command_of(args));
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return usage("a command is missing", help);
    }
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(str::trim);
    let message = paragraphs.next().map_or("", |p| p.strip_prefix("error: ").unwrap_or(p));
    usage(message, paragraphs.find_map(|p| p.strip_prefix("tip: ")).unwrap_or(&help))
}

/// The command that `args` name, as it is typed: `vilg config show`.
fn command_of(args: &[OsString]) -> String {
    let (mut command, mut name) = (command(), "vilg".to_owned());
    for arg in args.iter().skip(1).filter_map(|arg| arg.to_str()) {
        if let Some(below) = command.find_subcommand(arg).cloned() {
            command = below;
            name = format!("{name} {arg}");
        }
    }
    name
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
