//! The ops of training and decoding, except attention.

use super::{case::Case, halves, tolerance};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::{
        self, Padding, conv,
        matmul::linear_on_device,
        norm::{group_norm, layer_norm},
        pointwise::{activation, cross_entropy, gelu},
        pool::{max_pool, upsample},
    },
    runtime::Kernels,
};
use candle_core::{DType, Device, Tensor};

pub type Op = fn(&[Tensor]) -> Result<Tensor>;

/// All cases, of odd sizes.
pub fn cases(device: &Device) -> Vec<Case> {
    let mut cases = singles(device);
    for dtype in halves(device) {
        cases.extend(products(*dtype));
    }
    cases.extend(copies());
    cases
}

/// An op in f32: on a device as training calls it, on the CPU as it is composed for devices.
fn op(device: &Device, name: &str, inputs: &[&[usize]], op: Op, composed: Op) -> Case {
    Case {
        name: name.to_owned(),
        inputs: inputs.iter().map(|shape| shape.to_vec()).collect(),
        dtype: DType::F32,
        tested: Box::new(if device.is_cpu() { composed } else { op }),
        reference: Box::new(op),
        tolerance: tolerance(DType::F32),
    }
}

fn singles(device: &Device) -> Vec<Case> {
    let case = |name: &str, inputs: &[&[usize]], with: Op, composed: Op| op(device, name, inputs, with, composed);
    vec![
        case(
            "linear",
            &[&[3, 37, 96], &[130, 96], &[130]],
            |v| ops::linear(&v[0], &v[1], Some(&v[2])),
            |v| linear_on_device::on_device(&v[0], &v[1], Some(&v[2]), [DType::F32; 2]),
        ),
        case("gelu", &[&[5, 333]], |v| ops::gelu(&v[0]), |v| gelu::on_device(Kernels::Stock, &v[0])),
        case(
            "gelu by erf",
            &[&[5, 333]],
            |v| ops::activation(Activation::GeluErf, &v[0]),
            |v| activation::on_device(Kernels::Stock, Activation::GeluErf, &v[0]),
        ),
        case(
            "quick gelu",
            &[&[5, 333]],
            |v| ops::activation(Activation::QuickGelu, &v[0]),
            |v| activation::on_device(Kernels::Stock, Activation::QuickGelu, &v[0]),
        ),
        case(
            "layer norm",
            &[&[3, 29, 70], &[70], &[70]],
            |v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5),
            |v| layer_norm::on_device(Kernels::Stock, &v[0], &v[1], &v[2], 1e-5),
        ),
        case(
            "group norm and silu",
            &[&[2, 5, 7, 64], &[64], &[64]],
            |v| ops::group_norm(&v[0], &v[1], &v[2], 32, 1e-6, true),
            |v| group_norm::composed(&v[0], &v[1], &v[2], 32, 1e-6, true),
        ),
        case(
            "cross-entropy",
            &[&[13, 211]],
            |v| loss(&v[0], ops::cross_entropy),
            |v| loss(&v[0], |x, t, w| cross_entropy::on_device(Kernels::Stock, x, t, w)),
        ),
        case("embedding", &[&[50, 24]], |v| rows(&v[0]), |v| rows(&v[0])),
        convolution(device, "convolution 3 x 3", 3, 1, Padding::same(1)),
        convolution(device, "convolution, stride 2", 3, 2, Padding { top: 0, bottom: 1, left: 0, right: 1 }),
        convolution(device, "convolution 1 x 1", 1, 1, Padding::default()),
        case(
            "max pooling",
            &[&[2, 6, 8, 5]],
            |v| pooled(&v[0], ops::max_pool2x),
            |v| pooled(&v[0], max_pool::composed),
        ),
        case("upsampling", &[&[2, 3, 5, 7]], |v| ops::upsample_nearest2x(&v[0]), |v| upsample::composed(&v[0])),
    ]
}

