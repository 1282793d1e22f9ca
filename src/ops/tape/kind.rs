//! The kinds of ops on a tape.

/// What an op does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing: another view of the same memory.
    View,
    Product,
    ElementWise,
    Sum,
    Copy,
    Cast,
    /// A kernel of ours.
    Kernel,
    /// In the backward pass: zeros, and the sum with what is added to them.
    GradientSum,
}

impl Kind {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "views",
            Self::Product => "matrix products",
            Self::ElementWise => "element-wise ops",
            Self::Sum => "sums",
            Self::Copy => "copies",
            Self::Cast => "casts",
            Self::Kernel => "fused kernels",
            Self::GradientSum => "zeros and sums of gradients",
        }
    }
}

/// One launch on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub kind: Kind,
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}
