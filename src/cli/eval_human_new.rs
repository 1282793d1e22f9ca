//! `vilg eval human new`

use crate::{
    error::{Hint, Result, ensure, usage},
    eval::human::{
        create,
        draft::{Draft, Output, System},
        input::{self, Source},
        kind::Kind,
    },
    report,
};
use serde_json::json;
use std::path::{Path, PathBuf};

/// The name of people among the systems.
const HUMAN: &str = "human";

/// Make a study of images, captions or answers; images are stored in its file
#[derive(clap::Args)]
#[command(
    after_help = "Name a system with NAME=PATH; without NAME=, it has the name of its folder or file. Raters never see names. \
    Repeat the option to compare systems: images of all systems for a prompt stand side by side, in an order that differs by \
    rater and prompt.\n\n\
    PROMPTS is a table (.tsv, .csv, .jsonl, .parquet) with the columns `prompt` and, where known, `aspect` and `id`, or a text \
    file with one prompt on each line. The image of a prompt has its id, or else its number in the file, as its name or at \
    the end of its name, as `vilg t2i --each` numbers images.\n\n\
    Captions are results in COCO's format or the lines of `vilg caption --json`, answers the lines of `vilg vqa --json`. \
    People's answers have the same format, or are the `questions` of samples.\n\n\
    Examples:\n  \
    vilg eval human new images.db --images ours=ours/ --images other=other/ --prompts prompts.tsv\n  \
    vilg eval human new captions.db --captions ours=captions.jsonl --human people.json\n  \
    vilg eval human new answers.db --answers ours=answers.jsonl --human data/scenes/test"
)]
pub struct Args {
    /// Study file to write; an existing file is never replaced
    #[arg(value_name = "STUDY")]
    study: PathBuf,
    /// Folder with one image of a system for each prompt
    #[arg(long, value_name = "[NAME=]DIR", requires = "prompts",
        required_unless_present_any = ["captions", "answers"], conflicts_with_all = ["captions", "answers", "human"])]
    images: Vec<String>,
    /// Prompts of the images
    #[arg(long, value_name = "PROMPTS", requires = "images")]
    prompts: Option<PathBuf>,
    /// JSON file with the captions of a system
    #[arg(long, value_name = "[NAME=]FILE", conflicts_with = "answers")]
    captions: Vec<String>,
    /// Folder of the captioned images, whose names or numbers are the ids of the captions [default: ids are paths]
    #[arg(long, value_name = "DIR", requires = "captions")]
    image_folder: Option<PathBuf>,
    /// JSON lines with the answers of a system
    #[arg(long, value_name = "[NAME=]FILE", requires = "human")]
    answers: Vec<String>,
    /// Captions or answers of people: a file of the same format; for answers also shards, or a folder of samples
    #[arg(long, value_name = "FILE|SRC")]
    human: Option<PathBuf>,
    /// Number of raters; each gets a link
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000),
        allow_negative_numbers = true)]
    raters: u32,
    /// Number of prompts, images or questions to rate, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    samples: usize,
    /// Title that raters see; must not tell which systems are compared [default: 人工评测 Human evaluation]
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// Random seed of the order of pages and of the sides of images, and of --samples [default: a random one]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => getrandom::u64().hint("the system gives no random numbers", "choose a seed with --seed")?,
    };
    let (kind, sources) = sources(args)?;
    let items = match kind {
        Kind::Images => input::images(&sources, args.prompts.as_deref().unwrap_or(Path::new("")))?,
        Kind::Captions => input::captions(&sources, args.image_folder.as_deref())?,
        Kind::Answers => input::answers(&sources)?,
    };
    let title = args.title.clone().unwrap_or_else(|| "人工评测 Human evaluation".to_owned());
    let systems = sources.into_iter().map(|Source { name, is_human, .. }| System { name, is_human });
    let mut draft = Draft { kind, title, seed, raters: args.raters, systems: systems.collect(), items };
    draft.choose(args.samples);
    draft.check()?;
    warn(&draft);
    let bar = report::bar(draft.items.len() as u64, "storing");
    create(&args.study, &draft, || bar.inc(1))?;
    bar.finish_and_clear();
    print(args, &draft, json);
    Ok(())
}

fn sources(args: &Args) -> Result<(Kind, Vec<Source>)> {
    let (kind, paths) = match (&args.images[..], &args.captions[..]) {
        ([_, ..], _) => (Kind::Images, &args.images),
        (_, [_, ..]) => (Kind::Captions, &args.captions),
        _ => (Kind::Answers, &args.answers),
    };
    let mut sources = paths.iter().map(|text| source(text)).collect::<Result<Vec<_>>>()?;
    sources.extend(args.human.iter().map(|path| Source { name: HUMAN.to_owned(), path: path.clone(), is_human: true }));
    Ok((kind, sources))
}

/// `NAME=PATH`, or a path with its own name.
fn source(text: &str) -> Result<Source> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) => (name.trim().to_owned(), path),
        None => (Path::new(text).file_stem().map_or(String::new(), |name| name.to_string_lossy().into_owned()), text),
    };
    let named = !name.is_empty() && !path.is_empty();
    ensure!(named, usage(format_args!("`{text}` names no system"), "write NAME=PATH, such as ours=images/"));
    Ok(Source { name, path: PathBuf::from(path), is_human: false })
}

fn warn(draft: &Draft) {
    if draft.raters < 3 {
        report::warn("fewer than three raters: their agreement says little, and the paper has three");
    }
    let outputs = draft.items.iter().flat_map(|item| &item.outputs);
    let empty = outputs.filter(|output| matches!(output, Output::Text(text) if text.trim().is_empty())).count();
    if empty > 0 {
        report::warn(format_args!("{empty} texts are empty; raters will see “（空）(empty)”"));
    }
}

fn print(args: &Args, draft: &Draft, json: bool) {
    let (study, systems) = (args.study.display(), draft.systems.len());
    let pages = if draft.kind == Kind::Images { draft.items.len() } else { draft.items.len() * systems };
    if json {
        let names: Vec<&str> = draft.systems.iter().map(|system| system.name.as_str()).collect();
        report::json(&json!({ "study": report::path(&args.study), "kind": draft.kind, "items": draft.items.len(),
            "systems": names, "raters": draft.raters, "pages": pages, "seed": draft.seed }));
    } else {
        report::result(format_args!("{study}: {pages} pages for each of {} raters", draft.raters));
    }
    report::note(format_args!("next: vilg eval human serve {study}\nthen: vilg eval human report {study}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_have_names() {
        let named = |text: &str| source(text).map(|source| (source.name, source.path)).ok();
        let pair = |name: &str, path: &str| Some((name.to_owned(), PathBuf::from(path)));
        assert_eq!(named("ours=a/b=c"), pair("ours", "a/b=c"));
        assert_eq!(named("runs/ours/"), pair("ours", "runs/ours/"));
        assert_eq!(named("a/captions.jsonl"), pair("captions", "a/captions.jsonl"));
        for wrong in ["", "=a", "ours=", "..", "/"] {
            assert_eq!(named(wrong), None, "{wrong}");
        }
    }
}
