//! The layout of packed bf16 factors, common to all matrix units.

/// Number of rows of a tile, and of bf16 pairs per row.
pub(in crate::ops) const LINES: usize = 16;
/// Number of steps along the inner dimension of a product in one tile: two per pair.
pub(in crate::ops) const STEPS: usize = 32;
/// Number of rows and columns that [`super::unit::Ready::square`] computes at once.
pub(in crate::ops) const SIDE: usize = 2 * LINES;

/// A tile of bf16 pairs in memory. The low half of a pair belongs to the even step, the high half to the next odd step.
/// A tile of the left factor has one row for each of its rows and one column for each pair; a tile of the right factor
/// has one row for each pair and one column for each of its columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile(pub [[u32; LINES]; LINES]);

/// The next steps of a packed factor: for each [`STEPS`] steps two tiles with [`LINES`] rows of A or columns of B each.
pub(in crate::ops) type Panel = [[Tile; 2]];
