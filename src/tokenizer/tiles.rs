//! Encodes and decodes images of any size with a tokenizer of a fixed size: overlapping tiles, blended so that no seams
//! are visible.

use super::ImageTokenizer;
use crate::error::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;

/// Batch size in tiles.
const BATCH: usize = 8;

/// The codes of an image of any size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeGrid {
    pub height: usize,
    pub width: usize,
    /// Codes in raster order.
    pub codes: Vec<u32>,
}

impl ImageTokenizer {
    /// An image → codes of a grid that covers it. Each code is of the tile in which it is farthest inside.
    ///
    /// # Errors
    /// The image has no pixels, or the network's values are not finite.
    pub fn encode_whole(&self, image: &RgbImage) -> Result<CodeGrid> {
        let (width, height) = image.dimensions();
        ensure!(height > 0 && width > 0, "an image without pixels");
        let cells = |length: u32| (length as usize).div_ceil(self.cell()).max(self.grid);
        let (rows, columns) = (cells(height), cells(width));
        let mut grid = CodeGrid { height: rows, width: columns, codes: vec![0; rows * columns] };
        let (of_rows, of_columns) = (self.owners(rows), self.owners(columns));
        for tiles in self.tiles(rows, columns).chunks(BATCH) {
            let pixels: Vec<f32> = tiles.iter().flat_map(|tile| self.tile_pixels(image, *tile)).collect();
            let shape = (tiles.len(), self.image_size, self.image_size, 3);
            let codes = self.encode(&Tensor::from_vec(pixels, shape, &Device::Cpu)?)?;
            for ([top, left], codes) in tiles.iter().zip(codes.to_vec2::<u32>()?) {
                for (i, code) in codes.into_iter().enumerate() {
                    let (row, column) = (top + i / self.grid, left + i % self.grid);
                    if of_rows[row] == *top && of_columns[column] == *left {
                        grid.codes[row * columns + column] = code;
                    }
                }
            }
        }
        Ok(grid)
    }

    /// The pixels of a tile in \[-1, 1\]; beyond the image its last row and column are repeated.
    fn tile_pixels(&self, image: &RgbImage, [top, left]: [usize; 2]) -> impl Iterator<Item = f32> {
        let (width, height) = image.dimensions();
        let (top, left, side) = ((top * self.cell()) as u32, (left * self.cell()) as u32, self.image_size as u32);
        let place = move |i: u32| ((left + i % side).min(width - 1), (top + i / side).min(height - 1));
        (0..side * side)
            .map(place)
            .flat_map(|(x, y)| image.get_pixel(x, y).0.map(|value| f32::from(value) / 127.5 - 1.0))
    }

    /// Codes → the first `height` × `width` pixels.
    ///
    /// # Errors
    /// The grid is smaller than a tile or than the pixels asked for, or a code is outside of the codebook.
    pub fn decode_whole(&self, grid: &CodeGrid, height: usize, width: usize) -> Result<RgbImage> {
        let (rows, columns, cell) = (grid.height, grid.width, self.cell());
        ensure!(
            rows >= self.grid && columns >= self.grid && grid.codes.len() == rows * columns,
            "a grid of {rows} x {columns} codes"
        );
        ensure!(
            height <= rows * cell && width <= columns * cell,
            "{height} x {width} pixels of {rows} x {columns} codes"
        );
        let mut blend = Blend::new(self, columns * cell, [height, width]);
        for tiles in self.tiles(rows, columns).chunks(BATCH) {
            let codes = tiles.iter().flat_map(|[top, left]| {
                (0..self.grid * self.grid)
                    .map(move |i| grid.codes[(top + i / self.grid) * columns + left + i % self.grid])
            });
            let codes =
                Tensor::from_vec(codes.collect::<Vec<u32>>(), (tiles.len(), self.grid * self.grid), &Device::Cpu)?;
            let pixels = self.decode(&codes)?.flatten_from(1)?.to_vec2::<f32>()?;
            for ([top, left], pixels) in tiles.iter().zip(pixels) {
                blend.add([top * cell, left * cell], &pixels);
            }
        }
        blend.finish()
    }

    /// Side length of a code in pixels.
    fn cell(&self) -> usize {
        self.image_size / self.grid
    }

    /// The first cells of all tiles, `[row, column]`.
    fn tiles(&self, rows: usize, columns: usize) -> Vec<[usize; 2]> {
        let columns = self.starts(columns);
        self.starts(rows).into_iter().flat_map(|top| columns.iter().map(move |left| [top, *left])).collect()
    }

