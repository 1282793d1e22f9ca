//! Sparse attention patterns: which image codes a layer attends to (paper §2.2; arXiv 2102.12092, appendix B.1).
//!
//! A pattern is stated twice on purpose: [`Pattern::visible`] is the definition for one pair of positions;
//! [`Pattern::runs`] lists the same keys as a few runs, which attention reads. A test checks that they agree.

use crate::config::{self, AttentionKind, ConvBorder, RowExtent};

/// The grid of image codes; position `q` in raster order is row `q / width`, column `q % width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    pub height: usize,
    pub width: usize,
}

impl Grid {
    /// Number of codes.
    pub fn len(&self) -> usize {
        self.height * self.width
    }

    /// Whether the grid has no codes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Image codes that a query in the image attends to. Text is always visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    Dense,
    Row(RowExtent),
    Column,
    /// A `size` × `size` neighborhood; `size` is odd.
    Conv {
        size: usize,
        border: ConvBorder,
    },
}

impl Pattern {
    /// The pattern of layer `layer`, counted from 1: conv in the last layer, else
    /// column where `layer mod 4 = 2`, else row.
    pub fn of_layer(layer: usize, model: &config::Model) -> Self {
        match model.attention {
            AttentionKind::Dense => Self::Dense,
            AttentionKind::Sparse if layer == model.layers => {
                Self::Conv { size: model.conv_size, border: model.conv_border }
            }
            AttentionKind::Sparse if layer % 4 == 2 => Self::Column,
            AttentionKind::Sparse => Self::Row(model.row_extent),
        }
    }

    /// Whether the code at `query` attends to the code at `key`; `causal`: only to itself and earlier codes.
    pub fn visible(&self, grid: Grid, causal: bool, query: usize, key: usize) -> bool {
        if causal && key > query {
            return false;
        }
        let (width, distance) = (grid.width, key.abs_diff(query));
        let row_distance = (key / width).abs_diff(query / width);
        let column_distance = (key % width).abs_diff(query % width);
        match *self {
            Self::Dense => true,
            Self::Row(RowExtent::Window) => distance <= width,
            Self::Row(RowExtent::SameRow) => row_distance == 0,
            Self::Column => column_distance == 0,
            Self::Conv { size, border: ConvBorder::Clip } => row_distance <= size / 2 && column_distance <= size / 2,
            Self::Conv { size, border: ConvBorder::RasterWrap } => {
                (0..=size / 2).any(|rows| distance.abs_diff(rows * width) <= size / 2)
            }
        }
    }

