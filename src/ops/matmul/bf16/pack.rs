//! Rounds a matrix to bf16 and lays it out in tiles, padded with zeros to whole tiles.

use super::tile::{LINES, STEPS, Tile};
use crate::ops::{
    matmul::matrix::Matrix,
    simd::{Level, level},
};

/// Which factor of a product a tile belongs to: see [`Tile`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::ops) enum Factor {
    /// One row of the tile for each line.
    Left,
    /// One row of the tile for each pair of steps.
    Right,
}

/// Packs `16·N` lines starting at `line`, and as many steps starting at `step` as fit in `panel`. The lines of a left
/// factor A are the rows of `lines = A`, those of a right factor B the rows of `lines = Bᵀ`. Multiplies by `scale`
/// before rounding.
pub(in crate::ops) fn pack<const N: usize>(
    panel: &mut [[Tile; N]],
    factor: Factor,
    lines: Matrix<f32>,
    (line, step): (usize, usize),
    scale: f32,
) {
    let source = Source { lines, factor, scale };
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` only returns what the processor supports.
        Level::Avx512 => unsafe { avx512(panel, source, line, step) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(panel, source, line, step) },
        _ => source.pack::<N, false>(panel, line, step),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
fn avx512<const N: usize>(panel: &mut [[Tile; N]], source: Source, line: usize, step: usize) {
    source.pack::<N, true>(panel, line, step);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<const N: usize>(panel: &mut [[Tile; N]], source: Source, line: usize, step: usize) {
    source.pack::<N, true>(panel, line, step);
}

#[derive(Clone, Copy)]
struct Source<'a> {
    lines: Matrix<'a, f32>,
    factor: Factor,
    scale: f32,
}

impl Source<'_> {
    #[inline(always)]
    fn pack<const N: usize, const AVX2: bool>(self, panel: &mut [[Tile; N]], line: usize, step: usize) {
        for (block, tiles) in panel.iter_mut().enumerate() {
            for (i, tile) in tiles.iter_mut().enumerate() {
                self.tile::<AVX2>(tile, line + i * LINES, step + block * STEPS);
            }
        }
    }

    /// Reads along the contiguous dimension and transposes the tile if the factor needs the other one.
    #[inline(always)]
    fn tile<const AVX2: bool>(self, tile: &mut Tile, line: usize, step: usize) {
        let read = if self.lines.column_stride == 1 {
            self.along_lines(tile, line, step);
            Factor::Left
        } else {
            self.along_steps(tile, line, step);
            Factor::Right
        };
        if read != self.factor {
            transpose::<AVX2>(tile);
        }
    }

    /// One row of the tile for each line.
    #[inline(always)]
    fn along_lines(self, tile: &mut Tile, line: usize, step: usize) {
        for (i, row) in tile.0.iter_mut().enumerate() {
            let run: [f32; STEPS] = self.run(line + i, step);
            let mut halves = [0u16; STEPS];
            for (half, x) in halves.iter_mut().zip(run) {
                *half = (round(x * self.scale) >> 16) as u16;
            }
            for (j, pair) in row.iter_mut().enumerate() {
                *pair = u32::from(halves[2 * j]) | u32::from(halves[2 * j + 1]) << 16;
            }
        }
    }

    /// One row of the tile for each pair of steps.
    #[inline(always)]
    fn along_steps(self, tile: &mut Tile, line: usize, step: usize) {
        for (pair, row) in tile.0.iter_mut().enumerate() {
            let even: [f32; LINES] = self.run(line, step + 2 * pair);
            let odd: [f32; LINES] = self.run(line, step + 2 * pair + 1);
            for (i, pair) in row.iter_mut().enumerate() {
                *pair = (round(even[i] * self.scale) >> 16) | (round(odd[i] * self.scale) & 0xffff_0000);
            }
        }
    }

    /// `W` elements starting at (line, step) along the contiguous dimension; zeros outside of the matrix.
    #[inline(always)]
    fn run<const W: usize>(self, line: usize, step: usize) -> [f32; W] {
        let Matrix { data, rows, columns, row_stride, column_stride } = self.lines;
        if line >= rows || step >= columns {
            return [0.0; W];
        }
        let length = if column_stride == 1 { columns - step } else { rows - line };
        let start = &data[line * row_stride + step * column_stride..];
        // Prefetches tiles of the next steps: the hardware prefetcher does not handle long strides.
        prefetch(start.as_ptr().wrapping_add(AHEAD * column_stride), W);
        match start.first_chunk::<W>() {
            Some(run) if length >= W => *run,
            _ => {
                let mut run = [0.0; W];
                let length = length.min(W);
                run[..length].copy_from_slice(&start[..length]);
                run
            }
        }
    }
}

/// Number of steps to prefetch ahead.
const AHEAD: usize = STEPS;

/// Prefetches the cache lines of `count` numbers; any address is allowed.
#[inline(always)]
fn prefetch(start: *const f32, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..count).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(i).cast()) }
    }
}

/// The bits of an f32 whose upper half is `x` in bf16, rounded to nearest, ties to even. NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

#[inline(always)]
fn transpose<const AVX2: bool>(tile: &mut Tile) {
    #[cfg(target_arch = "x86_64")]
    if AVX2 {
        // SAFETY: callers set `AVX2` only in functions compiled for it.
        return unsafe { transpose_avx2(tile) };
    }
    for i in 0..LINES {
        for j in 0..i {
            let above = tile.0[j][i];
            tile.0[j][i] = tile.0[i][j];
            tile.0[i][j] = above;
        }
    }
}

/// Transposes four blocks of 8 × 8 and swaps two of them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_avx2(tile: &mut Tile) {
    let [a, b, c, d] = [(0, 0), (0, 8), (8, 0), (8, 8)].map(|(i, j)| transposed_8x8(tile, i, j));
    for ((i, j), block) in [((0, 0), a), ((8, 0), b), ((0, 8), c), ((8, 8), d)] {
        for (k, row) in block.into_iter().enumerate() {
            // SAFETY: eight elements of row `i + k < 16` from column `j ≤ 8` on.
            unsafe { std::arch::x86_64::_mm256_storeu_si256(tile.0[i + k][j..].as_mut_ptr().cast(), row) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transposed_8x8(tile: &Tile, i: usize, j: usize) -> [std::arch::x86_64::__m256i; 8] {
    use std::arch::x86_64::*;
    // SAFETY: eight elements of row `i + k < 16` from column `j ≤ 8` on.
    let row = |k: usize| unsafe { _mm256_loadu_si256(tile.0[i + k][j..].as_ptr().cast()) };
    let r: [__m256i; 8] = [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)];
    // Each step doubles the runs of elements from one column: 1 → 2 (of 32 bits), → 4, → 8.
    let low = |k: usize| _mm256_unpacklo_epi32(r[k], r[k + 1]);
    let high = |k: usize| _mm256_unpackhi_epi32(r[k], r[k + 1]);
    let (l0, l2, l4, l6) = (low(0), low(2), low(4), low(6));
    let (h0, h2, h4, h6) = (high(0), high(2), high(4), high(6));
    let top = [
        _mm256_unpacklo_epi64(l0, l2),
        _mm256_unpackhi_epi64(l0, l2),
        _mm256_unpacklo_epi64(h0, h2),
        _mm256_unpackhi_epi64(h0, h2),
    ];
    let bottom = [
        _mm256_unpacklo_epi64(l4, l6),
        _mm256_unpackhi_epi64(l4, l6),
        _mm256_unpacklo_epi64(h4, h6),
        _mm256_unpackhi_epi64(h4, h6),
    ];
    let left = |k: usize| _mm256_permute2x128_si256::<0x20>(top[k], bottom[k]);
    let right = |k: usize| _mm256_permute2x128_si256::<0x31>(top[k], bottom[k]);
    [left(0), left(1), left(2), left(3), right(0), right(1), right(2), right(3)]
}
