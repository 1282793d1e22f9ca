//! `vilg config`

use super::{config_files::Found, summary::Summary};
use crate::{
    config::{Config, Loaded, Origin, values},
    error::{Context, Result, ensure, usage},
    report,
    train::sizes::Sizes,
};
use clap::{Subcommand, ValueEnum};
use serde_json::json;
use std::{fs::OpenOptions, io::Write, path::Path, path::PathBuf};

/// Show, check or start a configuration
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print every value and where it comes from, then parameters, sequence layout and layers
    Show(Source),
    /// Check the values and paths of a configuration; exit code 2 on an error, warnings for paths that do not exist
    Check(Source),
    /// Print a commented configuration to start from
    Init {
        /// Name of the example
        #[arg(value_enum, default_value = "emoji")]
        name: Example,
        /// Write it to this file instead; an existing file is never replaced
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// Where a configuration comes from.
#[derive(clap::Args)]
pub struct Source {
    /// Configuration file; keys that it does not set have built-in defaults. `train` and `plan` need it or --set
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a value, e.g. `--set train.steps=100`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl Source {
    /// The configuration, for commands that need more than the built-in defaults; the hint names `example`.
    pub fn load(&self, example: &str) -> Result<Config> {
        let hint = format!("`vilg config init {example} -o {example}.toml` writes one to start from");
        ensure!(self.config.is_some() || !self.sets.is_empty(), usage("--config is missing", hint));
        Config::load(self.config.as_deref(), &self.sets)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Example {
    /// The demo's generator
    Emoji,
    /// The demo's image tokenizer
    EmojiTokenizer,
    /// The same sizes with VQGAN's perceptual loss and adversary
    EmojiVqgan,
    /// DALL-E's dVAE in small
    EmojiDvae,
    /// The paper's image tokenizer
    #[value(name = "vqgan-f8-8192")]
    VqganF8,
    /// DALL-E's dVAE, the paper's other image tokenizer
    #[value(name = "dvae-f8-8192")]
    DvaeF8,
    /// 24 layers × 1024 (the paper's analysis model)
    #[value(name = "300m")]
    M300,
    /// 48 layers × 4096 (the paper's model)
    #[value(name = "10b")]
    B10,
}

impl Example {
    fn text(self) -> &'static str {
        match self {
            Self::Emoji => include_str!("../../configs/emoji.toml"),
            Self::EmojiTokenizer => include_str!("../../configs/emoji-tokenizer.toml"),
            Self::EmojiVqgan => include_str!("../../configs/emoji-vqgan.toml"),
            Self::VqganF8 => include_str!("../../configs/vqgan-f8-8192.toml"),
            Self::EmojiDvae => include_str!("../../configs/emoji-dvae.toml"),
            Self::DvaeF8 => include_str!("../../configs/dvae-f8-8192.toml"),
            Self::M300 => include_str!("../../configs/300m.toml"),
            Self::B10 => include_str!("../../configs/10b.toml"),
        }
    }
}

pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Show(source) => show(&source, json),
        Command::Check(source) => check(&source, json),
        Command::Init { name, output: None } => {
            report::bytes(name.text().as_bytes());
            Ok(())
        }
        Command::Init { name, output: Some(path) } => init(name, &path),
    }
}

fn init(example: Example, path: &Path) -> Result<()> {
    let place = || format!("cannot write {}", path.display());
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => file.write_all(example.text().as_bytes()).with_context(place)?,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(usage(format_args!("{} exists and is kept", path.display()), "choose another name with -o"));
        }
        Err(e) => return Err(e).with_context(place),
    }
    report::note(format_args!("wrote {}; next: vilg train --config {0}", path.display()));
    Ok(())
}

fn check(source: &Source, json: bool) -> Result<()> {
    let loaded = Loaded::read(source.config.as_deref(), &source.sets)?;
    let problems = loaded.problems()?.into_iter();
    let mut problems: Vec<_> = problems.map(|problem| (problem.message, problem.hint)).collect();
    // Wrong values first: what they name is not worth a look.
    let found = if problems.is_empty() { Found::of(&loaded.config) } else { Found::default() };
    problems.extend(found.wrong.into_iter().map(|what| (what, "correct the path in the configuration".to_owned())));
    let missing = found.missing;
    if json {
        let list: Vec<_> = problems.iter().map(|(message, hint)| json!({ "message": message, "hint": hint })).collect();
        report::json(&json!({ "ok": list.is_empty(), "problems": list, "warnings": missing }));
    } else if problems.is_empty() {
        let warnings = if missing.len() == 1 { "1 warning".to_owned() } else { format!("{} warnings", missing.len()) };
        report::result(if missing.is_empty() { "ok".to_owned() } else { format!("ok, with {warnings}") });
    }
    missing.iter().for_each(report::warn);
    let Some(((message, hint), others)) = problems.split_last() else { return Ok(()) };
    for (message, hint) in others {
        report::error(&usage(message, hint));
    }
    Err(usage(message, hint))
}

fn show(source: &Source, json: bool) -> Result<()> {
    let loaded = Loaded::read(source.config.as_deref(), &source.sets)?;
    if let Some(problem) = loaded.problems()?.into_iter().next() {
        return Err(usage(problem.message, problem.hint));
    }
    let summary = Summary::new(&loaded.config, &Sizes::of(&loaded.config)?);
    let rows = values(&loaded.config)?.into_iter().map(|(key, value)| {
        let from = match loaded.origin(&key) {
            Origin::Default => "default",
            Origin::File => "file",
            Origin::Set => "--set",
        };
        (key, value, from)
    });
    if json {
        let values: serde_json::Map<_, _> =
            rows.map(|(key, value, from)| (key, json!({"value": value, "from": from}))).collect();
        report::json(&json!({"values": values, "summary": summary}));
    } else {
        let rows: Vec<_> = rows.map(|(key, value, from)| vec![key, from.to_owned(), value.to_string()]).collect();
        report::table(&["key", "from", "value"], &rows);
        summary.print();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::collections::BTreeSet;

    #[test]
    fn shipped_configurations_are_valid_and_commented() {
        let mut shown = BTreeSet::new();
        for example in Example::value_variants() {
            let name = example.to_possible_value().unwrap().get_name().to_owned();
            let config = Config::parse(example.text(), &name).unwrap();
            config.validate().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(config.name, name);
            for line in example.text().lines().filter(|l| l.contains(" = ")) {
                assert!(line.contains("  # "), "{name}: no comment: {line}");
            }
            let table: toml::Table = toml::from_str(example.text()).unwrap();
            let keys = table.iter().flat_map(|(section, value)| match value.as_table() {
                Some(keys) => keys.keys().map(|key| format!("{section}.{key}")).collect(),
                None => vec![section.clone()],
            });
            shown.extend(keys);
        }
        let all: BTreeSet<_> = values(&Config::default()).unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(shown, all, "keys that no shipped configuration shows");
    }

    /// The generator's file repeats what decides its grid; it must agree with the tokenizer's own file.
    #[test]
    fn the_demo_s_two_files_agree() {
        let side = |example: Example| {
            let t = Config::parse(example.text(), "").unwrap().image_tokenizer;
            (t.image_size, t.channel_multipliers, t.codebook_size, t.attention_sides)
        };
        assert_eq!(side(Example::Emoji), side(Example::EmojiTokenizer));
    }
}
