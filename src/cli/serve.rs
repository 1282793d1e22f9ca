//! `vilg serve`

use super::model::ModelOptions;
use crate::{
    bounded_read,
    bundle::{Bundle, DEMO_NAME},
    error::{Hint, Result, ensure, usage},
    generate::{Matching, Sampling},
    report,
    serve::api::{self, Loaded, ModelFacts, Settings},
};
use serde_json::json;
use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// The environment variable with the token.
const TOKEN: &str = "VILG_SERVE_TOKEN";
/// Maximum size of a file with a token, in bytes, and least length of a token in characters.
const TOKEN_FILE: u64 = 4096;
const TOKEN_LENGTH: usize = 16;

/// Serve a page for the browser and an HTTP API: images, captions, answers and scores
#[derive(clap::Args)]
#[command(
    after_help = "The page is at the printed address and needs no other server. The API has OpenAI's images API, for which \
    the official clients work (base URL http://ADDRESS/v1), /v1/captions, /v1/answers, /v1/scores, /v1/models, /healthz, \
    /metrics and /openapi.json. An image is the one that `vilg t2i` makes with the same prompt, seed and options.\n\n\
    Clients on other machines: connections are not encrypted. Prefer an SSH tunnel or a reverse proxy with TLS, and set a \
    token with --token-file or in the environment variable VILG_SERVE_TOKEN.\n\n\
    SIGTERM and SIGHUP end the server when the requests in progress are done (exit code 0), at the latest after --grace (1); \
    so does Ctrl-C (130), and a second Ctrl-C at once.\n\n\
    Examples:\n  \
    vilg serve\n  \
    vilg serve --model runs/scenes --host 0.0.0.0 --port 8080 --token-file token.txt"
)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// Model folder of the image–text matcher, folder of its training run, `demo` for the built-in matcher, or `none`
    /// [default: demo for the built-in model, else none]
    #[arg(long, value_name = "DIR|NAME")]
    matcher: Option<String>,
    /// IP address to listen on; 0.0.0.0: all of this machine, for other machines too
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0: any free port
    #[arg(long, value_name = "N", default_value_t = 8000, allow_negative_numbers = true)]
    port: u16,
    /// Further host name under which clients reach the server, such as that of a reverse proxy; can be given several times
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// File with the token that clients must send as `Authorization: Bearer TOKEN` [default: none]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Maximum number of images and texts that wait; more get the status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000),
        allow_negative_numbers = true)]
    queue: u32,
    /// Maximum number of images that are generated together
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024),
        allow_negative_numbers = true)]
    max_batch: u32,
    /// Maximum time of a request in seconds, its time in the queue included
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=86_400),
        allow_negative_numbers = true)]
    time_limit: u32,
    /// Time in seconds that requests in progress get when the server stops
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400),
        allow_negative_numbers = true)]
    grace: u32,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let token = token(args.token_file.as_deref())?;
    if !args.host.is_loopback() {
        let open = match token {
            Some(_) => "whoever reads the network's traffic sees the token, and all prompts and images",
            None => "ANYONE WHO REACHES IT CAN USE IT: there is no token (--token-file)",
        };
        report::warn(format_args!(
            "{} IS OPEN TO OTHER MACHINES, WITHOUT ENCRYPTION; {open}. Prefer 127.0.0.1 with an SSH tunnel or a reverse \
             proxy with TLS",
            args.host
        ));
    }
    let settings = Settings {
        host: args.host,
        port: args.port,
        names: args.allow_host.clone(),
        token,
        queue: args.queue.into(),
        max_batch: args.max_batch as usize,
        time_limit: Duration::from_secs(args.time_limit.into()),
        grace: Duration::from_secs(args.grace.into()),
    };
    api::run(settings, move || load(&args), |address, facts| announce(address, facts, json))
}

/// The token of the file, else of the environment.
fn token(file: Option<&Path>) -> Result<Option<String>> {
    let (text, place) = match file {
        Some(file) => {
            let text = bounded_read::read_text(file, TOKEN_FILE);
            let hint = "--token-file needs a text file with one line";
            (text.hint(format_args!("cannot read the token in {}", file.display()), hint)?, file.display().to_string())
        }
        None => match std::env::var(TOKEN) {
            Ok(text) => (text, TOKEN.to_owned()),
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => return Err(usage(format_args!("{TOKEN} is not UTF-8"), HINT)),
        },
    };
    let token = text.trim();
    let is_good = token.chars().count() >= TOKEN_LENGTH && token.bytes().all(|byte| byte.is_ascii_graphic());
    let message = format!("the token in {place} must have at least {TOKEN_LENGTH} ASCII characters without spaces");
    ensure!(is_good, usage(message, HINT));
    Ok(Some(token.to_owned()))
}

const HINT: &str = "for example: head -c 24 /dev/urandom | base64 > token.txt";

/// Loads the model; runs in the thread that owns it.
fn load(args: &Args) -> Result<Loaded> {
    let (bundle, models) = args.model.load()?;
    let is_demo = args.model.is_demo();
    let matcher = args.matcher.as_deref().unwrap_or(if is_demo { DEMO_NAME } else { "none" });
    let matching = match matcher {
        "none" => None,
        matcher => Some(Matching::open(&Bundle::open(matcher)?.matcher_folder()?)?),
    };
    let facts = ModelFacts {
        name: if is_demo { DEMO_NAME.to_owned() } else { bundle.config.name.clone() },
        image_size: models.image_tokenizer.image_size() as u32,
        rows: models.generator.grid().height,
        max_tokens: models.generator.max_text(),
        answers: bundle.config.train.vqa_batch_size > 0,
        scores: matching.is_some(),
        sampling: Sampling::from(&bundle.config.sample),
        is_demo,
    };
    Ok(Loaded { models, matching, facts })
}

fn announce(address: SocketAddr, facts: &ModelFacts, json: bool) {
    let url = format!("http://{address}/");
    if json {
        report::json(&json!({ "url": url, "address": address, "model": facts.name, "answers": facts.answers,
            "scores": facts.scores, "image_size": facts.image_size }));
    } else {
        report::result(&url);
    }
    report::note(format_args!("serving {} at {url}; Ctrl-C ends it", facts.name));
}
