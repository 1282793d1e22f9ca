//! Activations of the manual convolution passes, in reused buffers.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Activations or their gradient, `(batch, height, width, channels)`.
pub struct Features {
    pub shape: [usize; 4],
    pub data: Vec<f32>,
}

impl Features {
    /// Number of elements of one image.
    pub fn image(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.shape[3]
    }
}

/// Free buffers by length. Every training step uses the same buffers as the one before it.
#[derive(Default)]
pub struct Buffers(Mutex<HashMap<usize, Vec<Vec<f32>>>>);

impl Buffers {
    fn free(&self) -> MutexGuard<'_, HashMap<usize, Vec<Vec<f32>>>> {
        // A thread that panicked in between left whole buffers behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of this shape with unspecified content.
    pub fn take(&self, shape: [usize; 4]) -> Features {
        let length = shape.iter().product();
        let free = self.free().get_mut(&length).and_then(Vec::pop);
        Features { shape, data: free.unwrap_or_else(|| vec![0.0; length]) }
    }

    /// A buffer with a copy of this content.
    pub fn copy(&self, shape: [usize; 4], data: &[f32]) -> Features {
        let mut features = self.take(shape);
        features.data.copy_from_slice(data);
        features
    }

    /// Returns a buffer.
    pub fn give(&self, features: Features) {
        self.free().entry(features.data.len()).or_default().push(features.data);
    }
}
