//! Writes PNG files and grids of images.

use crate::error::{Hint, Result};
use image::{ImageFormat, Rgb, RgbImage, imageops};
use std::{fs, io::Cursor, path::Path};

/// Width of the white gap between the images of a grid, in pixels.
const GAP: u32 = 4;

/// Arranges images of one size in a grid with `columns` columns (0: as square as possible).
pub fn grid(images: &[RgbImage], columns: usize) -> RgbImage {
    let Some((width, height)) = images.first().map(RgbImage::dimensions) else {
        return RgbImage::new(1, 1);
    };
    let columns = if columns == 0 { (images.len() as f64).sqrt().ceil() as usize } else { columns };
    let columns = columns.clamp(1, images.len());
    let rows = images.len().div_ceil(columns);
    let side = |count: usize, size: u32| count as u32 * (size + GAP) - GAP;
    let mut sheet = RgbImage::from_pixel(side(columns, width), side(rows, height), Rgb([255; 3]));
    for (i, image) in images.iter().enumerate() {
        let (x, y) = ((i % columns) as i64, (i / columns) as i64);
        imageops::replace(&mut sheet, image, x * i64::from(width + GAP), y * i64::from(height + GAP));
    }
    sheet
}

/// Encodes an image as PNG.
pub fn png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

/// Writes an image as a PNG file and creates missing parent folders.
///
/// # Errors
/// The file cannot be written.
pub fn write_png(path: &Path, image: &RgbImage) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(path, png(image).map_err(std::io::Error::other)?))
        .hint(format_args!("cannot write {}", path.display()), "choose another file with -o")
}
