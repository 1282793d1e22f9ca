//! Decoding images of many formats, intact and damaged.

use super::{bad::Cause, image::*};
use ::image::{
    DynamicImage, ExtendedColorType, Frame, ImageEncoder, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage,
    codecs::{gif::GifEncoder, jpeg::JpegEncoder, png::PngEncoder},
};
use std::io::Cursor;

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn gradient() -> RgbImage {
    RgbImage::from_fn(40, 24, |x, y| Rgb([x as u8 * 6, y as u8 * 10, 90]))
}

fn close(a: &RgbImage, b: &RgbImage, tolerance: u8) -> bool {
    a.dimensions() == b.dimensions() && a.iter().zip(b.iter()).all(|(a, b)| a.abs_diff(*b) <= tolerance)
}

#[test]
fn every_format_is_decoded_and_truncation_is_detected() {
    let image = gradient();
    for (format, tolerance) in [
        (ImageFormat::Png, 0),
        (ImageFormat::WebP, 0),
        (ImageFormat::Bmp, 0),
        (ImageFormat::Tiff, 0),
        (ImageFormat::Gif, 60),
        (ImageFormat::Jpeg, 40),
    ] {
        let bytes = encode(&image.clone().into(), format);
        assert!(close(&decode(&bytes).unwrap(), &image, tolerance), "{format:?}");
        for cut in [0, 1, 10, bytes.len() / 3, bytes.len() / 2] {
            assert_eq!(decode(&bytes[..cut]).unwrap_err().cause, Cause::BadImage, "{format:?} cut at {cut}");
        }
    }
}

#[test]
fn alpha_is_blended_onto_white() {
    let image = RgbaImage::from_fn(3, 1, |x, _| Rgba([200, 0, 0, [0, 128, 255][x as usize]]));
    let decoded = decode(&encode(&image.into(), ImageFormat::Png)).unwrap();
    assert_eq!(decoded.as_raw(), &[255, 255, 255, 227, 127, 127, 200, 0, 0]);
}

#[test]
fn sixteen_bit_and_grey_images_become_eight_bit_rgb() {
    let mut bytes = Vec::new();
    let samples: Vec<u8> = [0u16, 0x8080, 0xffff].iter().flat_map(|v| v.to_ne_bytes()).collect();
    PngEncoder::new(&mut bytes).write_image(&samples, 3, 1, ExtendedColorType::L16).unwrap();
    assert_eq!(decode(&bytes).unwrap().as_raw(), &[0, 0, 0, 128, 128, 128, 255, 255, 255]);
}

#[test]
fn cmyk_jpeg_is_red() {
    // Written by Pillow 13.0.0: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).
    let decoded = decode(include_bytes!("../../tests/golden/cmyk.jpg")).unwrap();
    assert!(close(&decoded, &RgbImage::from_pixel(16, 16, Rgb([255, 0, 0])), 3), "{:?}", decoded.get_pixel(8, 8));
}

#[test]
fn the_first_frame_of_an_animation_is_used() {
    let mut bytes = Vec::new();
    let frame = |shade| Frame::new(RgbaImage::from_pixel(4, 4, Rgba([shade, shade, shade, 255])));
    GifEncoder::new(&mut bytes).encode_frames([frame(10), frame(200)]).unwrap();
    assert!(close(&decode(&bytes).unwrap(), &RgbImage::from_pixel(4, 4, Rgb([10; 3])), 4));
}

/// A little-endian EXIF block with only the orientation.
fn exif(orientation: u8) -> Vec<u8> {
    let mut bytes = b"II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    bytes.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

#[test]
fn exif_orientation_is_applied() {
    let mut bytes = Vec::new();
    let image = gradient();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 100);
    encoder.set_exif_metadata(exif(6)).unwrap();
    encoder.encode_image(&image).unwrap();
    let turned = ::image::imageops::rotate90(&image);
    assert!(close(&decode(&bytes).unwrap(), &turned, 12));
}

#[test]
fn huge_images_are_refused_before_they_are_allocated() {
    let mut png = encode(&gradient().into(), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    let mut bmp = encode(&gradient().into(), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0]);
    let mut gif = encode(&gradient().into(), ImageFormat::Gif);
    gif[6..10].copy_from_slice(&[0xff; 4]);
    let mut jpeg = encode(&gradient().into(), ImageFormat::Jpeg);
    let sof = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    jpeg[sof + 5..sof + 9].copy_from_slice(&[0xff; 4]);
    let mut tiff = encode(&gradient().into(), ImageFormat::Tiff);
    for tag in [0x00, 0x01] {
        // ImageWidth and ImageLength. For every type of entry, the value is in the last 4 of its 12 bytes.
        let entry = tiff.windows(2).rposition(|pair| pair == [tag, 0x01]).unwrap();
        tiff[entry + 8..entry + 12].copy_from_slice(&[0xff, 0xff, 0, 0]);
    }
    // The strips do not match the new size, which is detected first.
    assert_eq!(decode(&tiff).unwrap_err().cause, Cause::BadImage);
    for (name, bytes) in [("png", png), ("bmp", bmp), ("gif", gif), ("jpeg", jpeg)] {
        let bad = decode(&bytes).unwrap_err();
        assert_eq!(bad.cause, Cause::HugeImage, "{name}: {}", bad.place);
    }
}

/// The checksum of a PNG chunk.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[test]
fn damaged_images_do_not_panic() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Gif, ImageFormat::WebP, ImageFormat::Bmp] {
        let whole = encode(&gradient().into(), format);
        for at in 0..whole.len().min(300) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x5a;
            // Some damage cannot be detected. A panic would be reported as "the decoder panicked".
            assert!(decode(&damaged).map_or_else(|bad| !bad.place.contains("panicked"), |_| true), "{format:?} {at}");
        }
    }
}

#[test]
fn squares_are_cropped_from_the_center() {
    let mut image = RgbImage::from_pixel(300, 100, Rgb([255; 3]));
    for (x, _, pixel) in image.enumerate_pixels_mut() {
        if (100..200).contains(&x) {
            *pixel = Rgb([10, 20, 30]);
        }
    }
    for size in [1, 16, 100, 250] {
        let cut = square(image.clone(), size);
        assert!(close(&cut, &RgbImage::from_pixel(size, size, Rgb([10, 20, 30])), 1), "{size}");
    }
    assert_eq!(square(gradient(), 24).dimensions(), (24, 24));
}

#[test]
fn pixels_and_images_round_trip() {
    let images = [gradient(), RgbImage::new(40, 24)];
    let pixels = to_pixels(&images).unwrap();
    assert_eq!(pixels.dims(), [2, 24, 40, 3]);
    let values = pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().all(|v| (-1.0..=1.0).contains(v)) && values.ends_with(&[-1.0; 9]));
    assert_eq!(from_pixels(&pixels).unwrap(), images);
    assert!(to_pixels(&[gradient(), RgbImage::new(1, 1)]).is_err());
    assert!(to_pixels(&[]).is_err());
}

#[test]
fn grids_are_as_square_as_possible() {
    let images = vec![RgbImage::new(8, 6); 5];
    assert_eq!(super::image_file::grid(&images, 0).dimensions(), (32, 16));
    assert_eq!(super::image_file::grid(&images, 5).dimensions(), (56, 6));
    assert_eq!(super::image_file::grid(&images[..1], 0).dimensions(), (8, 6));
}
