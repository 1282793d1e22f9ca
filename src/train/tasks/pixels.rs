//! The images of a step's samples as a tensor.

use crate::{
    data::{Record, image::to_pixels},
    error::{Context, Result},
    runtime,
};
use candle_core::Tensor;

/// The pixels of samples (samples, side, side, 3) in \[-1, 1\].
pub fn pixels(records: &[Record]) -> Result<Tensor> {
    let images: Option<Vec<_>> = records.iter().map(|record| record.image.as_ref()).collect();
    Ok(to_pixels(images.context("a sample without an image")?)?.to_device(&runtime::device()?)?)
}