    /// Start positions of tiles along a side: every half tile, and the last one at the end.
    fn starts(&self, cells: usize) -> Vec<usize> {
        let last = cells - self.grid;
        (0..last).step_by((self.grid / 2).max(1)).chain([last]).collect()
    }

    /// For each cell along a side, the start of the tile in which it is closest to the center.
    fn owners(&self, cells: usize) -> Vec<usize> {
        let starts = self.starts(cells);
        let from_middle = |cell: usize, start: usize| (2 * cell + 1).abs_diff(2 * start + self.grid);
        let owner = |cell| starts.iter().copied().min_by_key(|&start| from_middle(cell, start)).unwrap_or(0);
        (0..cells).map(owner).collect()
    }

    /// Blending weight of each pixel along a side of a tile: decreases linearly to both ends, never to 0.
    fn ramp(&self) -> Vec<f32> {
        (0..self.image_size).map(|i| (i + 1).min(self.image_size - i) as f32).collect()
    }
}

/// The weighted mean of tiles that come row by row: a row of pixels is finished when the first tile below it comes.
struct Blend {
    /// How much a pixel counts along a side of its tile.
    ramp: Vec<f32>,
    /// Pixels of a row of tiles.
    width: usize,
    /// Height and width of the image.
    wanted: [usize; 2],
    /// The row of the image that the sums begin with.
    first: usize,
    /// For the rows of one tile: weighted sums (rows, width, 3), and the weights.
    sums: Vec<f32>,
    weights: Vec<f32>,
    bytes: Vec<u8>,
}

impl Blend {
    fn new(tokenizer: &ImageTokenizer, width: usize, wanted: [usize; 2]) -> Self {
        let ramp = tokenizer.ramp();
        let count = ramp.len() * width;
        let bytes = Vec::with_capacity(wanted[0] * wanted[1] * 3);
        Self { ramp, width, wanted, first: 0, sums: vec![0.0; count * 3], weights: vec![0.0; count], bytes }
    }

    /// Adds the tile whose first pixel is `[top, left]`.
    fn add(&mut self, [top, left]: [usize; 2], pixels: &[f32]) {
        self.flush(top);
        let side = self.ramp.len();
        for (i, pixel) in pixels.as_chunks::<3>().0.iter().enumerate() {
            let (y, x) = (i / side, i % side);
            let (weight, at) = (self.ramp[y] * self.ramp[x], y * self.width + left + x);
            self.weights[at] += weight;
            pixel.iter().zip(&mut self.sums[3 * at..]).for_each(|(value, sum)| *sum += weight * value);
        }
    }

    /// Finishes the rows above `end`.
    fn flush(&mut self, end: usize) {
        let (rows, [height, width]) = ((end - self.first).min(self.ramp.len()), self.wanted);
        for row in 0..rows.min(height.saturating_sub(self.first)) {
            let pixels =
                self.sums[3 * row * self.width..].as_chunks::<3>().0.iter().zip(&self.weights[row * self.width..]);
            let byte = |value: f32| ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
            self.bytes.extend(pixels.take(width).flat_map(|(pixel, weight)| pixel.map(|sum| byte(sum / weight))));
        }
        for (values, length) in [(&mut self.sums, 3 * rows * self.width), (&mut self.weights, rows * self.width)] {
            values.copy_within(length.., 0);
            let kept = values.len() - length;
            values[kept..].fill(0.0);
        }
        self.first += rows;
    }

    fn finish(mut self) -> Result<RgbImage> {
        self.flush(self.first + self.ramp.len());
        let [height, width] = self.wanted;
        RgbImage::from_raw(width as u32, height as u32, self.bytes).context("rows of an image are missing")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config,
        data::image::{from_pixels, to_pixels},
        nn::params::Scope,
    };
    use candle_core::DType;

    fn tokenizer() -> Result<ImageTokenizer> {
        let config = config::ImageTokenizer {
            image_size: 16,
            channels: 32,
            channel_multipliers: vec![1, 1],
            residual_blocks: 1,
            attention_sides: vec![],
            latent_channels: 8,
            codebook_size: 30,
            code_dim: 4,
            l2_normalize: true,
            ..config::ImageTokenizer::default()
        };
        ImageTokenizer::new(&Scope::from_seed(1, DType::F32, &Device::Cpu), &config)
    }

    fn image(height: u32, width: u32) -> RgbImage {
        let pixel = |x: u32, y: u32| image::Rgb([(x * 37 + y) as u8, (y * 91) as u8, (x * y * 3) as u8]);
        RgbImage::from_fn(width, height, pixel)
    }

