//! `vilg reconstruct`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    data::{
        image::{from_pixels, open_picture, square, to_pixels},
        paths, picture,
    },
    error::{Result, ensure, failed, usage},
    eval::similarity::psnr,
    report,
    tokenizer::ImageTokenizer,
};
use ::image::RgbImage;
use serde_json::json;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Turn pictures into image codes and back: what the transformer can see and paint of them
#[derive(clap::Args)]
#[command(
    after_help = "Of a folder, every picture in it and below is written under its own name into the folder of `-o`; \
    those that cannot be read are reported, and the exit code is then 1."
)]
pub struct Args {
    /// Picture file, or folder of pictures
    image: PathBuf,
    /// PNG file (or folder) to write
    #[arg(short, long, value_name = "FILE|DIR", default_value = "reconstruction.png")]
    output: PathBuf,
    /// Take whole pictures in their own size, tile by tile, instead of their centred squares
    #[arg(long)]
    whole: bool,
    /// Model folder with the image tokenizer
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let tokenizer = Bundle::open(&args.model)?.image_tokenizer()?;
    if !args.image.is_dir() {
        return one(&tokenizer, &args.image, &args.output, args.whole, json);
    }
    let hint = "name a folder with -o: each picture is written there under its own name";
    let folder = args.output.is_dir() || args.output.extension().is_none();
    ensure!(folder, usage(format_args!("{} is no folder", args.output.display()), hint));
    let images = paths::find(&args.image.display().to_string())?.images;
    let hint = "`vilg eval recon` measures tar shards";
    ensure!(!images.is_empty(), usage(format_args!("no pictures in {}", args.image.display()), hint));
    let mut unread = 0;
    for image in &images {
        let name = image.strip_prefix(&args.image).unwrap_or(image).with_extension("png");
        if let Err(e) = one(&tokenizer, image, &args.output.join(name), args.whole, json) {
            report::error(&e);
            unread += 1;
        }
    }
    let message = format!("{unread} of {} pictures were not reconstructed", images.len());
    ensure!(unread == 0, failed(message, "the others are complete"));
    Ok(())
}

fn one(tokenizer: &ImageTokenizer, image: &Path, output: &Path, whole: bool, json: bool) -> Result<()> {
    let picture = open_picture(image)?;
    let (original, painted, codes) = if whole {
        let (painted, codes) = in_tiles(tokenizer, &picture)?;
        (picture, painted, codes)
    } else {
        let original = square(picture, tokenizer.image_size() as u32);
        let codes = tokenizer.encode(&to_pixels([&original])?)?;
        let painted = from_pixels(&tokenizer.decode(&codes)?)?.swap_remove(0);
        (original, painted, codes.flatten_all()?.to_vec1()?)
    };
    picture::write_png(output, &painted)?;
    let used = codes.into_iter().collect::<BTreeSet<u32>>().len();
    let (psnr, size) = (psnr(&original, &painted), tokenizer.codebook_size()?);
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

fn in_tiles(tokenizer: &ImageTokenizer, picture: &RgbImage) -> Result<(RgbImage, Vec<u32>)> {
    let (width, height) = picture.dimensions();
    let grid = tokenizer.encode_whole(&to_pixels([picture])?.squeeze(0)?)?;
    let pixels = tokenizer.decode_whole(&grid, height as usize, width as usize)?;
    Ok((from_pixels(&pixels.unsqueeze(0)?)?.swap_remove(0), grid.codes))
}
