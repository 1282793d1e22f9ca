//! Text below images, in a bitmap font that is part of the program.

use image::{Rgb, RgbImage, imageops};

/// Height of a line and width of a Chinese character, in pixels.
const LINE: u32 = 16;
/// Lines of the longest label; what is longer ends with an ellipsis.
const MAX_LINES: usize = 6;
/// Shown for a character without a glyph.
const REPLACEMENT: char = '\u{fffd}';

/// Each image with its text below it, black on white, broken into lines of the image's width. All labels have the height
/// of the longest one, so that the results form a grid.
pub fn labelled(images: &[RgbImage], texts: &[&str]) -> Vec<RgbImage> {
    let lines = |(image, text): (&RgbImage, &&str)| broken(text, image.width());
    let labels: Vec<Vec<String>> = images.iter().zip(texts).map(lines).collect();
    let height = labels.iter().map(Vec::len).max().unwrap_or(0) as u32 * LINE;
    images.iter().zip(&labels).map(|(image, lines)| below(image, lines, height)).collect()
}

fn below(image: &RgbImage, lines: &[String], height: u32) -> RgbImage {
    let mut labelled = RgbImage::from_pixel(image.width(), image.height() + height, Rgb([255; 3]));
    imageops::replace(&mut labelled, image, 0, 0);
    for (line, text) in (0..).zip(lines) {
        write(&mut labelled, text, image.height() + line * LINE);
    }
    labelled
}

/// Writes a line whose upper edge is at `y`. What is beyond the image's right border is left out.
fn write(image: &mut RgbImage, text: &str, y: u32) {
    let mut left = 0;
    for glyph in text.chars().filter_map(glyph) {
        let width = glyph.get_width() as u32;
        for (dx, dy) in (0..LINE).flat_map(|dy| (0..width).map(move |dx| (dx, dy))) {
            if let Some(pixel) = image.get_pixel_mut_checked(left + dx, y + dy)
                && glyph.get_pixel(dx as usize, dy as usize)
            {
                *pixel = Rgb([0; 3]);
            }
        }
        left += width;
    }
}

fn glyph(character: char) -> Option<&'static unifont::Glyph> {
    unifont::get_glyph(character).or_else(|| unifont::get_glyph(REPLACEMENT))
}

/// `text` in lines of at most `width` pixels, at most [`MAX_LINES`] of them. Control characters are left out.
fn broken(text: &str, width: u32) -> Vec<String> {
    let (mut lines, mut line, mut used) = (Vec::new(), String::new(), 0);
    for character in text.chars().filter(|character| !character.is_control()) {
        let wide = glyph(character).map_or(0, |glyph| glyph.get_width() as u32);
        if used + wide > width && !line.is_empty() {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        line.push(character);
        used += wide;
    }
    lines.push(line);
    if lines.len() > MAX_LINES {
        lines.truncate(MAX_LINES);
        if let Some(last) = lines.last_mut() {
            last.pop();
            last.push('…');
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_the_width_of_the_image() {
        assert_eq!(broken("孤舟蓑笠翁，ab c", 64), ["孤舟蓑笠", "翁，ab c"]);
        assert_eq!(broken("孤\n舟\u{1b}", 64), ["孤舟"]);
        assert_eq!(broken("", 64), [""]);
        assert_eq!(broken("孤舟", 8), ["孤", "舟"]);
        let long = broken(&"月".repeat(100), 32);
        assert!(long.len() == MAX_LINES && long[MAX_LINES - 1] == "月…", "{long:?}");
    }

    /// 一 is one horizontal stroke, two pixels from the left border to two from the right one or longer.
    #[test]
    fn labels_are_written_below_the_images_and_keep_them() {
        let images = [40, 200].map(|shade| RgbImage::from_pixel(32, 8, Rgb([shade; 3])));
        let both = labelled(&images, &["一", "一二三"]);
        for (labelled, image) in both.iter().zip(&images) {
            assert_eq!(labelled.dimensions(), (32, 8 + 2 * LINE));
            assert_eq!(imageops::crop_imm(labelled, 0, 0, 32, 8).to_image(), *image);
        }
        let black = |image: &RgbImage, y: u32| (0..32).filter(|&x| image.get_pixel(x, y)[0] == 0).count();
        let stroke = (8..8 + LINE).map(|y| black(&both[0], y)).max();
        assert!(stroke.is_some_and(|length| (10..=16).contains(&length)), "{stroke:?}");
        let written = |image: &RgbImage, line: u32| (0..LINE).any(|y| black(image, 8 + line * LINE + y) > 0);
        assert_eq!([0, 1].map(|line| written(&both[0], line)), [true, false]);
        assert_eq!([0, 1].map(|line| written(&both[1], line)), [true, true]);
    }
}