    #[test]
    fn an_image_of_the_tokenizer_s_size_is_one_tile() -> Result<()> {
        let (tokenizer, image) = (tokenizer()?, image(16, 16));
        let whole = tokenizer.encode_whole(&image)?;
        let plain = tokenizer.encode(&to_pixels([&image])?)?;
        assert_eq!(whole.codes, plain.flatten_all()?.to_vec1::<u32>()?);
        let decoded = from_pixels(&tokenizer.decode(&plain)?)?.swap_remove(0);
        assert_eq!(tokenizer.decode_whole(&whole, 16, 16)?, decoded);
        Ok(())
    }

    /// The same sums over the whole image at once, in floats.
    fn decode_at_once(tokenizer: &ImageTokenizer, grid: &CodeGrid, height: usize, width: usize) -> Result<RgbImage> {
        let (cell, side, ramp) = (tokenizer.cell(), tokenizer.image_size, tokenizer.ramp());
        let [tall, wide] = [grid.height * cell, grid.width * cell];
        let (mut sums, mut weights) = (vec![0.0; tall * wide * 3], vec![0.0; tall * wide]);
        for [top, left] in tokenizer.tiles(grid.height, grid.width) {
            let cells = (0..tokenizer.grid * tokenizer.grid).map(|i| [i / tokenizer.grid, i % tokenizer.grid]);
            let codes: Vec<u32> = cells.map(|[y, x]| grid.codes[(top + y) * grid.width + left + x]).collect();
            let codes = Tensor::from_vec(codes, (1, tokenizer.grid * tokenizer.grid), &Device::Cpu)?;
            for (i, value) in tokenizer.decode(&codes)?.flatten_all()?.to_vec1::<f32>()?.into_iter().enumerate() {
                let [y, x] = [i / 3 / side, i / 3 % side];
                let (weight, at) = (ramp[y] * ramp[x], (top * cell + y) * wide + left * cell + x);
                sums[3 * at + i % 3] += weight * value;
                if i % 3 == 0 {
                    weights[at] += weight;
                }
            }
        }
        let means = sums.iter().enumerate().map(|(i, sum)| sum / weights[i / 3]).collect::<Vec<f32>>();
        let means = Tensor::from_vec(means, (1, tall, wide, 3), &Device::Cpu)?;
        let cut = means.narrow(1, 0, height)?.narrow(2, 0, width)?.contiguous()?;
        Ok(from_pixels(&cut)?.swap_remove(0))
    }

    #[test]
    fn rows_of_tiles_give_the_pixels_of_the_whole_image() -> Result<()> {
        let tokenizer = tokenizer()?;
        for (height, width) in [(1, 1), (23, 40), (64, 16), (17, 70), (57, 33)] {
            let image = image(height, width);
            let grid = tokenizer.encode_whole(&image)?;
            let (height, width) = (height as usize, width as usize);
            let expected = decode_at_once(&tokenizer, &grid, height, width)?;
            assert_eq!(tokenizer.decode_whole(&grid, height, width)?, expected, "{height} x {width}");
        }
        Ok(())
    }

    /// Every size works. Every pixel is a mean of tiles whose weights change slowly from pixel to pixel, and a tile's
    /// weight is smallest at its border.
    #[test]
    fn any_size_is_covered_and_blended() -> Result<()> {
        let tokenizer = tokenizer()?;
        for (height, width) in [(1, 1), (16, 17), (23, 40), (64, 16), (5, 33)] {
            let grid = tokenizer.encode_whole(&image(height, width))?;
            let cells = [height, width].map(|side| side.div_ceil(2).max(8) as usize);
            assert_eq!([grid.height, grid.width], cells);
            let decoded = tokenizer.decode_whole(&grid, height as usize, width as usize)?;
            assert_eq!(decoded.dimensions(), (width, height));
        }
        // At the border of a tile inside the image, its contribution to a pixel is at most a sixteenth.
        let ramp = tokenizer.ramp();
        assert_eq!(tokenizer.starts(20), [0, 4, 8, 12]);
        let covering = |pixel: usize| {
            tokenizer
                .starts(20)
                .into_iter()
                .filter_map(move |start| pixel.checked_sub(2 * start))
                .filter(|place| *place < 16)
        };
        for pixel in 8..32 {
            let weights: Vec<f32> = covering(pixel).map(|place| ramp[place]).collect();
            let ending = covering(pixel).filter(|place| [0, 15].contains(place)).map(|place| ramp[place]).sum::<f32>();
            assert!(ending / weights.iter().sum::<f32>() <= 1.0 / 8.0, "{pixel}: {weights:?}");
        }
        assert!(tokenizer.decode_whole(&CodeGrid { height: 3, width: 9, codes: vec![0; 27] }, 1, 1).is_err());
        Ok(())
    }
}
