//! The command line. Each command is one file with its `Args` and a `run` function.

mod bench;
mod cache;
mod caption;
mod captioning;
mod completions;
mod config;
mod config_files;
mod data;
mod data_build;
mod data_embed;
mod data_encode;
mod data_fetch;
mod data_filter;
mod data_inspect;
mod data_translate;
mod data_vocab;
mod demo_check;
mod doctor;
mod eval;
mod eval_ablation;
mod eval_caption;
mod eval_faithfulness;
mod eval_fid;
mod eval_human;
mod eval_human_new;
mod eval_human_report;
mod eval_matcher;
mod eval_recon;
mod eval_reranking;
mod eval_samples;
mod eval_t2i;
mod eval_vqa;
mod export;
mod features;
mod import;
mod man;
mod model;
mod output;
mod plan;
mod plan_roofline;
mod prompts;
mod ranking;
mod reconstruct;
mod report_page;
mod sampling;
mod score;
mod serve;
mod summary;
mod t2i;
mod tokenize;
mod train;
mod vqa;

use crate::{
    bundle,
    error::{Error, Result, usage},
    report::{self, Verbosity},
    runtime::{self, Kernels, Wanted},
};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind};
use std::{ffi::OsString, sync::LazyLock};

/// What `--version` prints.
static VERSION: LazyLock<String> = LazyLock::new(|| report::version().to_string());

/// Generate images from Chinese text and Chinese captions from images, with one model for both directions
#[derive(Parser)]
#[command(name = "vilg", version, long_version = VERSION.as_str(), propagate_version = true, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, \
    75 stopped by a signal after a checkpoint (start it again), 130 interrupted.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print results as JSON: one object, or one line for each item
    #[arg(long, global = true)]
    json: bool,
    /// Print only results, warnings and errors: no notes, no progress
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Print details: the version, the device, the model and timings
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Number of compute threads [default: one for each core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024),
        allow_negative_numbers = true)]
    threads: Option<u16>,
    /// Device to compute on. auto: the first CUDA device where this build and this machine have one, else the CPU
    #[arg(long, global = true, value_name = "auto|cpu|cuda|cuda:N", default_value = "auto")]
    device: Wanted,
    /// Kernels on CUDA devices. stock: candle's ops; fused: kernels of this program for norms, GELU, softmax, loss and
    /// embeddings, so far tested only in an emulator
    #[arg(
        long,
        global = true,
        value_enum,
        hide_possible_values = true,
        value_name = "stock|fused",
        default_value = "stock"
    )]
    kernels: Kernels,
    /// Multiply bf16 on the AMX units of the processor; so far tested only in an emulator [default: off]
    #[arg(long, global = true)]
    amx: bool,
    /// Use a model although its parts do not belong together, with a warning: the files of its folder (manifest.json), it
    /// and an adapter, or it (train.init_from) and the vocabulary or image tokenizer of a new run
    #[arg(long, global = true)]
    allow_mismatch: bool,
}

/// The commands in the order of the overview, grouped by what a user wants to do.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Use a model", &["t2i", "caption", "vqa", "score", "serve", "tokenize", "reconstruct"]),
    ("Prepare data", &["data"]),
    ("Train", &["config", "plan", "train"]),
    ("Measure", &["eval", "report", "bench"]),
    ("Exchange models and set up", &["import", "export", "doctor", "completions", "man"]),
];

#[derive(Subcommand)]
enum Command {
    #[command(name = "t2i")]
    T2i(t2i::Args),
    Caption(caption::Args),
    Vqa(vqa::Args),
    Score(score::Args),
    Serve(serve::Args),
    Eval(eval::Args),
    Report(report_page::Args),
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
///
/// # Errors
/// The arguments are wrong (exit code 2), or the command fails.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match parse(&args) {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            // A closed pipe (`vilg --help | head`) is not an error.
            let _ = error.print();
            return Ok(());
        }
        Err(error) => return Err(usage_error(&error, &args)),
    };
    report::set_verbosity(match (cli.quiet, cli.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    });
    report::detail(format_args!("vilg {}", report::version()));
    runtime::choose_device(cli.device);
    runtime::choose_kernels(cli.kernels, cli.device)?;
    if cli.amx {
        runtime::want_amx();
    }
    if cli.allow_mismatch {
        bundle::allow_mismatch();
    }
    runtime::start_threads(cli.threads.map(usize::from))?;
    match cli.command {
        // Data, training and the server start their own threads, which hand work to the pool. Waiting for them from inside a pool
        // of one thread would deadlock.
        Command::Data(_) | Command::Serve(_) | Command::Train(_) => dispatch(cli.command, cli.json),
        _ => runtime::on_threads(|| dispatch(cli.command, cli.json)),
    }
}

