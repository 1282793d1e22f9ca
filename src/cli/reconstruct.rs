//! `vilg reconstruct`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    data::{
        image::{from_pixels, open_image, square, to_pixels},
        image_file, keys, paths,
    },
    error::{Result, ensure, failed, usage},
    eval::similarity::psnr,
    generate::{Models, Reconstructor},
    ops::packed::Format,
    report,
    tokenizer::ImageTokenizer,
};
use image::RgbImage;
use serde_json::json;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Encode images as image codes and decode them again: the upper bound of what the transformer can generate
#[derive(clap::Args)]
#[command(
    after_help = "If IMAGE is a folder, every image in it and in its subfolders is written to the folder -o, as a PNG named by \
    its path with dots replaced (`x.jpg` and `x.png` become `x.png` and `x_png.png`). Images that cannot be read are reported, \
    and the exit code is then 1. A source image is never overwritten."
)]
pub struct Args {
    /// Image file, or folder of images
    image: PathBuf,
    /// PNG file to write, or folder if IMAGE is a folder
    #[arg(short, long, value_name = "FILE|DIR", default_value = "reconstruction.png")]
    output: PathBuf,
    /// Process whole images at their own size (at most 8192x8192 pixels) in tiles, instead of their central squares
    #[arg(long)]
    whole: bool,
    /// Decode by the reconstructor of an end-to-end generator, from its hidden states over the codes and the caption
    #[arg(long, requires = "caption", conflicts_with = "whole")]
    through_generator: bool,
    /// Caption of the image, with --through-generator
    #[arg(long, value_name = "TEXT", requires = "through_generator")]
    caption: Option<String>,
    /// Model folder with the image tokenizer
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let bundle = Bundle::open(&args.model)?;
    if !args.image.is_dir() {
        let same = same_file(&args.image, &args.output);
        ensure!(
            !same,
            usage(format_args!("{} is the image itself", args.output.display()), "name another file with -o")
        );
        return match &args.caption {
            Some(caption) => through_generator(&bundle, caption, &args.image, &args.output, json),
            None => one(&bundle.image_tokenizer()?, &args.image, &args.output, args.whole, json),
        };
    }
    let hint = "name one image: each image of a folder has a caption of its own";
    ensure!(!args.through_generator, usage("--caption is of one image", hint));
    let tokenizer = bundle.image_tokenizer()?;
    let hint = "name a folder with -o: each image is written there under its own name";
    let folder = args.output.is_dir() || args.output.extension().is_none();
    ensure!(folder, usage(format_args!("{} is not a folder", args.output.display()), hint));
    let found = paths::find(&args.image.display().to_string())?;
    if found.bad.total() > 0 {
        report::warn(format_args!("left out: {}", found.bad));
    }
    let images = found.images;
    let hint = "`vilg eval recon` measures tar shards";
    ensure!(!images.is_empty(), usage(format_args!("no images in {}", args.image.display()), hint));
    let keys = keys(images.iter().map(|(_, below)| below.as_path()));
    let outputs: Vec<PathBuf> = keys.iter().map(|key| args.output.join(format!("{key}.png"))).collect();
    let sources: BTreeSet<PathBuf> = images.iter().filter_map(|(image, _)| image.canonicalize().ok()).collect();
    let source = |output: &&PathBuf| output.canonicalize().is_ok_and(|path| sources.contains(&path));
    if let Some(output) = outputs.iter().find(source) {
        let message = format!("{} is one of the images and would be overwritten", output.display());
        return Err(usage(message, "name another folder with -o"));
    }
    let mut unread = 0;
    for ((image, _), output) in images.iter().zip(&outputs) {
        if let Err(e) = one(&tokenizer, image, output, args.whole, json) {
            report::error(&e);
            unread += 1;
        }
    }
    let message = format!("{unread} of {} images were not reconstructed", images.len());
    ensure!(unread == 0, failed(message, "the others are complete"));
    Ok(())
}

/// Reconstructs an image by an end-to-end generator, from the codes of the image itself.
fn through_generator(bundle: &Bundle, caption: &str, image: &Path, output: &Path, json: bool) -> Result<()> {
    let models = Models::load(bundle, Format::F32)?.with_reconstructor(Reconstructor::EndToEnd)?;
    let original = square(open_image(image)?, models.image_tokenizer.image_size() as u32);
    let codes = models.encode(std::slice::from_ref(&original))?;
    let prompt = models.text.encode(caption, models.generator.max_text())?;
    let reconstructed = models.images(&[&prompt], &codes)?.swap_remove(0);
    write(&models.image_tokenizer, image, output, [&original, &reconstructed], codes.concat(), json)
}

/// Whether two paths lead to the same file.
fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn one(tokenizer: &ImageTokenizer, image: &Path, output: &Path, whole: bool, json: bool) -> Result<()> {
    let input = open_image(image)?;
    let (original, reconstructed, codes) = if whole {
        let grid = tokenizer.encode_whole(&input)?;
        let reconstructed = tokenizer.decode_whole(&grid, input.height() as usize, input.width() as usize)?;
        (input, reconstructed, grid.codes)
    } else {
        let original = square(input, tokenizer.image_size() as u32);
        let codes = tokenizer.encode(&to_pixels([&original])?)?;
        let reconstructed = from_pixels(&tokenizer.decode(&codes)?)?.swap_remove(0);
        (original, reconstructed, codes.flatten_all()?.to_vec1()?)
    };
    write(tokenizer, image, output, [&original, &reconstructed], codes, json)
}

/// Writes the reconstruction of an image and says how near it is to the original.
fn write(
    tokenizer: &ImageTokenizer,
    image: &Path,
    output: &Path,
    [original, reconstructed]: [&RgbImage; 2],
    codes: Vec<u32>,
    json: bool,
) -> Result<()> {
    image_file::write_png(output, reconstructed)?;
    let used = codes.into_iter().collect::<BTreeSet<u32>>().len();
    let (psnr, size) = (psnr(original, reconstructed), tokenizer.codebook_size()?);
    if json {
        report::json(
            &json!({ "image": report::path(image), "path": report::path(output), "psnr": psnr, "codebook_used": used }),
        );
    } else {
        let output = output.display();
        report::result(format_args!("{output}: PSNR {psnr:.1} dB, {used} of the {size} codes"));
    }
    Ok(())
}
