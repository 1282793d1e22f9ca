//! Activations of the manual convolutional passes, in buffers that are used again.

use std::{cell::RefCell, collections::HashMap};

/// Activations or their gradient, `(batch, height, width, channels)`.
pub struct Features {
    pub shape: [usize; 4],
    pub data: Vec<f32>,
}

impl Features {
    /// Elements of one image.
    pub fn image(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Channels of a pixel.
    pub fn channels(&self) -> usize {
        self.shape[3]
    }
}

/// Buffers that no pass needs at the moment, by length: a training step takes and gives the same ones as the one
/// before it.
#[derive(Default)]
pub struct Buffers(RefCell<HashMap<usize, Vec<Vec<f32>>>>);

impl Buffers {
    /// A buffer of this shape with any content.
    pub fn take(&self, shape: [usize; 4]) -> Features {
        let length = shape.iter().product();
        let free = self.0.borrow_mut().get_mut(&length).and_then(Vec::pop);
        Features { shape, data: free.unwrap_or_else(|| vec![0.0; length]) }
    }

    /// A buffer with this content.
    pub fn copy(&self, shape: [usize; 4], data: &[f32]) -> Features {
        let mut features = self.take(shape);
        features.data.copy_from_slice(data);
        features
    }

    /// Takes a buffer back.
    pub fn give(&self, features: Features) {
        self.0.borrow_mut().entry(features.data.len()).or_default().push(features.data);
    }
}
