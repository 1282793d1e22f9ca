//! `vilg eval human`

use super::{eval_human_new, eval_human_report};
use crate::{
    error::Result,
    eval::human::{prompts, study::Study, summary},
    report, serve,
};
use clap::Subcommand;
use serde_json::json;
use std::{net::SocketAddr, path::PathBuf};

/// Let people rate images, captions or answers: make a study, serve its pages, and report the ratings
#[derive(clap::Args)]
#[command(
    after_help = "Images are rated from 1 to 5 for clarity, texture and relevance to the prompt, captions from 0 to 2 for \
    fluency, relevance and richness, answers from 0 to 2, with the question whether a machine or a person wrote them."
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    New(eval_human_new::Args),
    Serve(ServeArgs),
    Report(eval_human_report::Args),
    Prompts(PromptsArgs),
}

/// Serve the raters' pages and print one link for each rater
#[derive(clap::Args)]
#[command(
    after_help = "Each rating is saved when its page is sent. Raters can stop and go on later; so can the server, whose links \
    stay the same while address and port do. Whoever has a rater's link can rate as that rater. Connections are not encrypted: \
    for raters on other machines, use an SSH tunnel, or a reverse proxy with TLS and --url.\n\n\
    Ctrl-C ends the server with exit code 130, SIGTERM and SIGHUP with 75."
)]
struct ServeArgs {
    /// Study file that `vilg eval human new` wrote
    #[arg(value_name = "STUDY")]
    study: PathBuf,
    /// Address and port to listen on; port 0: any free port
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    address: SocketAddr,
    /// Start of the printed links, where raters reach the server by another name [default: http://ADDRESS]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

/// Print 120 Chinese prompts over the nine aspects of the paper's evaluation, as a table with the columns aspect and prompt
#[derive(clap::Args)]
#[command(after_help = "The aspects are those of the paper's Appendix A; the prompts are our own.\n\n\
    Examples:\n  \
    vilg eval human prompts > prompts.tsv\n  \
    vilg eval human prompts --plain | vilg t2i - --each -o images/a.png")]
struct PromptsArgs {
    /// Print the prompts alone, one on each line
    #[arg(long, conflicts_with = "json")]
    plain: bool,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    match &args.command {
        Command::New(args) => eval_human_new::run(args, json),
        Command::Serve(args) => run_serve(args, json),
        Command::Report(args) => eval_human_report::run(args, json),
        Command::Prompts(args) => {
            print_prompts(args, json);
            Ok(())
        }
    }
}

fn print_prompts(args: &PromptsArgs, json: bool) {
    if json {
        prompts::prompts().for_each(|(aspect, prompt)| report::json(&json!({ "aspect": aspect, "prompt": prompt })));
    } else if args.plain {
        prompts::prompts().for_each(|(_, prompt)| report::result(prompt));
    } else {
        report::bytes(prompts::TABLE.as_bytes());
    }
}

fn run_serve(args: &ServeArgs, json: bool) -> Result<()> {
    let study = Study::open(&args.study)?;
    if !args.address.ip().is_loopback() {
        report::warn(format_args!(
            "{} IS OPEN TO OTHER MACHINES, WITHOUT ENCRYPTION: whoever reads the network's traffic sees the links and can \
             rate with them. Prefer 127.0.0.1 with an SSH tunnel or a reverse proxy with TLS",
            args.address
        ));
    }
    serve::human::run(study, args.address, |study, address| announce(args, study, address, json))
}

/// Prints the links.
fn announce(args: &ServeArgs, study: &Study, address: SocketAddr, json: bool) -> Result<()> {
    let url = args.url.clone().unwrap_or_else(|| format!("http://{address}"));
    let link = |token: &str| format!("{}/r/{token}", url.trim_end_matches('/'));
    let (mut rows, mut raters) = (Vec::new(), Vec::new());
    for rater in &study.raters {
        let progress = summary::progress(study, rater.number)?;
        let url = link(&rater.token);
        rows.push(vec![
            format!("rater {}", rater.number),
            url.clone(),
            format!("{} of {}", progress.rated, progress.pages),
        ]);
        raters.push(json!({ "rater": rater.number, "url": url, "rated": progress.rated, "pages": progress.pages }));
    }
    if json {
        report::json(&json!({ "study": report::path(&args.study), "address": address, "raters": raters }));
    } else {
        report::table(&["rater", "link", "rated pages"], &rows);
    }
    report::note(format_args!("serving {} at {address}; Ctrl-C ends it", args.study.display()));
    Ok(())
}