fn dispatch(command: Command, json: bool) -> Result<()> {
    match command {
        Command::T2i(args) => t2i::run(args, json),
        Command::Caption(args) => caption::run(args, json),
        Command::Vqa(args) => vqa::run(&args, json),
        Command::Score(args) => score::run(&args, json),
        Command::Serve(args) => serve::run(args, json),
        Command::Eval(args) => eval::run(args, json),
        Command::Report(args) => report_page::run(&args, json),
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

fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&command().try_get_matches_from(args)?)
}

/// The complete clap command: the source of help, completions and man page.
fn command() -> clap::Command {
    let command = Cli::command();
    let overview = overview(&command);
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{overview}\
        Options:\n{{options}}{{after-help}}\n"
    ))
}

/// The list of commands with one line of help each, in groups.
fn overview(command: &clap::Command) -> String {
    let line = |name: &&str| {
        let about = command.find_subcommand(name).and_then(clap::Command::get_about);
        format!("  {name:<12} {}\n", about.map(ToString::to_string).unwrap_or_default())
    };
    let group =
        |(title, names): &(&str, &[&str])| format!("{title}:\n{}\n", names.iter().map(line).collect::<String>());
    let groups: String = GROUPS.iter().map(group).collect();
    format!("{groups}`vilg help COMMAND` explains a command and its options.\n\n")
}

/// Converts clap's error message: what is wrong, then a hint.
fn usage_error(error: &clap::Error, args: &[OsString]) -> Error {
    let help = format!("`{} --help` explains commands and options", command_of(args));
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return usage("a command is missing", help);
    }
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(str::trim);
    let message = paragraphs.next().map_or("", |p| p.strip_prefix("error: ").unwrap_or(p));
    usage(plain_words(message), paragraphs.find_map(|p| p.strip_prefix("tip: ")).unwrap_or(&help))
}

/// Says what a value must be, where the message of clap or of Rust's number parser says it in terms of Rust.
fn plain_words(message: &str) -> String {
    let message =
        match message.split_once(" is not in ").and_then(|(text, range)| Some((text, range.split_once("..=")?))) {
            // `invalid value '0' for '--threads <N>': 0 is not in 1..=1024`
            Some((text, (low, high))) => {
                let text = text.rsplit_once(": ").map_or(text, |(text, _)| text);
                format!("{text}: must be a whole number from {low} to {high}")
            }
            None => message.to_owned(),
        };
    let words = [
        ("invalid digit found in string", "must be a whole number, at least 0"),
        ("cannot parse integer from empty string", "must be a whole number"),
        ("number too large to fit in target type", "the number is too large"),
        ("number too small to fit in target type", "the number is too small"),
        ("number would be zero for non-zero type", "must be at least 1"),
        ("invalid float literal", "must be a number"),
    ];
    words.iter().fold(message, |message, (rust, plain)| message.replace(rust, plain))
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

    #[test]
    fn the_overview_names_every_command_once_and_says_what_it_does() {
        let command = super::command();
        let mut grouped: Vec<&str> = super::GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let mut names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        grouped.sort_unstable();
        names.sort_unstable();
        assert_eq!(grouped, names);
        let help = super::command().render_help().to_string();
        for command in command.get_subcommands() {
            let about = command.get_about().unwrap().to_string();
            assert!(help.contains(&format!("  {:<12} {about}\n", command.get_name())), "{help}");
        }
    }

    #[test]
    fn values_are_explained_in_plain_words() {
        let message = |args: &[&str]| {
            let args: Vec<super::OsString> = ["vilg"].iter().chain(args).map(Into::into).collect();
            super::usage_error(&super::parse(&args).err().unwrap(), &args).to_string()
        };
        let number = "must be a whole number";
        for (args, end) in [
            (&["t2i", "月", "-n", "9999999999"][..], format!("{number} from 1 to 1024")),
            (&["t2i", "月", "-n", "-1"], format!("{number} from 1 to 1024")),
            (&["t2i", "月", "-n", "many"], format!("{number}, at least 0")),
            (&["t2i", "月", "--top-k", "-1"], format!("{number}, at least 0")),
            (&["t2i", "月", "--seed", "-1"], format!("{number}, at least 0")),
            (&["t2i", "月", "--seed", "99999999999999999999"], "the number is too large".to_owned()),
            (&["eval", "caption", "--data", "x", "--samples", "-1"], format!("{number}, at least 0")),
            (&["bench", "train", "--batch", "0"], format!("{number} from 1 to 4096")),
        ] {
            let message = message(args);
            assert!(message.ends_with(&end) && message.starts_with("invalid value"), "{args:?}: {message}");
        }
    }
}
