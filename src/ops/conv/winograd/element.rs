//! Element types of Winograd's algorithm.

use super::{products::Multiplier, transforms::Transforms};
use crate::{
    config::Precision,
    ops::{
        conv::kernel::{Element, Kernel},
        matmul::bf16::unit::Bf16Unit,
        simd::level,
    },
};

/// Element types of convolution that [`super`] supports.
pub trait WinogradElement: Element {
    /// The transforms around the products.
    fn transforms() -> Transforms<Self>;

    /// The multiplier for factors rounded to bf16.
    type Rounded: Multiplier<Self>;

    /// That multiplier, if `precision` asks for it and it exists.
    fn rounded(precision: Precision) -> Option<Self::Rounded>;
}

impl WinogradElement for f64 {
    fn transforms() -> Transforms<f64> {
        Transforms::portable()
    }

    type Rounded = Kernel<f64>;

    fn rounded(_: Precision) -> Option<Kernel<f64>> {
        None
    }
}

impl WinogradElement for f32 {
    fn transforms() -> Transforms<f32> {
        Transforms::at(level())
    }

    type Rounded = Bf16Unit;

    fn rounded(precision: Precision) -> Option<Bf16Unit> {
        Bf16Unit::for_precision(precision)
    }
}