fn convolution(device: &Device, name: &str, size: usize, stride: usize, padding: Padding) -> Case {
    let composed = device.is_cpu();
    Case {
        name: name.to_owned(),
        // Square, as all images of training: candle's gradient with a stride needs it.
        inputs: vec![vec![2, 10, 10, 12], vec![20, 12, size, size], vec![20]],
        dtype: DType::F32,
        tested: Box::new(move |v| match composed {
            true => conv::composed(&v[0], &v[1], Some(&v[2]), stride, padding),
            false => ops::conv2d(&v[0], &v[1], Some(&v[2]), stride, padding),
        }),
        reference: Box::new(move |v| ops::conv2d(&v[0], &v[1], Some(&v[2]), stride, padding)),
        tolerance: tolerance(DType::F32),
    }
}

/// Products whose factors are rounded; what comes in and out is f32.
fn products(dtype: DType) -> Vec<Case> {
    let precision = if dtype == DType::BF16 { Precision::Bf16 } else { Precision::F16 };
    let product = Case {
        name: format!("linear, factors in {}", dtype.as_str()),
        inputs: vec![vec![3, 37, 96], vec![130, 96], vec![130]],
        dtype: DType::F32,
        tested: Box::new(move |v| ops::linear_in(precision, &v[0], &v[1], Some(&v[2]))),
        reference: Box::new(|v| ops::linear(&v[0], &v[1], Some(&v[2]))),
        tolerance: tolerance(dtype),
    };
    let convolution = Case {
        name: format!("convolution, factors in {}", dtype.as_str()),
        inputs: vec![vec![2, 9, 10, 32], vec![64, 32, 3, 3], vec![64]],
        dtype: DType::F32,
        tested: Box::new(move |v| ops::conv2d_in(precision, &v[0], &v[1], Some(&v[2]), 1, Padding::same(1))),
        reference: Box::new(|v| ops::conv2d(&v[0], &v[1], Some(&v[2]), 1, Padding::same(1))),
        tolerance: tolerance(dtype),
    };
    vec![product, convolution]
}

/// The way to the device and back, and casts: exact.
fn copies() -> Vec<Case> {
    let cast = |dtype: DType| Case {
        name: format!("copy and cast to {}", dtype.as_str()),
        inputs: vec![vec![7, 1001]],
        dtype: DType::F32,
        tested: Box::new(move |v| Ok(v[0].to_dtype(dtype)?.to_dtype(DType::F32)?)),
        reference: Box::new(|v| Ok(v[0].affine(1.0, 0.0)?)),
        tolerance: 0.0,
    };
    [DType::F32, DType::BF16, DType::F16].map(cast).into()
}

/// The weighted loss of fixed targets; some rows have no weight.
pub fn loss(logits: &Tensor, op: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (count, vocabulary) = logits.dims2()?;
    let targets: Vec<u32> = (0..count).map(|row| (row * 97 % vocabulary) as u32).collect();
    let weights: Vec<f32> = (0..count).map(|row| (row % 4) as f32).collect();
    let device = logits.device();
    op(logits, &Tensor::from_vec(targets, count, device)?, &Tensor::from_vec(weights, count, device)?)
}

/// Pooling of pixels that differ: the stock ops give the gradient to all of several equal largest pixels, the kernel of the
/// CPU to the first.
fn pooled(x: &Tensor, pool: fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let numbers = Tensor::arange(0, x.elem_count() as u32, x.device())?.to_dtype(x.dtype())?;
    pool(&(x + numbers.affine(1.0 / 65_536.0, 0.0)?.reshape(x.shape())?)?)
}

/// Rows of a table, some of them more than once.
fn rows(table: &Tensor) -> Result<Tensor> {
    let ids: Vec<u32> = (0..90).map(|i| i * i % 50).collect();
    Ok(table.index_select(&Tensor::from_vec(ids, 90, table.device())?, 0)?)
}
