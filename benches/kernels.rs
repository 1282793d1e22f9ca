//! Single kernels at the sizes of `vilg bench --shape perf`: `cargo bench --bench kernels [NAME]`.

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use vilg::{
    config::{ConvBorder, Precision, RowExtent},
    model::Layout,
    nn::pattern::{Grid, Pattern},
    ops::{
        self, AdamW, Padding,
        conv::{self, Geometry},
    },
    random::Random,
};

const ROWS: usize = 16 * 288;
const HIDDEN: usize = 512;

fn normal(shape: &[usize]) -> Var {
    let mut random = Random::keyed(1, "kernels", shape.len() as u64, 0);
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| random.normal() as f32).collect();
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Forward and backward of `op`, seeded with ones.
fn both(op: impl Fn() -> Tensor) {
    black_box(op().sum_all().unwrap().backward().unwrap());
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward and backward");
    let (x, weight, bias) = (normal(&[ROWS, HIDDEN]), normal(&[HIDDEN]), normal(&[HIDDEN]));
    group.throughput(Throughput::Elements((ROWS * HIDDEN) as u64));
    group.bench_function("layer norm", |b| b.iter(|| both(|| ops::layer_norm(&x, &weight, &bias, 1e-5).unwrap())));
    let x = normal(&[ROWS, 4 * HIDDEN]);
    group.throughput(Throughput::Elements((ROWS * 4 * HIDDEN) as u64));
    group.bench_function("gelu", |b| b.iter(|| both(|| ops::gelu(&x).unwrap())));
    let rows = 1024;
    let logits = normal(&[rows, 12288]);
    let targets = Tensor::from_vec((0..rows as u32).collect::<Vec<_>>(), rows, &Device::Cpu).unwrap();
    let weights = Tensor::from_vec(vec![1f32; rows], rows, &Device::Cpu).unwrap();
    group.throughput(Throughput::Elements((rows * 12288) as u64));
    let loss = || ops::cross_entropy(&logits, &targets, &weights).unwrap();
    group.bench_function("cross-entropy", |b| b.iter(|| both(loss)));
    group.finish();
}

fn adamw(c: &mut Criterion) {
    let count = 12288 * HIDDEN;
    let numbers = || normal(&[count]).to_vec1::<f32>().unwrap();
    let (mut weights, gradient) = (numbers(), numbers());
    let (mut m, mut v) = (vec![0f32; count], vec![0f32; count]);
    let hyper = AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.96, eps: 1e-8, weight_decay: 0.045, step: 10 };
    let mut group = c.benchmark_group("update");
    group.throughput(Throughput::Elements(count as u64));
    let mut step = || ops::adamw_step(&mut weights, &gradient, [&mut m, &mut v], None, &hyper, 0.5).unwrap();
    group.bench_function("adamw", |b| b.iter(&mut step));
    group.finish();
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention, forward and backward");
    let layout = Layout::text_to_image(32, Grid { height: 16, width: 16 });
    let (samples, heads) = (4, 8);
    let qkv = normal(&[samples, layout.positions(), 3, heads, HIDDEN / heads]);
    for (name, pattern) in [
        ("dense", Pattern::Dense),
        ("row", Pattern::Row(RowExtent::Window)),
        ("column", Pattern::Column),
        ("conv", Pattern::Conv { size: 11, border: ConvBorder::Clip }),
    ] {
        let keys = layout.keys(pattern, &vec![32; samples]);
        let run = || both(|| ops::attention(&qkv, &keys).unwrap());
        group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(run));
    }
    group.finish();
}

/// The three products of 3×3 convolutions at a tokenizer's and LPIPS' sizes.
fn convolution(c: &mut Criterion) {
    let mut group = c.benchmark_group("3x3 convolution");
    for (batch, side, channels) in [(16, 64, 32), (16, 64, 64), (4, 64, 128), (4, 32, 256), (16, 8, 512)] {
        let g = Geometry::new([batch, side, side, channels], [channels, channels, 3, 3], 1, Padding::same(1));
        let numbers = |count: usize| normal(&[count]).to_vec1::<f32>().unwrap();
        let (x, w) = (numbers(batch * side * side * channels), numbers(channels * channels * 9));
        let (mut y, mut dw) = (x.clone(), w.clone());
        group.throughput(Throughput::Elements((2 * 9 * batch * side * side * channels * channels) as u64));
        for precision in [Precision::F32, Precision::Bf16] {
            let id = |what| BenchmarkId::new(what, format!("{} {batch}x{side}x{side}x{channels}", precision.name()));
            group.bench_function(id("forward"), |b| b.iter(|| conv::forward(precision, &x, &w, None, None, &mut y, g)));
            group.bench_function(id("input"), |b| b.iter(|| conv::input_gradient(precision, &x, &w, &mut y, g)));
            group.bench_function(id("weight"), |b| b.iter(|| conv::weight_gradient(precision, &x, &y, &mut dw, g)));
        }
    }
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(10);
    targets = elementwise, adamw, attention, convolution
}
criterion_main!(kernels);
