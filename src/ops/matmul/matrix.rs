//! Matrices in slices, and how a product treats the old content of its destination.

/// A matrix in a slice: element (i, j) is at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A `rows × columns` matrix stored row by row without gaps.
    pub fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// A matrix whose rows start `row_stride` elements apart.
    ///
    /// The slice is too short (a bug in the caller, never of user input).
    /// The slice is too short (a defect of the caller, never of user input).
    pub fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || data.len() >= (rows - 1) * row_stride + columns, "matrix out of bounds");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, as a view.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// How a product treats the old content of its destination, as BLAS's beta.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Beta {
    /// C = alpha·A·B; C may be uninitialized.
    Zero,
    /// C += alpha·A·B.
    One,
}

/// Products with fewer multiplications run on the calling thread.
pub(super) const SERIAL_WORK: usize = 1 << 18;
