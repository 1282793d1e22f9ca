//! `vilg t2i`

use super::{
    demo_check::PromptCheck, model::ModelOptions, output, prompts, ranking::RankingOptions, sampling::Options,
};
use crate::{
    data::{
        image::open_square,
        image_file::{grid, png, write_png},
        label::labelled,
        resize_bicubic,
    },
    error::{Result, ensure, usage},
    generate::{GeneratedImage, Models, Reconstructor, Request},
    report,
};
use image::RgbImage;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

/// Maximum number of images in a grid.
const MAX_GRID: usize = 1024;
/// Number of images that `--each` generates before it writes them.
const CHUNK: usize = 64;

/// Generate images from Chinese text
#[derive(clap::Args)]
#[command(after_help = "The same prompt, seed, options and model give the same image. The candidates of --best-of \
    are ranked by `score` (also in the JSON, with those of all candidates): by the mean log probability of a prompt token \
    given the image, or by a matcher (--matcher).\n\n\
    Examples:\n  \
    vilg t2i 一轮弯月，扁平风格 -o moon.png\n  \
    vilg t2i --prompts prompts.txt --each -o images/moon.png\n  \
    vilg t2i 戴眼镜的笑脸 --complete face.png --rows 4 -o glasses.png\n  \
    echo 红苹果 | vilg t2i - -o - | display")]
pub struct Args {
    /// Prompt, e.g. 细腻风格的女宇航员; the images of several prompts form one grid. `-`: read prompts from the lines of stdin
    #[arg(required_unless_present = "prompts", value_name = "TEXT")]
    texts: Vec<String>,
    /// Text file with one prompt on each line (UTF-8, at most 16 MB); `-`: stdin
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// PNG file to write; `-`: stdout
    #[arg(short, long, value_name = "FILE", default_value = "image.png")]
    output: PathBuf,
    /// Number of images for each prompt; several images form a grid
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024),
        allow_negative_numbers = true)]
    number: u32,
    /// Write each image to its own file: FILE-1.png, FILE-2.png, …
    #[arg(long)]
    each: bool,
    /// Enlarge the images N times (bicubic)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8),
        allow_negative_numbers = true)]
    scale: u32,
    /// Write each image's prompt below it
    #[arg(long)]
    labels: bool,
    #[command(flatten)]
    ranking: RankingOptions,
    #[command(flatten)]
    sampling: Options,
    /// With guidance: a text that the image should not show
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// Keep the upper rows of this image and generate the rest
    #[arg(long, value_name = "IMG")]
    complete: Option<PathBuf>,
    /// With --complete: number of rows of codes to keep [default: half of them]
    #[arg(long, value_name = "N", requires = "complete", allow_negative_numbers = true)]
    rows: Option<usize>,
    /// What makes pixels of the generated codes [default: end-to-end if the model has such a reconstructor, else two-stage]
    #[arg(long, value_enum, value_name = "WHICH")]
    reconstructor: Option<Reconstructor>,
    /// Random seed of each prompt's first image; the next images use the next seeds
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let texts = prompts::collect(&args.texts, args.prompts.as_deref())?;
    let count = texts.len() * args.number as usize;
    check_output(&args, count, json)?;
    let (bundle, mut models) = args.model.load()?;
    if let Some(reconstructor) = args.reconstructor {
        models = models.with_reconstructor(reconstructor)?;
    }
    let ranker = args.ranking.load()?;
    let mut check = PromptCheck::new(&models, &texts, args.model.is_demo())?;

    let seeds = || (0..u64::from(args.number)).map(|i| args.seed.wrapping_add(i));
    let given = args.complete.as_ref().map_or(Ok(Vec::new()), |image| upper_rows(&models, image, args.rows))?;
    let negative = args.negative.clone().unwrap_or_default();
    let request = |prompt: &String, seed| Request {
        prompt: prompt.clone(),
        seed,
        negative: negative.clone(),
        given: given.clone(),
    };
    let requests: Vec<Request> = texts.iter().flat_map(|text| seeds().map(move |seed| request(text, seed))).collect();
    let sampling = args.sampling.over(&bundle.config.sample)?;
    let hint = "set a guidance scale above 1, such as --guidance 2";
    ensure!(args.negative.is_none() || sampling.is_guided(), usage("--negative has no effect without guidance", hint));
    report::detail(format_args!("{} images, best of {}, {sampling:?}", requests.len(), args.ranking.best_of));
    let codes = models.generator.grid().len() as u64 * requests.len() as u64 * u64::from(args.ranking.best_of);
    let bar = report::bar(codes, "generating");
    let begun = Instant::now();
    // Separate files are written in chunks, so that memory does not grow with the number of images.
    let each = args.each && requests.len() > 1;
    let chunk = if each { CHUNK } else { requests.len() };
    let (mut images, mut seconds) = (Vec::new(), 0.0);
    for (i, requests) in requests.chunks(chunk).enumerate() {
        let begun = Instant::now();
        let generated = models.generate_images(requests, &sampling, &ranker.best_of(), |codes| bar.inc(codes))?;
        seconds += begun.elapsed().as_secs_f64();
        let finished = finished(requests, &generated, args.scale, args.labels);
        let paths = match each {
            true => write_each(&args.output, &finished, i * chunk)?,
            false => write_grid(&args.output, &finished)?,
        };
        let matches = check.images(requests, &generated)?;
        let of_image = paths.iter().zip(requests).zip(&generated).zip(matches);
        images.extend(of_image.map(|(((path, request), image), score)| image_json(path, request, image, score)));
        if !json && !to_stdout(&args.output) {
            let mut shown = paths;
            shown.dedup();
            bar.suspend(|| shown.iter().for_each(|path| report::result(path.display())));
        }
    }
    bar.finish_and_clear();
    report::detail(format_args!("done in {:.1} s", begun.elapsed().as_secs_f64()));
    if json {
        report::json(&json!({ "images": images, "tokens_per_second": codes as f64 / seconds }));
    }
    Ok(())
}

