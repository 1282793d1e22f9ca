//! The functions of `nccl.rs` in a build without NCCL.

use super::call::Among;
use crate::error::{Result, failed};
use candle_core::{Device, Tensor};
use std::convert::Infallible;

/// A value of this type cannot exist.
pub struct Nccl(Infallible);

impl Nccl {
    /// Always an error.
    ///
    /// # Errors
    /// This build has no NCCL.
    pub fn new(_device: &Device, _beside: bool) -> Result<Self> {
        Err(failed("this program was built without `nccl`", "rebuild with --features nccl"))
    }

    pub fn join(
        &mut self,
        _among: Among,
        _rank: usize,
        _ranks: usize,
        _exchange: impl FnOnce(Option<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Result<()> {
        match self.0 {}
    }

    pub fn all_gather(&self, _among: Among, _ours: &Tensor) -> Result<Tensor> {
        match self.0 {}
    }

    pub fn broadcasts(&self, _among: Among, _ours: &Tensor, _counts: &[usize]) -> Result<Vec<Tensor>> {
        match self.0 {}
    }

    pub fn reduce_scatter(&self, _among: Among, _all: &Tensor) -> Result<Tensor> {
        match self.0 {}
    }

    pub fn reductions(&self, _among: Among, _all: &Tensor, _counts: &[usize]) -> Result<Tensor> {
        match self.0 {}
    }

    pub fn all_reduce(&self, _among: Among, _ours: &Tensor) -> Result<Tensor> {
        match self.0 {}
    }
}
