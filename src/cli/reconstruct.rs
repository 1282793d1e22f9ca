//! `vilg reconstruct`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    data::{image, picture},
    error::Result,
    report,
};
use ::image::RgbImage;
use serde_json::json;
use std::{collections::BTreeSet, path::PathBuf};

/// Turn a picture into image codes and back: what the transformer can see and paint of it
#[derive(clap::Args)]
pub struct Args {
    /// Picture file; its centred square is taken
    image: PathBuf,
    /// PNG file to write
    #[arg(short, long, value_name = "FILE", default_value = "reconstruction.png")]
    output: PathBuf,
    /// Model folder with the image tokenizer
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let tokenizer = Bundle::open(&args.model)?.image_tokenizer()?;
    let original = image::open_square(&args.image, tokenizer.image_size())?;
    let codes = tokenizer.encode(&image::to_pixels([&original])?)?;
    let painted = image::from_pixels(&tokenizer.decode(&codes)?)?.swap_remove(0);
    picture::write_png(&args.output, &painted)?;
    let used = codes.flatten_all()?.to_vec1::<u32>()?.into_iter().collect::<BTreeSet<u32>>().len();
    let (psnr, size) = (psnr(&original, &painted), tokenizer.codebook_size()?);
    if json {
        report::json(&json!({ "image": args.image, "path": args.output, "psnr": psnr, "codebook_used": used }));
    } else {
        let output = args.output.display();
        report::result(format_args!("{output}: PSNR {psnr:.1} dB, {used} of the {size} codes"));
    }
    Ok(())
}

/// Peak signal-to-noise ratio of two pictures of one size in dB; two equal ones count as one grey step apart in
/// one value, so that the figure stays finite.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
    let error = squares.sum::<f64>().max(1.0) / a.as_raw().len() as f64;
    10.0 * (255.0 * 255.0 / error).log10()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::image::Rgb;

    #[test]
    fn psnr_of_a_constant_difference() {
        let grey = |value| RgbImage::from_pixel(4, 4, Rgb([value; 3]));
        assert!((psnr(&grey(100), &grey(110)) - 20.0 * 25.5f64.log10()).abs() < 1e-9);
        assert!(psnr(&grey(7), &grey(7)) > 60.0 && psnr(&grey(7), &grey(7)).is_finite());
    }
}
