//! Winograd's products with factors rounded to bf16 and sums in f32. The transforms run in f32, and their results are
//! rounded.

use super::{
    products::{GROUP, Multiplier, point_stride},
    transforms::POINTS,
};
use crate::ops::{
    conv::geometry::Geometry,
    matmul::{
        bf16::{
            pack::{Factor, pack},
            tile::{LINES, Panel, SIDE, STEPS, Tile},
            unit::Bf16Unit,
        },
        matrix::{Beta, Matrix},
    },
};
use rayon::prelude::*;

// The lines of a tile are a group of channels.
const _: () = assert!(GROUP == LINES);

const ZERO: Tile = Tile([[0; LINES]; LINES]);

/// Buffers for the packed factors of one point.
#[derive(Default)]
pub struct Buffer {
    left: Vec<[Tile; 1]>,
    right: Vec<[Tile; 2]>,
}

impl Multiplier<f32> for Bf16Unit {
    /// (panel of outputs, point, block of inputs)
    type Filters = Vec<[Tile; 2]>;
    type Buffer = Buffer;

    fn width(self) -> usize {
        SIDE
    }

    fn filters(self, transformed: Vec<f32>, inputs: usize) -> Self::Filters {
        let blocks = inputs.div_ceil(STEPS);
        let mut filters = vec![[ZERO; 2]; transformed.len() / (inputs * SIDE) * blocks];
        let matrices = transformed.par_chunks(inputs * SIDE).zip(filters.par_chunks_mut(blocks));
        matrices.for_each(|(matrix, panel)| {
            pack(panel, Factor::Right, Matrix::new(matrix, inputs, SIDE).t(), (0, 0), 1.0);
        });
        filters
    }

    fn multiply(
        self,
        input: &[f32],
        filters: &Self::Filters,
        products: &mut Vec<f32>,
        patches: usize,
        g: Geometry,
        buffer: &mut Buffer,
    ) {
        let (from, to) = (point_stride(patches, g.inputs), point_stride(patches, g.outputs));
        products.resize(POINTS * to, 0.0);
        let blocks = g.inputs.div_ceil(STEPS);
        let left = sized(&mut buffer.left, blocks);
        for first in (0..patches).step_by(LINES) {
            let rows = LINES.min(patches - first);
            let unit = self.ready(rows);
            for point in 0..POINTS {
                let a = Matrix::new(&input[point * from..], patches, g.inputs);
                pack(left, Factor::Left, a, (first, 0), 1.0);
                let c = &mut products[point * to + first * g.outputs..][..rows * g.outputs];
                for (panel, c) in (0..g.outputs / SIDE).map(|panel| (panel, c[panel * SIDE..].as_mut_ptr())) {
                    let b: &Panel = &filters[(panel * POINTS + point) * blocks..][..blocks];
                    // SAFETY: the unit is ready for the rows, of which C has as many.
                    unsafe { unit.flat(left, b, c, g.outputs, Beta::Zero) };
                }
            }
        }
    }

    fn add_products(
        self,
        input: &[f32],
        gradient: &[f32],
        sums: &mut [f32],
        patches: usize,
        g: Geometry,
        buffer: &mut Buffer,
    ) {
        let (a, b) = (point_stride(patches, g.inputs), point_stride(patches, g.outputs));
        let blocks = patches.div_ceil(STEPS);
        let (left, right) = (sized(&mut buffer.left, blocks), sized(&mut buffer.right, g.outputs / SIDE * blocks));
        let unit = self.ready(GROUP);
        for (point, sums) in sums.chunks_exact_mut(g.inputs * g.outputs).enumerate() {
            for (i, panel) in right.chunks_exact_mut(blocks).enumerate() {
                let group = &gradient[point * b + i * SIDE * patches..];
                pack(panel, Factor::Right, Matrix::new(group, patches, SIDE).t(), (0, 0), 1.0);
            }
            for (i, c) in sums.chunks_exact_mut(GROUP * g.outputs).enumerate() {
                let group = &input[point * a + i * GROUP * patches..];
                pack(left, Factor::Left, Matrix::new(group, patches, GROUP).t(), (0, 0), 1.0);
                for (panel, b) in right.chunks_exact(blocks).enumerate() {
                    // SAFETY: the unit is ready for the 16 rows of C.
                    unsafe { unit.flat(left, b, c[panel * SIDE..].as_mut_ptr(), g.outputs, Beta::One) };
                }
            }
        }
    }
}

fn sized<const N: usize>(tiles: &mut Vec<[Tile; N]>, len: usize) -> &mut [[Tile; N]] {
    tiles.resize(len, [ZERO; N]);
    tiles
}
