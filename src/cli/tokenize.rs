//! `vilg tokenize`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    data::{
        image::{open_square, to_pixels},
        printable,
    },
    error::{Result, ensure, failed},
    report,
};
use serde_json::json;
use std::path::PathBuf;

/// Print the image codes of images
#[derive(clap::Args)]
#[command(
    after_help = "Prints one line per image: its name and its codes in raster order. Images that cannot be read are \
    reported, and the exit code is then 1."
)]
pub struct Args {
    /// Image files; the central square of each image is encoded
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Model folder with the image tokenizer
    #[arg(short, long, value_name = "DIR|NAME", default_value = DEMO_NAME)]
    model: String,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let tokenizer = Bundle::open(&args.model)?.image_tokenizer()?;
    let mut unread = 0;
    for path in &args.images {
        let codes = match open_square(path, tokenizer.image_size()) {
            Ok(image) => tokenizer.encode(&to_pixels([&image])?)?.flatten_all()?.to_vec1::<u32>()?,
            Err(e) => {
                report::error(&e);
                unread += 1;
                continue;
            }
        };
        if json {
            report::json(&json!({ "image": report::path(path), "grid": tokenizer.grid(), "codes": codes }));
        } else {
            let codes: Vec<String> = codes.iter().map(u32::to_string).collect();
            report::result(format_args!("{}\t{}", printable(&path.display().to_string()), codes.join(" ")));
        }
    }
    let message = format!("{unread} of {} images cannot be read", args.images.len());
    ensure!(unread == 0, failed(message, "the codes of the others are complete"));
    Ok(())
}