    /// Lists the keys of the code at `query` in ascending order: calls `run(start, len, stride)` for each run of them.
    pub fn runs(&self, grid: Grid, causal: bool, query: usize, mut run: impl FnMut(usize, usize, usize)) {
        let Grid { height, width } = grid;
        let (row, column) = (query / width, query % width);
        let last = if causal { query } else { grid.len() - 1 };
        let mut push = |first: usize, last: usize, stride: usize| run(first, (last - first) / stride + 1, stride);
        match *self {
            Self::Dense => push(0, last, 1),
            Self::Row(RowExtent::Window) => push(query.saturating_sub(width), last.min(query + width), 1),
            Self::Row(RowExtent::SameRow) => push(row * width, last.min(row * width + width - 1), 1),
            Self::Column => push(column, if causal { query } else { (height - 1) * width + column }, width),
            Self::Conv { size, border: ConvBorder::Clip } => {
                let half = size / 2;
                let (left, right) = (column.saturating_sub(half), (column + half).min(width - 1));
                for key_row in row.saturating_sub(half)..=(row + half).min(last / width) {
                    push(key_row * width + left, (key_row * width + right).min(last), 1);
                }
            }
            Self::Conv { size, border: ConvBorder::RasterWrap } => {
                let half = size / 2;
                let mut next = 0; // the rows' stretches overlap where the neighbourhood is wider than the grid
                for shift in (0..=2 * half).map(|i| (query + i * width) as isize - (half * width) as isize) {
                    let first = (shift - half as isize).max(next as isize) as usize;
                    let end = (shift + half as isize).min(last as isize);
                    if first as isize <= end {
                        push(first, end as usize, 1);
                        next = end as usize + 1;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn all_patterns() -> Vec<Pattern> {
        let mut all =
            vec![Pattern::Dense, Pattern::Row(RowExtent::Window), Pattern::Row(RowExtent::SameRow), Pattern::Column];
        for size in [1, 3, 5, 11] {
            all.extend([ConvBorder::Clip, ConvBorder::RasterWrap].map(|border| Pattern::Conv { size, border }));
        }
        all
    }

    fn keys(pattern: Pattern, grid: Grid, causal: bool, query: usize) -> Vec<usize> {
        let mut keys = Vec::new();
        pattern.runs(grid, causal, query, |start, len, stride| keys.extend((0..len).map(|i| start + i * stride)));
        keys
    }

    #[test]
    fn runs_list_exactly_the_visible_keys() {
        for (height, width) in [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (2, 13), (12, 12), (13, 14)] {
            let grid = Grid { height, width };
            for (pattern, causal) in all_patterns().into_iter().flat_map(|p| [(p, true), (p, false)]) {
                for query in 0..grid.len() {
                    let expected: Vec<_> =
                        (0..grid.len()).filter(|&key| pattern.visible(grid, causal, query, key)).collect();
                    // Fails unless `keys` is ascending and free of duplicates.
                    assert_eq!(keys(pattern, grid, causal, query), expected, "{pattern:?} {grid:?} {causal} {query}");
                }
            }
        }
    }

    #[test]
    fn small_grids_by_hand() {
        let grid = Grid { height: 3, width: 4 };
        let conv = |border| Pattern::Conv { size: 3, border };
        assert_eq!(keys(Pattern::Row(RowExtent::Window), grid, true, 6), [2, 3, 4, 5, 6]);
        assert_eq!(keys(Pattern::Row(RowExtent::Window), grid, false, 6), [2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(keys(Pattern::Row(RowExtent::SameRow), grid, true, 6), [4, 5, 6]);
        assert_eq!(keys(Pattern::Row(RowExtent::SameRow), grid, false, 6), [4, 5, 6, 7]);
        assert_eq!(keys(Pattern::Column, grid, true, 6), [2, 6]);
        assert_eq!(keys(Pattern::Column, grid, false, 6), [2, 6, 10]);
        assert_eq!(keys(conv(ConvBorder::Clip), grid, true, 8), [4, 5, 8]);
        assert_eq!(keys(conv(ConvBorder::Clip), grid, false, 7), [2, 3, 6, 7, 10, 11]);
        assert_eq!(keys(conv(ConvBorder::RasterWrap), grid, true, 8), [3, 4, 5, 7, 8]);
    }

    /// Upper bounds on the savings by sparsity on 32×32 codes.
    #[test]
    fn counts_on_a_32_by_32_grid() {
        let grid = Grid { height: 32, width: 32 };
        let mean = |pattern| (0..1024).map(|q| keys(pattern, grid, true, q).len()).sum::<usize>() as f64 / 1024.0;
        let conv = mean(Pattern::Conv { size: 11, border: ConvBorder::Clip });
        let (row, column, dense) = (mean(Pattern::Row(RowExtent::Window)), mean(Pattern::Column), mean(Pattern::Dense));
        assert_eq!((format!("{row:.1}"), column, dense), ("32.5".into(), 16.5, 512.5));
        assert_eq!(format!("{conv:.0}"), "51");
        let read = (35.0 * row + 12.0 * column + conv) / (48.0 * dense);
        assert_eq!(format!("{:.1} %", read * 100.0), "5.6 %");
    }

    #[test]
    fn layer_rule() {
        let model = config::Model { layers: 48, ..Default::default() };
        let patterns: Vec<_> = (1..=48).map(|layer| Pattern::of_layer(layer, &model)).collect();
        let conv = Pattern::Conv { size: 11, border: ConvBorder::Clip };
        assert_eq!(patterns[47], conv);
        let columns: Vec<_> = (1..=48).filter(|&layer| patterns[layer - 1] == Pattern::Column).collect();
        assert_eq!(columns, [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46]);
        let rows = patterns.iter().filter(|&&p| p == Pattern::Row(RowExtent::Window)).count();
        assert_eq!(rows, 35);
        // The last layer is conv even if its number asks for column.
        assert_eq!(Pattern::of_layer(6, &config::Model { layers: 6, ..model.clone() }), conv);
        let dense = config::Model { attention: AttentionKind::Dense, ..model };
        assert_eq!(Pattern::of_layer(48, &dense), Pattern::Dense);
    }
}
