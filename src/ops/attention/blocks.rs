//! What blockwise attention makes once: how codes are grouped, and the biases of their scores on the device.

use candle_core::Tensor;
use std::ops::Range;

/// How codes are grouped. The codes of a group are multiplied with one list of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A group is a row of the grid. Its keys are that row, `before` rows above and `after` rows below.
    Band { before: usize, after: usize },
    /// A group is a column of the grid, and so are its keys.
    Columns,
    /// All codes are one group, and all are its keys.
    All,
}

/// The groups of a list of keys, the same for all batches.
#[derive(Debug)]
pub struct Blocks {
    pub shape: Shape,
    /// Positions of the codes.
    pub codes: Range<usize>,
    /// Height and width of the grid; the last cells may be without codes.
    pub grid: (usize, usize),
    /// Other positions that codes attend to: one range before the codes and one behind them.
    pub around: [Range<usize>; 2],
    /// Number of positions, from the first, that contains all keys of the other queries.
    pub reach: usize,
    /// Bias of the scores of codes (groups, codes of a group, `around` and then the keys of the group).
    pub codes_bias: Option<Tensor>,
    /// Bias of the scores of all other queries (others, `reach`).
    pub others_bias: Option<Tensor>,
    /// Whether a query has no keys at all.
    pub has_empty: bool,
}

impl Blocks {
    /// Number of groups, and of codes in each.
    pub(super) fn groups(&self) -> (usize, usize) {
        let (height, width) = self.grid;
        match self.shape {
            Shape::Band { .. } => (height, width),
            Shape::Columns => (width, height),
            Shape::All => (1, height * width),
        }
    }

    /// Number of keys of a group.
    pub(super) fn width(&self) -> usize {
        match self.shape {
            Shape::Band { before, after } => (before + 1 + after) * self.grid.1,
            Shape::Columns => self.grid.0,
            Shape::All => self.grid.0 * self.grid.1,
        }
    }

    /// Number of positions around the codes that they attend to.
    pub(super) fn around_len(&self) -> usize {
        self.around.iter().map(ExactSizeIterator::len).sum()
    }

    /// Where a query's scores of a key are, counted from the first key: group, code of the group, key. `None`: the key is
    /// not among those of the group.
    pub(super) fn place(&self, query: usize, key: usize) -> Option<[usize; 3]> {
        let width = self.grid.1;
        let code = query - self.codes.start;
        let (row, column) = (code / width, code % width);
        let (group, member) = match self.shape {
            Shape::Band { .. } => (row, column),
            Shape::Columns => (column, row),
            Shape::All => (0, code),
        };
        let [front, behind] = &self.around;
        let own = if front.contains(&key) {
            key - front.start
        } else if behind.contains(&key) {
            front.len() + key - behind.start
        } else {
            let key = key.checked_sub(self.codes.start).filter(|_| key < self.codes.end)?;
            self.around_len()
                + match self.shape {
                    Shape::Band { before, after } => {
                        let band = (key / width + before).checked_sub(row).filter(|band| *band <= before + after)?;
                        band * width + key % width
                    }
                    Shape::Columns if key % width == column => key / width,
                    Shape::Columns => return None,
                    Shape::All => key,
                }
        };
        Some([group, member, own])
    }
}

/// The biases of a batch: those of its [`Blocks`] and of the padding of its texts, broadcastable to the scores.
#[derive(Debug, Clone)]
pub struct Biases {
    /// (b or 1, 1, groups, codes of a group, keys).
    pub codes: Option<Tensor>,
    /// (b or 1, 1, others, `reach`).
    pub others: Option<Tensor>,
    /// Whether a query has no keys, or only keys in a text without tokens.
    pub has_empty: bool,
}
