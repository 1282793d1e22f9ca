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

/// Mean color of each cell; an image that is smaller than the grid repeats its pixels.
fn average(image: &RgbImage) -> Cells {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let bounds = |cell: usize, length: usize| {
        let start = cell * length / SIDE;
        start..((cell + 1) * length / SIDE).max(start + 1)
    };
    let columns: [_; SIDE] = array::from_fn(|cell| bounds(cell, width));
    array::from_fn(|row| {
        let mut sums = [[0_u64; 3]; SIDE];
        let lines = bounds(row, height);
        for line in image.as_raw().chunks_exact(3 * width).skip(lines.start).take(lines.len()) {
            for (sum, column) in sums.iter_mut().zip(&columns) {
                for pixel in line[3 * column.start..3 * column.end].chunks_exact(3) {
                    sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u64::from(*value));
                }
            }
        }
        array::from_fn(|cell| sums[cell].map(|sum| sum as f32 / (lines.len() * columns[cell].len()) as f32))
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
