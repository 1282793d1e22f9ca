//! The kernels of [`ops::cuda`] against the CPU's, on CUDA devices with any value of `--kernels`; in tests on the emulator.

use super::{
    case::Case,
    ops::{Op, loss},
    tolerance,
};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::{
        self, embedding,
        matmul::linear_activated,
        norm::layer_norm,
        pointwise::{cross_entropy, gelu, gelu_cuda},
    },
    runtime::Kernels::Fused,
};
use candle_core::{DType, Device, Tensor};

/// Each kernel in f32 and bf16, of sizes that no block divides; on a GPU also of the sizes of large models.
pub fn cases(device: &Device) -> Vec<Case> {
    let (mut cases, large) = (vec![rows(), mlp(Precision::F32, DType::F32)], device.is_cuda());
    if large {
        cases.push(mlp(Precision::Bf16, DType::BF16));
    }
    for dtype in [DType::F32, DType::BF16] {
        let case = |name: &str, inputs: &[&[usize]], tested: Op, reference: Op| Case {
            name: format!("{name}, fused kernel"),
            inputs: inputs.iter().map(|shape| shape.to_vec()).collect(),
            dtype,
            tested: Box::new(tested),
            reference: Box::new(reference),
            tolerance: tolerance(dtype),
        };
        let widest: &[usize] = if large { &[1100, 4096] } else { &[2, 1500] };
        for shape in [&[3, 29, 70][..], &[19, 300], widest] {
            let channels = &shape[shape.len() - 1..];
            cases.push(case(
                &format!("layer norm of {} channels", channels[0]),
                &[shape, channels, channels],
                // Parameters are f32.
                |v| layer_norm::on_device(Fused, &v[0], &v[1].to_dtype(DType::F32)?, &v[2].to_dtype(DType::F32)?, 1e-5),
                |v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5),
            ));
        }
        cases.push(case("gelu", &[&[5, 333]], |v| gelu::on_device(Fused, &v[0]), |v| ops::gelu(&v[0])));
        cases.push(case(
            "bias and gelu",
            &[&[37, 130], &[130]],
            |v| Ok(gelu_cuda::bias_gelu(&v[0], &v[1])?),
            |v| ops::gelu(&v[0].broadcast_add(&v[1])?),
        ));
        cases.push(case(
            "cross-entropy",
            &[if large { &[300, 21_128] } else { &[13, 211] }],
            |v| loss(&v[0], |logits, targets, weights| cross_entropy::on_device(Fused, logits, targets, weights)),
            |v| loss(&v[0], ops::cross_entropy),
        ));
    }
    cases
}

/// Rows of a table, some of them more than once.
fn rows() -> Case {
    let ids = |table: &Tensor| -> Result<Tensor> {
        let ids: Vec<u32> = (0..600).map(|i| i * i % 50).collect();
        Ok(Tensor::from_vec(ids, (2, 300), table.device())?)
    };
    Case {
        name: "embedding, fused kernel".to_owned(),
        inputs: vec![vec![50, 24]],
        dtype: DType::F32,
        tested: Box::new(move |v| embedding::by(Fused, &v[0], &ids(&v[0])?)),
        reference: Box::new(move |v| ops::embedding(&v[0], &ids(&v[0])?)),
        tolerance: tolerance(DType::F32),
    }
}

/// A linear layer with GELU in `precision`; what comes in and out is f32.
fn mlp(precision: Precision, rounds: DType) -> Case {
    Case {
        name: format!("linear and gelu, factors in {}, fused kernel", rounds.as_str()),
        inputs: vec![vec![3, 37, 96], vec![130, 96], vec![130]],
        dtype: DType::F32,
        tested: Box::new(move |v| linear_activated::on_device(Fused, Activation::Gelu, precision, &v[0], &v[1], &v[2])),
        reference: Box::new(|v| ops::linear_activated(Activation::Gelu, Precision::F32, &v[0], &v[1], &v[2])),
        tolerance: tolerance(rounds),
    }
}
