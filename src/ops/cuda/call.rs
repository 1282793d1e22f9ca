//! What a launch of a kernel needs, the same on a GPU and under the emulator.

use candle_core::{DType, Shape};

/// An address in the memory of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// What a kernel takes for an argument that is missing.
    pub const NULL: Self = Self(0);
}

/// An argument of a kernel: a pointer, a `Size` or a `float` of device.cuh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    Pointer(u64),
    Size(i64),
    Float(f32),
}

impl From<Address> for Arg {
    fn from(address: Address) -> Self {
        Self::Pointer(address.0)
    }
}

impl From<usize> for Arg {
    fn from(size: usize) -> Self {
        Self::Size(size as i64)
    }
}

impl From<f32> for Arg {
    fn from(number: f32) -> Self {
        Self::Float(number)
    }
}

/// A launch of a kernel.
#[derive(Debug, Clone)]
pub struct Call {
    pub kernel: String,
    /// Blocks in both dimensions.
    pub grid: [usize; 2],
    /// Threads of a block, a multiple of 32.
    pub threads: usize,
    /// Shared memory whose size the kernel leaves to the launch.
    pub shared_bytes: usize,
    pub args: Vec<Arg>,
}

impl Call {
    /// The kernel `name` for these element types: `layer_norm_forward_f32`.
    pub fn new(name: &str, dtypes: &[DType], grid: [usize; 2], threads: usize) -> Self {
        let types: String = dtypes.iter().map(|dtype| format!("_{}", dtype.as_str())).collect();
        Self { kernel: format!("{name}{types}"), grid, threads, shared_bytes: 0, args: Vec::new() }
    }

    /// The same with one more argument.
    pub fn with(mut self, arg: impl Into<Arg>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, shared_bytes: usize) -> Self {
        Self { shared_bytes, ..self }
    }

    /// `to (columns)` of this type = the sums of the columns of `from (rows, columns)`, f32.
    pub fn column_sums(dtype: DType, from: Address, to: Address, [rows, columns]: [usize; 2]) -> Self {
        let call = Self::new("column_sums", &[dtype], [columns.div_ceil(32), 1], 256);
        call.with(from).with(to).with(rows).with(columns)
    }
}

/// The addresses of inputs and outputs → the launches, in order.
pub type Calls<'a> = &'a dyn Fn(&[Address], &[Address]) -> Vec<Call>;

/// A tensor that kernels write.
#[derive(Debug, Clone)]
pub struct Output {
    pub shape: Shape,
    pub dtype: DType,
}

impl Output {
    pub fn new(shape: impl Into<Shape>, dtype: DType) -> Self {
        Self { shape: shape.into(), dtype }
    }
}

/// Rows of a block, and number of blocks, where each block sums the columns of its rows. They depend on nothing but the number of
/// rows, so that all GPUs sum in one order; few blocks, because `column_sums` adds them one after another.
pub fn row_blocks(rows: usize) -> (usize, usize) {
    let of_block = rows.div_ceil(1024).max(16);
    (of_block, rows.div_ceil(of_block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_divided_into_at_most_1024_blocks() {
        for (rows, expected) in [(1, (16, 1)), (16, (16, 1)), (17, (16, 2)), (16_384, (16, 1024)), (16_385, (17, 964))]
        {
            assert_eq!(row_blocks(rows), expected, "{rows}");
        }
    }
}
