//! `vilg t2i`

use super::{model::ModelOptions, sampling::Options};
use crate::{
    data::picture::{grid, write_png},
    error::{Result, ensure, usage},
    generate::{Job, Models, Painting},
    report,
};
use image::RgbImage;
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

/// Paint a line of Chinese
#[derive(clap::Args)]
#[command(
    after_help = "The same prompt, seed, options and model give the same picture. With --best-of, and in the JSON as \
    `score`, the model itself judges: the mean log-probability of a token of the prompt, given the picture."
)]
pub struct Args {
    /// What to paint, e.g. 细腻风格的女宇航员; several prompts go into one grid
    #[arg(required = true, value_name = "TEXT")]
    texts: Vec<String>,
    /// The PNG file to write
    #[arg(short, long, value_name = "FILE", default_value = "picture.png")]
    output: PathBuf,
    /// Number of pictures of each prompt; more than one are laid out in a grid
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    number: u32,
    /// Write each picture to a file of its own: FILE-1.png, FILE-2.png, …
    #[arg(long)]
    each: bool,
    /// Paint so many candidates for each picture and keep the one that fits the prompt best
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    best_of: u32,
    #[command(flatten)]
    sampling: Options,
    /// Seed of each prompt's first picture; the others count up from it
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    ensure!(args.texts.iter().all(|text| !text.trim().is_empty()), empty_prompt());
    let png = args.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    let message = format!("-o {}: pictures are written as PNG files", args.output.display());
    ensure!(png, usage(message, format_args!("name it {}", args.output.with_extension("png").display())));
    let (bundle, models) = args.model.load()?;
    args.texts.iter().try_for_each(|text| check_prompt(&models, text))?;

    let seeds = || (0..u64::from(args.number)).map(|i| args.seed.wrapping_add(i));
    let job = |prompt: &String, seed| Job { prompt: prompt.clone(), seed };
    let jobs: Vec<Job> = args.texts.iter().flat_map(|text| seeds().map(move |seed| job(text, seed))).collect();
    let sampling = args.sampling.over(&bundle.config.sample);
    let codes = models.generator.grid().len() as u64 * jobs.len() as u64 * u64::from(args.best_of);
    let bar = report::bar(codes, "painting");
    let begun = Instant::now();
    let paintings = models.paint(&jobs, &sampling, args.best_of as usize, |codes| bar.inc(codes))?;
    let tokens_per_second = codes as f64 / begun.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let paths = write(&args, &paintings)?;
    if json {
        let image = |((path, job), painting): ((&PathBuf, &Job), &Painting)| json!({ "path": path.display().to_string(), "prompt": job.prompt, "seed": job.seed, "score": painting.score });
        let images: Vec<_> = paths.iter().zip(&jobs).zip(&paintings).map(image).collect();
        report::json(&json!({ "images": images, "tokens_per_second": tokens_per_second }));
    } else {
        let mut shown = paths;
        shown.dedup();
        shown.iter().for_each(|path| report::result(path.display()));
    }
    Ok(())
}

/// Writes the pictures; returns the file of each.
fn write(args: &Args, paintings: &[Painting]) -> Result<Vec<PathBuf>> {
    if args.each && paintings.len() > 1 {
        let paths = (1..=paintings.len()).map(|i| numbered(&args.output, i));
        let write = |(path, painting): (PathBuf, &Painting)| write_png(&path, &painting.picture).map(|()| path);
        return paths.zip(paintings).map(write).collect();
    }
    let pictures: Vec<RgbImage> = paintings.iter().map(|painting| painting.picture.clone()).collect();
    match pictures.as_slice() {
        [picture] => write_png(&args.output, picture)?,
        pictures => write_png(&args.output, &grid(pictures, 0))?,
    }
    Ok(vec![args.output.clone(); paintings.len()])
}

/// `a/b.png` → `a/b-3.png`
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{number}.png"));
    path.with_file_name(name)
}

fn empty_prompt() -> crate::error::Error {
    usage("the prompt is empty", "say what to paint: vilg t2i 现代风格的彩虹")
}

/// Warns of what the model will not see of the prompt.
fn check_prompt(models: &Models, prompt: &str) -> Result<()> {
    let (text, longest) = (&models.text, models.generator.max_text());
    let seen = text.encode(prompt, longest)?;
    let tokens = &seen[1..seen.len() - 1];
    ensure!(!tokens.is_empty(), empty_prompt());
    let quoted = match prompt.char_indices().nth(20) {
        Some((end, _)) => format!("“{}…”", &prompt[..end]),
        None => format!("“{prompt}”"),
    };
    if text.encode(prompt, longest + 1)?.len() > longest {
        report::warn(format_args!("{quoted} is longer than {} tokens; the rest is not seen", longest - 2));
    }
    let unknown = tokens.iter().filter(|&&token| token == text.unk()).count();
    if unknown == tokens.len() {
        report::warn(format_args!("the model knows no word of {quoted}; it was trained on Chinese"));
    } else if unknown > 0 {
        report::warn(format_args!("the model does not know {unknown} of the {} tokens of {quoted}", tokens.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_files() {
        assert_eq!(numbered(Path::new("a.b/月.x.PNG"), 12), Path::new("a.b/月.x-12.png"));
        assert_eq!(numbered(Path::new("moon.png"), 1), Path::new("moon-1.png"));
    }
}
