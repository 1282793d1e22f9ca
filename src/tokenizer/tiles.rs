//! Encodes and decodes images of any size with a tokenizer of a fixed size: overlapping tiles, blended so that no seams
//! are visible.

use super::ImageTokenizer;
use crate::error::{Result, ensure};
use candle_core::{Device, Tensor};

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
    /// Encodes pixels `(height, width, 3)` in \[-1, 1\] to a grid of codes that covers them. Each code is taken from
    /// the tile in which it is farthest from the border.
    pub fn encode_whole(&self, pixels: &Tensor) -> Result<CodeGrid> {
        let (height, width, _) = pixels.dims3()?;
        ensure!(height > 0 && width > 0, "the image has no pixels");
        let cells = |length: usize| length.div_ceil(self.cell()).max(self.grid);
        let (rows, columns) = (cells(height), cells(width));
        let padded = self.padded(pixels, rows, columns)?;
        let mut grid = CodeGrid { height: rows, width: columns, codes: vec![0; rows * columns] };
        let (of_rows, of_columns) = (self.owners(rows), self.owners(columns));
        for tiles in self.tiles(rows, columns).chunks(BATCH) {
            let cut = tiles.iter().map(|[top, left]| {
                let tile = padded.narrow(0, top * self.cell(), self.image_size)?;
                tile.narrow(1, left * self.cell(), self.image_size)
            });
            let codes =
                self.encode(&Tensor::stack(&cut.collect::<candle_core::Result<Vec<_>>>()?, 0)?.contiguous()?)?;
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

    /// Decodes codes to the first `height` × `width` pixels, `(height, width, 3)`.
    ///
    /// # Errors
    /// The grid is smaller than a tile or than the requested pixels, or a code is not in the codebook.
    pub fn decode_whole(&self, grid: &CodeGrid, height: usize, width: usize) -> Result<Tensor> {
        let (rows, columns, cell) = (grid.height, grid.width, self.cell());
        ensure!(
            rows >= self.grid && columns >= self.grid && grid.codes.len() == rows * columns,
            "a grid of {rows} x {columns} codes"
        );
        ensure!(
            height <= rows * cell && width <= columns * cell,
            "{height} x {width} pixels of {rows} x {columns} codes"
        );
        let ramp = self.ramp();
        let (mut sum, mut weights) =
            (vec![0.0; rows * columns * cell * cell * 3], vec![0.0; rows * columns * cell * cell]);
        for tiles in self.tiles(rows, columns).chunks(BATCH) {
            let codes = tiles.iter().flat_map(|[top, left]| {
                (0..self.grid * self.grid)
                    .map(move |i| grid.codes[(top + i / self.grid) * columns + left + i % self.grid])
            });
            let codes =
                Tensor::from_vec(codes.collect::<Vec<u32>>(), (tiles.len(), self.grid * self.grid), &Device::Cpu)?;
            let pixels = self.decode(&codes)?.flatten_from(1)?.to_vec2::<f32>()?;
            for ([top, left], pixels) in tiles.iter().zip(pixels) {
                for (i, pixel) in pixels.as_chunks::<3>().0.iter().enumerate() {
                    let (y, x) = (i / self.image_size, i % self.image_size);
                    let (weight, at) = (ramp[y] * ramp[x], (top * cell + y) * columns * cell + left * cell + x);
                    weights[at] += weight;
                    pixel.iter().zip(&mut sum[3 * at..]).for_each(|(value, sum)| *sum += weight * value);
                }
            }
        }
        sum.as_chunks_mut::<3>()
            .0
            .iter_mut()
            .zip(weights)
            .for_each(|(pixel, weight)| *pixel = pixel.map(|sum| sum / weight));
        let whole = Tensor::from_vec(sum, (rows * cell, columns * cell, 3), &Device::Cpu)?;
        Ok(whole.narrow(0, 0, height)?.narrow(1, 0, width)?.contiguous()?)
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

    /// The image with its last row and column repeated up to `rows` × `columns` cells.
    fn padded(&self, pixels: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let places = |length: usize, wanted: usize| -> candle_core::Result<Tensor> {
            Tensor::new((0..wanted).map(|i| i.min(length - 1) as u32).collect::<Vec<_>>(), pixels.device())
        };
        let (height, width, _) = pixels.dims3()?;
        let tall = pixels.contiguous()?.index_select(&places(height, rows * self.cell())?, 0)?;
        Ok(tall.index_select(&places(width, columns * self.cell())?, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config,
        nn::params::Scope,
        ops::testing::{normal, values},
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

    fn image(height: usize, width: usize) -> Result<Tensor> {
        Ok(normal("picture", &[height, width, 3], DType::F32).tanh()?)
    }

    #[test]
    fn an_image_of_the_tokenizer_s_size_is_one_tile() -> Result<()> {
        let (tokenizer, image) = (tokenizer()?, image(16, 16)?);
        let whole = tokenizer.encode_whole(&image)?;
        let plain = tokenizer.encode(&image.unsqueeze(0)?)?;
        assert_eq!(whole.codes, plain.flatten_all()?.to_vec1::<u32>()?);
        let (a, b) = (tokenizer.decode_whole(&whole, 16, 16)?, tokenizer.decode(&plain)?);
        assert!(values(&a).iter().zip(values(&b)).all(|(a, b)| (a - b).abs() < 1e-6));
        Ok(())
    }

    /// Every size works. Every pixel is a mean of tiles whose weights change slowly from pixel to pixel, and a tile's
    /// weight is smallest at its border.
    #[test]
    fn any_size_is_covered_and_blended() -> Result<()> {
        let tokenizer = tokenizer()?;
        for (height, width) in [(1, 1), (16, 17), (23, 40), (64, 16), (5, 33)] {
            let grid = tokenizer.encode_whole(&image(height, width)?)?;
            assert_eq!([grid.height, grid.width], [height.div_ceil(2).max(8), width.div_ceil(2).max(8)]);
            let decoded = tokenizer.decode_whole(&grid, height, width)?;
            assert_eq!(decoded.dims(), [height, width, 3]);
            assert!(values(&decoded).iter().all(|value| value.is_finite()));
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
