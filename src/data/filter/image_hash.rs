//! A perceptual hash of an image: pHash (64 bits of its low frequencies, as Python's `imagehash.phash`) and a signature of
//! its colors, so that a red car and a blue car differ.
//!
//! The image is averaged to 32 × 32 cells in one pass, which costs a tenth of decoding it; a general resize would cost as
//! much as decoding.

use image::RgbImage;
use std::{array, f32::consts::PI, sync::LazyLock};

/// Side of the averaged image.
const SIDE: usize = 32;
/// Frequencies in each direction.
const LOW: usize = 8;

/// The hash of one image; two images are near duplicates if few bits and no color differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageHash {
    /// pHash.
    pub bits: u64,
    /// pHash of the mirrored image.
    pub mirrored: u64,
    /// Mean Cb and Cr of the four quadrants, 4 bits each.
    pub colors: u32,
}

impl ImageHash {
    /// The hash of an image of at least one pixel.
    pub fn of(image: &RgbImage) -> Self {
        let cells = average(image);
        let bits = phash(|x, y| luma(cells[y][x]));
        let mirrored = phash(|x, y| luma(cells[y][SIDE - 1 - x]));
        Self { bits, mirrored, colors: colors(&cells) }
    }
}

/// The colors of the mirrored image: left and right quadrants change places.
pub fn mirrored_colors(colors: u32) -> u32 {
    (colors & 0x00ff_00ff) << 8 | (colors & 0xff00_ff00) >> 8
}

/// Whether no color differs by more than one step.
pub fn similar_colors(a: u32, b: u32) -> bool {
    (0..32).step_by(4).all(|shift| (a >> shift & 15).abs_diff(b >> shift & 15) <= 1)
}

type Cells = [[[f32; 3]; SIDE]; SIDE];

/// Mean color of each cell; a pixel on the border of cells counts to each by its share.
fn average(image: &RgbImage) -> Cells {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let (columns, rows) = (spans(width), spans(height));
    let lines: Vec<[[f32; 3]; SIDE]> = image
        .as_raw()
        .chunks_exact(3 * width)
        .map(|line| array::from_fn(|cell| mean(&columns[cell], |x| array::from_fn(|c| f32::from(line[3 * x + c])))))
        .collect();
    array::from_fn(|row| array::from_fn(|cell| mean(&rows[row], |y| lines[y][cell])))
}

/// For each cell, the pixels of a line of `length` that it covers, with their shares (sum 1).
fn spans(length: usize) -> [Vec<(usize, f32)>; SIDE] {
    let size = length as f32 / SIDE as f32;
    array::from_fn(|cell| {
        let (start, end) = (cell as f32 * size, (cell + 1) as f32 * size);
        let pixels = start as usize..(end.ceil() as usize).min(length);
        let share = |pixel: usize| (end.min((pixel + 1) as f32) - start.max(pixel as f32)).max(0.0) / size;
        pixels.map(|pixel| (pixel, share(pixel))).collect()
    })
}

fn mean(span: &[(usize, f32)], at: impl Fn(usize) -> [f32; 3]) -> [f32; 3] {
    span.iter().fold([0.0; 3], |sum, (pixel, share)| {
        let color = at(*pixel);
        array::from_fn(|c| sum[c] + share * color[c])
    })
}

/// Luminance of ITU-R 601.
fn luma([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

/// `COSINES[k][x] = cos(π (2x + 1) k / 2n)`, the DCT-II.
static COSINES: LazyLock<[[f32; SIDE]; LOW]> = LazyLock::new(|| {
    array::from_fn(|k| array::from_fn(|x| (PI * (2 * x + 1) as f32 * k as f32 / (2 * SIDE) as f32).cos()))
});

/// One bit for each low frequency: whether its coefficient is above their median.
fn phash(at: impl Fn(usize, usize) -> f32) -> u64 {
    let rows: [[f32; LOW]; SIDE] =
        array::from_fn(|y| array::from_fn(|k| (0..SIDE).map(|x| COSINES[k][x] * at(x, y)).sum()));
    let coefficients: [f32; LOW * LOW] =
        array::from_fn(|i| (0..SIDE).map(|y| COSINES[i / LOW][y] * rows[y][i % LOW]).sum());
    let mut sorted = coefficients;
    sorted.sort_by(f32::total_cmp);
    let median = (sorted[LOW * LOW / 2 - 1] + sorted[LOW * LOW / 2]) / 2.0;
    coefficients.iter().fold(0, |bits, coefficient| bits << 1 | u64::from(*coefficient > median))
}

/// Mean Cb and Cr of each quadrant in steps of 16.
fn colors(cells: &Cells) -> u32 {
    let half = SIDE / 2;
    [(0, 0), (0, half), (half, 0), (half, half)].iter().fold(0, |colors, (top, left)| {
        let cells = cells.iter().skip(*top).take(half).flat_map(|row| row.iter().skip(*left).take(half));
        let sum = cells.fold([0.0; 3], |[r, g, b], cell| [r + cell[0], g + cell[1], b + cell[2]]);
        let [r, g, b] = sum.map(|sum| sum / (half * half) as f32);
        let (blue, red) = (128.0 - 0.169 * r - 0.331 * g + 0.5 * b, 128.0 + 0.5 * r - 0.419 * g - 0.081 * b);
        let step = |value: f32| (value / 16.0).clamp(0.0, 15.0) as u32;
        colors << 8 | step(blue) << 4 | step(red)
    })
}
