//! The layout of packed bf16 factors that all units read.

/// Rows of a tile, and pairs of bf16 in a row.
pub(in crate::ops) const LINES: usize = 16;
/// Steps along the inner dimension of a product that one tile holds: two in a pair.
pub(in crate::ops) const STEPS: usize = 32;
/// Rows and columns that [`super::unit::Ready::square`] computes at once.
pub(in crate::ops) const SIDE: usize = 2 * LINES;

/// The memory of one tile of bf16. A pair is a number of the even step in the low half and its neighbour of the odd
/// step in the high half. A tile of the left factor has a row for each of its rows and a column for each pair; a tile
/// of the right factor has a row for each pair and a column for each of its columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile(pub [[u32; LINES]; LINES]);

/// A packed factor's next steps: for each [`STEPS`] of them two tiles of [`LINES`] rows of A or columns of B.
pub(in crate::ops) type Panel = [[Tile; 2]];
