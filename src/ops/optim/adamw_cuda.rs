//! AdamW by the kernel of adamw.cu.

use super::adamw::Factors;
use crate::ops::cuda::{Call, Output, run};
use candle_core::{DType, Result, Tensor};

/// Threads of a block, each with one weight.
const THREADS: usize = 256;

/// New weights and moments, of weights, gradient and moments that [`takes`](crate::ops::cuda::takes) accepts, in f32.
pub(super) fn step(of: [&Tensor; 4], f: &Factors<f64>) -> Result<[Tensor; 3]> {
    let len = of[0].elem_count();
    let of = [of[0].contiguous()?, of[1].contiguous()?, of[2].contiguous()?, of[3].contiguous()?];
    let factors =
        [f.keep, f.rate, f.beta1, f.one_minus_beta1, f.beta2, f.one_minus_beta2, f.scale, f.eps, f.root_correction2];
    let outputs = [(); 3].map(|()| Output::new(len, DType::F32));
    let updated = run(&of.each_ref(), outputs, &|from, to| {
        let call = Call::new("adamw", &[DType::F32], [len.div_ceil(THREADS), 1], THREADS);
        let call = from.iter().chain(to).fold(call, |call, &address| call.with(address)).with(len);
        vec![factors.iter().fold(call, |call, &factor| call.with(factor as f32))]
    })?;
    Ok(updated.map(crate::ops::custom_gradient::Computed::tensor))
}
