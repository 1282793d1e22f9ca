//! Decodes image files to square RGB images, and converts between images and tensors.

use super::bad::{Bad, Cause};
use crate::{
    bounded_read::{open_without_waiting, read_beyond},
    error::{Context, Hint, Result, ensure, failed},
};
use candle_core::{Device, Tensor};
use image::{
    DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage,
    imageops::{self, FilterType},
};
use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

/// Maximum size of an image in pixels.
const MAX_PIXELS: u64 = 8192 * 8192;
/// Maximum size of an image file in bytes.
const MAX_FILE: u64 = 64 << 20;
/// Maximum memory that a decoder may allocate, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// Decodes the first frame of an image to 8-bit RGB, with EXIF orientation applied and alpha blended onto white.
///
/// # Errors
/// The image is damaged, too large or in an unsupported format.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, Bad> {
    decode_within(bytes, MAX_PIXELS)
}

/// [`decode`] with a lower limit on the number of pixels.
///
/// # Errors
/// As [`decode`].
pub fn decode_within(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, Bad> {
    // A decoder that panics on a malicious file must not end a reader thread.
    catch_unwind(AssertUnwindSafe(|| decode_unguarded(bytes, max_pixels.min(MAX_PIXELS))))
        .unwrap_or_else(|_| Err(Bad::new(Cause::BadImage, "the decoder panicked")))
}

/// Decodes an image to a square of `size` × `size` pixels: central crop, then resize.
///
/// # Errors
/// As [`decode`].
pub fn decode_square(bytes: &[u8], size: u32) -> Result<RgbImage, Bad> {
    Ok(square(decode(bytes)?, size))
}

/// Reads the image file `path` as a square of `size` × `size` pixels.
///
/// # Errors
/// The file cannot be read or is not a usable image.
pub fn open_square(path: &Path, size: usize) -> Result<RgbImage> {
    Ok(square(open_image(path)?, size as u32))
}

/// Reads the image file `path`.
///
/// # Errors
/// The file cannot be read or is not a usable image.
pub fn open_image(path: &Path) -> Result<RgbImage> {
    let name = path.display();
    // The size of the file cannot be checked first: a pipe has none.
    let read = open_without_waiting(path).and_then(|file| read_beyond(file, MAX_FILE));
    let bytes = read.hint(format_args!("cannot read {name}"), "name an image file")?;
    ensure!(bytes.len() as u64 <= MAX_FILE, "{name} is larger than {} MB", MAX_FILE >> 20);
    let hint = "PNG, JPEG, WebP, GIF, BMP and TIFF are read";
    let unusable = |bad: Bad| failed(format_args!("{name} is not a usable image: {} ({})", bad.cause, bad.place), hint);
    decode(&bytes).map_err(unusable)
}

fn decode_unguarded(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, Bad> {
    let bad = |e: ImageError| match e {
        ImageError::Limits(e) => Bad::new(Cause::HugeImage, e),
        e => Bad::new(Cause::BadImage, e),
    };
    if is_cut_jpeg(bytes) {
        return Err(Bad::new(Cause::BadImage, "a JPEG without its end-of-image marker"));
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    let mut reader = ImageReader::new(Cursor::new(bytes));
    reader.limits(limits);
    let reader = reader.with_guessed_format().map_err(|e| Bad::new(Cause::BadImage, e))?;
    let mut decoder = reader.into_decoder().map_err(bad)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > max_pixels || decoder.total_bytes() > MAX_BYTES {
        return Err(Bad::new(Cause::HugeImage, format_args!("{width}x{height} pixels")));
    }
    if pixels == 0 {
        return Err(Bad::new(Cause::BadImage, "no pixels"));
    }
    // An image with damaged metadata is still usable.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(bad)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(onto_white(image))
}

/// Whether a JPEG lacks its end-of-image marker. Decoders fill the missing part with grey without an error. A truncated
/// scan that is followed by the marker is not detected: only a strict decoder would find it.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    let Some(mut rest) = bytes.strip_prefix(&[0xff, 0xd8]) else { return false };
    // Segments are skipped up to the first scan: a thumbnail in the EXIF segment has its own end-of-image marker.
    while let [0xff, marker, high, low, ..] = *rest {
        if marker == 0xda {
            return !rest.windows(2).any(|pair| pair == [0xff, 0xd9]);
        }
        // A fill byte has no length. Other lengths include themselves but not the marker.
        let length = if marker == 0xff { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
        rest = rest.get(length..).unwrap_or_default();
    }
    true
}

fn onto_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = image.into_rgba8();
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let [r, g, b, alpha] = image.get_pixel(x, y).0;
        let blend = |c: u8| ((u32::from(c) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 127) / 255) as u8;
        image::Rgb([blend(r), blend(g), blend(b)])
    })
}

/// The largest central square of an image, resized to `size` × `size` pixels.
pub fn square(image: RgbImage, size: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let side = width.min(height);
    if (width, height) == (size, size) {
        return image;
    }
    let cropped = imageops::crop_imm(&image, (width - side) / 2, (height - side) / 2, side, side);
    if side > 4 * size {
        // Box filtering to twice the size first is much faster for large photographs, without visible difference.
        let half = imageops::thumbnail(&*cropped, 2 * size, 2 * size);
        return imageops::resize(&half, size, size, FilterType::Lanczos3);
    }
    imageops::resize(&*cropped, size, size, FilterType::Lanczos3)
}

/// Square images of one size → tensor `(batch, height, width, 3)` in \[-1, 1\].
///
/// # Errors
/// There are no images, or they differ in size.
pub fn to_pixels<'a>(images: impl IntoIterator<Item = &'a RgbImage>) -> Result<Tensor> {
    let mut values: Vec<f32> = Vec::new();
    let mut size = None;
    let mut count = 0;
    for image in images {
        ensure!(*size.get_or_insert(image.dimensions()) == image.dimensions(), "images of different sizes");
        values.extend(image.as_raw().iter().map(|value| f32::from(*value) / 127.5 - 1.0));
        count += 1;
    }
    let (width, height) = size.context("no images")?;
    Ok(Tensor::from_vec(values, (count, height as usize, width as usize, 3), &Device::Cpu)?)
}

/// Tensor `(batch, height, width, 3)` in \[-1, 1\] → images; values outside are clamped.
///
/// # Errors
/// The tensor has another shape.
pub fn from_pixels(pixels: &Tensor) -> Result<Vec<RgbImage>> {
    let (_, height, width, channels) = pixels.dims4()?;
    ensure!(channels == 3, "images have 3 channels, not {channels}");
    let values = pixels.flatten_all()?.to_vec1::<f32>()?;
    let images = values.chunks(height * width * 3).map(|values| {
        let bytes = values.iter().map(|value| ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8).collect();
        RgbImage::from_raw(width as u32, height as u32, bytes).context("an image's size does not fit")
    });
    images.collect()
}
