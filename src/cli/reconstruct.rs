//! `vilg reconstruct`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    data::{image, picture},
    error::Result,
    eval::similarity::psnr,
    report,
};
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