/// The codes of an image's upper rows: as many as `rows`, or half of them.
fn upper_rows(models: &Models, image: &Path, rows: Option<usize>) -> Result<Vec<u32>> {
    let grid = models.generator.grid();
    let rows = rows.unwrap_or(grid.height / 2);
    let message = format!("--rows {rows}: an image has {} rows of codes", grid.height);
    ensure!((1..grid.height).contains(&rows), usage(message, format_args!("keep 1 to {} rows", grid.height - 1)));
    let image = open_square(image, models.image_tokenizer.image_size())?;
    let mut codes = models.encode(&[image])?.pop().unwrap_or_default();
    codes.truncate(rows * grid.width);
    Ok(codes)
}

/// Whether `-o` means stdout.
fn to_stdout(output: &Path) -> bool {
    output == Path::new("-")
}

/// Checks the output before the work begins.
fn check_output(args: &Args, count: usize, json: bool) -> Result<()> {
    let several = args.each && count > 1;
    let hint = "--each writes each image to a file of its own";
    let most = MAX_GRID / args.scale.pow(2) as usize;
    let message = match args.scale {
        1 => format!("{count} images are too many for a grid, which takes {most}"),
        scale => format!("{count} images are too many for a grid, which takes {most} with --scale {scale}"),
    };
    ensure!(several || count <= most, usage(message, hint));
    if to_stdout(&args.output) {
        let clash = |what| usage(format_args!("-o - and {what} both write to stdout"), "name a file with -o");
        ensure!(!json, clash("--json"));
        ensure!(!several, usage("-o - takes one image, --each writes several", "name a file with -o"));
        ensure!(
            !report::stdout_is_terminal(),
            usage("a terminal cannot show a PNG", "name a file with -o, or use a pipe")
        );
        return Ok(());
    }
    let png = args.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    let message = format!("-o {}: images are written as PNG files", args.output.display());
    ensure!(png, usage(message, format_args!("name it {}", args.output.with_extension("png").display())));
    output::check(&if several { numbered(&args.output, 1) } else { args.output.clone() }, "-o")
}

/// The JSON object of one image.
fn image_json(path: &Path, request: &Request, generated: &GeneratedImage, matches: Option<f64>) -> Value {
    let GeneratedImage { codes, candidate, scores, .. } = generated;
    json!({ "path": report::path(path), "prompt": request.prompt, "seed": request.seed, "score": generated.score(),
        "match": matches, "candidate": candidate, "candidates": scores, "codes": codes })
}

/// The images as they are written: each side `scale` times as long, with `labels` the prompt below.
fn finished(requests: &[Request], generated: &[GeneratedImage], scale: u32, labels: bool) -> Vec<RgbImage> {
    let enlarge = |image: &RgbImage| resize_bicubic(image, image.width() * scale, image.height() * scale);
    let images: Vec<RgbImage> = generated.iter().map(|generated| enlarge(&generated.image)).collect();
    if !labels {
        return images;
    }
    let prompts: Vec<&str> = requests.iter().map(|request| request.prompt.as_str()).collect();
    labelled(&images, &prompts)
}

/// Writes each image to its own file and returns the files. `before` images have already been written.
fn write_each(output: &Path, images: &[RgbImage], before: usize) -> Result<Vec<PathBuf>> {
    let paths = (before + 1..).map(|i| numbered(output, i));
    let write = |(path, image): (PathBuf, &RgbImage)| write_png(&path, image).map(|()| path);
    paths.zip(images).map(write).collect()
}

/// Writes the only image, or a grid of all images; returns the file of each image.
fn write_grid(output: &Path, images: &[RgbImage]) -> Result<Vec<PathBuf>> {
    let sheet = match images {
        [image] => image,
        images => &grid(images, 0),
    };
    match to_stdout(output) {
        true => report::bytes(&png(sheet)?),
        false => write_png(output, sheet)?,
    }
    Ok(vec![output.to_owned(); images.len()])
}

/// `a/b.png` → `a/b-3.png`
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{number}.png"));
    path.with_file_name(name)
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
