//! `vilg config`

use super::{config_files::Found, summary::Summary};
use crate::{
    config::{Config, Loaded, Origin, shipped, values},
    error::{Context, Result, ensure, usage},
    report,
    train::sizes::Sizes,
};
use clap::{Subcommand, ValueEnum};
use serde_json::json;
use std::{fs::OpenOptions, io::Write, path::Path, path::PathBuf};

/// Show, check or create a configuration
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print every value and where it is set, then parameter counts, sequence layout and attention layers
    Show(Source),
    /// Check the values and the paths of a configuration. Exit code 2 on an error; a path that does not exist is a
    /// warning
    Check(Source),
    /// Print a commented example configuration to start from
    Init {
        /// Name of the example
        #[arg(value_enum, default_value = "emoji")]
        name: Example,
        /// Write to this file instead of stdout; an existing file is never replaced
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// The options that select a configuration.
#[derive(clap::Args)]
pub struct Source {
    /// Configuration file (TOML); keys that it does not set keep their defaults. `train` and `plan` need --config or
    /// --set
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override one value, e.g. `--set train.steps=100`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl Source {
    /// Loads the configuration for commands that need more than the built-in defaults. `example` is the configuration
    /// that the hint of the error recommends.
    ///
    /// # Errors
    /// Neither --config nor --set is given, or the configuration cannot be read.
    pub fn load(&self, example: &str) -> Result<Config> {
        let hint = format!("`vilg config init {example} -o {example}.toml` writes one to start from");
        ensure!(self.config.is_some() || !self.sets.is_empty(), usage("--config is missing", hint));
        Config::load(self.config.as_deref(), &self.sets)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Example {
    /// Generator of the demo
    Emoji,
    /// Image tokenizer of the demo (f = 8, no discriminator)
    EmojiTokenizer,
    /// Image tokenizer of the demo with VQGAN's perceptual and adversarial losses
    EmojiVqgan,
    /// DALL-E's dVAE at the size of the demo
    EmojiDvae,
    /// Low-rank adapters (LoRA) for the demo
    EmojiLora,
    /// The paper's image tokenizer: VQGAN, f = 8, 8192 codes
    #[value(name = "vqgan-f8-8192")]
    VqganF8,
    /// The paper's second image tokenizer: DALL-E's dVAE, f = 8, 8192 codes
    #[value(name = "dvae-f8-8192")]
    DvaeF8,
    /// A generator of scenes, poems and emoji of 128 x 128 pixels
    Scenes,
    /// Its image tokenizer
    ScenesTokenizer,
    /// A small generator of scenes with a reconstructor of its own, trained end to end
    ScenesEndToEnd,
    /// Its two-stage twin
    ScenesTwoStage,
    /// Questions about scenes: fine-tunes the two-stage generator
    ScenesVqa,
    /// A small image–text matcher for emoji and scenes
    ScenesMatcher,
    /// The full-size image–text matcher: ViT-B/16 at 224 pixels
    Matcher,
    /// The paper's analysis model: 24 layers, hidden size 1024
    #[value(name = "300m")]
    M300,
    /// The same, trained end to end with a dVAE's decoder: the paper's ablation
    #[value(name = "300m-end-to-end")]
    M300EndToEnd,
    /// The paper's full model: 48 layers, hidden size 4096
    #[value(name = "10b")]
    B10,
    /// Fine-tuning to generate images of COCO's translated captions
    FinetuneCoco,
    /// Fine-tuning to caption, on AIC-ICC
    FinetuneAicIcc,
    /// Fine-tuning to caption, on COCO-CN
    FinetuneCocoCn,
    /// Fine-tuning to answer questions, on FMIQA
    FinetuneFmiqa,
}

impl Example {
    fn text(self) -> &'static str {
        let name = self.to_possible_value();
        name.and_then(|name| shipped(name.get_name())).map_or("", |(_, text)| text)
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
    // Paths are checked only when all values are valid: an invalid `task` would name the wrong paths.
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
            Origin::Base => loaded.file(&key).unwrap_or_default(),
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
    use crate::config::{Config, SHIPPED};
    use std::collections::BTreeSet;

    #[test]
    fn shipped_configurations_are_valid_and_commented() {
        let mut shown = BTreeSet::new();
        for example in Example::value_variants() {
            let name = example.to_possible_value().unwrap().get_name().to_owned();
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("config.toml");
            init(*example, &file).unwrap();
            let config = Config::load(Some(&file), &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
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
        assert!(shown.remove("extends"));
        assert_eq!(SHIPPED.len(), Example::value_variants().len());
        let all: BTreeSet<_> = values(&Config::default()).unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(shown, all, "keys that no shipped configuration shows");
    }

    /// The generator's file repeats the keys that decide its grid of codes; they must agree with the tokenizer's own
    /// file.
    #[test]
    fn the_demo_s_two_files_agree() {
        let side = |example: Example| {
            let t = Config::parse(example.text(), "").unwrap().image_tokenizer;
            (t.image_size, t.channel_multipliers, t.codebook_size, t.attention_sides)
        };
        assert_eq!(side(Example::Emoji), side(Example::EmojiTokenizer));
    }
}
