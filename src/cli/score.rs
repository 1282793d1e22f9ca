//! `vilg score`

use super::model::MatcherOption;
use crate::{
    data::{image::open_image, resize_bicubic},
    error::{Result, ensure, failed, usage},
    generate::Matching,
    report,
};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Number of images that are read and embedded together.
const BATCH: usize = 64;

/// Say how well images match texts
#[derive(clap::Args)]
#[command(
    override_usage = "vilg score [OPTIONS] <IMG>... -- <TEXT>...",
    after_help = "Each image is compared with each text. The score is the probability, from 0 to 1, that the two are a \
    pair, if pairs and others were equally frequent; it needs a calibrated model (`vilg eval matcher --calibrate`). The \
    cosine of the two embeddings, from -1 to 1, is always printed. An image that cannot be read is reported and \
    skipped; the exit code is then 1."
)]
pub struct Args {
    /// Image files (PNG, JPEG, WebP, GIF, BMP, TIFF)
    #[arg(required = true, value_name = "IMG")]
    images: Vec<PathBuf>,
    /// Texts, after `--`
    #[arg(required = true, last = true, value_name = "TEXT")]
    texts: Vec<String>,
    #[command(flatten)]
    model: MatcherOption,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    let empty = args.texts.iter().any(|text| text.trim().is_empty());
    ensure!(!empty, usage("a text is empty", "write texts after `--`: vilg score moon.png -- 一弯月 太阳"));
    let (_, matching) = args.model.load()?;
    if !matching.is_calibrated() {
        report::warn(format_args!("{}; there are cosines but no scores", args.model.calibrate_hint()));
    }
    let texts = matching.embed_texts(&args.texts)?;
    let side = matching.image_size();
    let (mut unread, mut header) = (0, true);
    for paths in args.images.chunks(BATCH) {
        let (mut read, mut images) = (Vec::new(), Vec::new());
        for path in paths {
            match open_image(path) {
                Ok(image) => {
                    read.push(path.as_path());
                    // Resized at once: a batch of large images would fill the memory.
                    images.push(resize_bicubic(&image, side, side));
                }
                Err(e) => {
                    report::error(&e);
                    unread += 1;
                }
            }
        }
        let embeddings = matching.embed_images(&images)?;
        let cosines = match images.is_empty() {
            true => Vec::new(),
            false => Matching::cosines(&embeddings, &texts)?.to_vec2::<f32>()?,
        };
        print(&matching, &args.texts, read.iter().copied().zip(&cosines), header, json);
        header &= read.is_empty();
    }
    let message = format!("{unread} of {} images cannot be read", args.images.len());
    ensure!(unread == 0, failed(message, "the errors above say why; all other images have their scores"));
    Ok(())
}

fn print<'a>(
    matching: &Matching,
    texts: &[String],
    images: impl Iterator<Item = (&'a Path, &'a Vec<f32>)>,
    header: bool,
    json: bool,
) {
    let mut rows = Vec::new();
    for (path, cosines) in images {
        let pairs = || texts.iter().zip(cosines.iter().map(|cosine| f64::from(*cosine)));
        if json {
            let score = |(text, cosine): (&String, f64)| json!({ "text": text, "score": matching.score(cosine), "cosine": cosine });
            report::json(&json!({ "image": report::path(path), "scores": pairs().map(score).collect::<Vec<_>>() }));
        } else {
            rows.extend(pairs().map(|(text, cosine)| {
                let score = matching.score(cosine).map_or("-".to_owned(), |score| format!("{score:.3}"));
                vec![path.display().to_string(), score, format!("{cosine:.4}"), text.clone()]
            }));
        }
    }
    if !rows.is_empty() {
        report::table(if header { &["image", "score", "cosine", "text"] } else { &[] }, &rows);
    }
}
