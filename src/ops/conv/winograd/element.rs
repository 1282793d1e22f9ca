//! What Winograd's algorithm needs of a type of numbers.

use super::{products::Multiplier, transforms::Transforms};
use crate::{
    config::Precision,
    ops::{
        conv::kernel::{Element, Kernel},
        matmul::bf16::unit::Bf16Unit,
        simd::level,
    },
};

/// Numbers that convolutions run on, directly or by [`super`].
pub trait WinogradElement: Element {
    /// The transforms around the products.
    fn transforms() -> Transforms<Self>;

    /// The multiplier of factors rounded to bf16.
    type Rounded: Multiplier<Self>;

    /// That multiplier, where `precision` asks for it and there is one.
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
