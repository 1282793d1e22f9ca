//! Image files to square RGB images, and images to tensors and back.

use super::{
    bad::{Bad, Cause},
    source_file::open_without_waiting,
};
use crate::error::{Context, Hint, Result, ensure, failed};
use candle_core::{Device, Tensor};
use image::{
    DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage,
    imageops::{self, FilterType},
};
use std::{
    fs::File,
    io::{self, Cursor, Read},
    os::unix::fs::FileTypeExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Most pixels of an image that is decoded.
const MAX_PIXELS: u64 = 8192 * 8192;
/// Largest image file that is read.
const MAX_FILE: u64 = 64 << 20;
/// Most bytes that a decoder may allocate.
const MAX_BYTES: u64 = 256 << 20;

/// How long a pipe may have no writer before it counts as empty.
const PIPE_PATIENCE: Duration = Duration::from_secs(3);

/// Decodes an image: first frame, EXIF orientation applied, alpha laid onto white, 8 bits, RGB.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, Bad> {
    // A decoder that panics on a hostile file must not take a reader thread with it.
    catch_unwind(AssertUnwindSafe(|| decode_unguarded(bytes)))
        .unwrap_or_else(|_| Err(Bad::new(Cause::BadImage, "the decoder panicked")))
}

/// Decodes an image and makes it a square of `size` pixels: centre crop, then resize.
pub fn decode_square(bytes: &[u8], size: u32) -> Result<RgbImage, Bad> {
    Ok(square(decode(bytes)?, size))
}

/// Reads an image file that the user named and makes it a square of `size` pixels.
pub fn open_square(path: &Path, size: usize) -> Result<RgbImage> {
    Ok(square(open_picture(path)?, size as u32))
}

/// Reads an image file that the user named.
pub fn open_picture(path: &Path) -> Result<RgbImage> {
    let name = path.display();
    let mut bytes = Vec::new();
    // Not by the file's size: a pipe has none.
    let read = open_without_waiting(path).and_then(|file| match file.metadata()?.file_type().is_fifo() {
        true => read_pipe(file, &mut bytes),
        false => file.take(MAX_FILE + 1).read_to_end(&mut bytes).map(|_| ()),
    });
    read.hint(format_args!("cannot read {name}"), "name an image file")?;
    ensure!(bytes.len() as u64 <= MAX_FILE, "{name} is larger than {} MB", MAX_FILE >> 20);
    let hint = "PNG, JPEG, WebP, GIF, BMP and TIFF are read";
    let unusable = |bad: Bad| failed(format_args!("{name} is no usable image: {} ({})", bad.cause, bad.place), hint);
    decode(&bytes).map_err(unusable)
}

/// Reads a pipe that was opened without waiting; it stays empty if nobody opens it for writing within 3 seconds.
fn read_pipe(mut pipe: File, bytes: &mut Vec<u8>) -> io::Result<()> {
    let opened = Instant::now();
    let mut chunk = vec![0; 64 << 10];
    while bytes.len() as u64 <= MAX_FILE {
        match pipe.read(&mut chunk) {
            Ok(0) if !bytes.is_empty() || opened.elapsed() > PIPE_PATIENCE => break,
            Ok(read) if read > 0 => bytes.extend_from_slice(&chunk[..read]),
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Err(e),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
    Ok(())
}

fn decode_unguarded(bytes: &[u8]) -> Result<RgbImage, Bad> {
    let bad = |e: ImageError| match e {
        ImageError::Limits(e) => Bad::new(Cause::HugeImage, e),
        e => Bad::new(Cause::BadImage, e),
    };
    if is_cut_jpeg(bytes) {
        return Err(Bad::new(Cause::BadImage, "a JPEG without its end"));
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    let mut reader = ImageReader::new(Cursor::new(bytes));
    reader.limits(limits);
    let reader = reader.with_guessed_format().map_err(|e| Bad::new(Cause::BadImage, e))?;
    let mut decoder = reader.into_decoder().map_err(bad)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
        return Err(Bad::new(Cause::HugeImage, format_args!("{width}x{height} pixels")));
    }
    if pixels == 0 {
        return Err(Bad::new(Cause::BadImage, "no pixels"));
    }
    // Damaged metadata is no reason to lose an image.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(bad)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(onto_white(image))
}

/// Whether a JPEG lacks its end-of-image marker. Decoders fill the missing part with grey without an error. A scan that
/// is cut but still followed by the marker is not noticed: only decoding it strictly would show that.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    let Some(mut rest) = bytes.strip_prefix(&[0xff, 0xd8]) else { return false };
    // Segments are skipped up to the first scan, since a thumbnail in the EXIF segment has an end of its own.
    while let [0xff, marker, high, low, ..] = *rest {
        if marker == 0xda {
            return !rest.windows(2).any(|pair| pair == [0xff, 0xd9]);
        }
        // A fill byte stands alone; else the length counts itself but not the marker.
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

/// The largest centred square of an image, resized to `size` pixels.
pub fn square(image: RgbImage, size: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let side = width.min(height);
    if (width, height) == (size, size) {
        return image;
    }
    let cropped = imageops::crop_imm(&image, (width - side) / 2, (height - side) / 2, side, side);
    if side > 4 * size {
        // Averaging to twice the size first is much faster on large photographs and looks the same.
        let half = imageops::thumbnail(&*cropped, 2 * size, 2 * size);
        return imageops::resize(&half, size, size, FilterType::Lanczos3);
    }
    imageops::resize(&*cropped, size, size, FilterType::Lanczos3)
}

/// Square images of one size as a tensor `(batch, height, width, 3)` in [-1, 1].
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

/// A tensor `(batch, height, width, 3)` in [-1, 1] as images; values beyond are cut.
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
