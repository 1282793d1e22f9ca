//! Matrix products at the shapes of a training step of the 8 × 512 transformer (16 sequences of 288 tokens).
//! `cargo bench --bench gemm`; bf16 only where the processor has a unit for it.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};
use vilg::ops::{
    epilogue::Epilogue,
    gemm::{Beta, Matrix, gemm},
    matmul::bf16::{
        gemm::{PackedB, gemm_bf16, gemm_packed},
        unit::Bf16Unit,
    },
};

/// Name, rows and columns of C, inner size; which factors are stored transposed.
const SHAPES: [(&str, [usize; 3], [bool; 2]); 7] = [
    ("qkv", [4608, 1536, 512], [false, true]),
    ("widen", [4608, 2048, 512], [false, true]),
    ("narrow", [4608, 512, 2048], [false, true]),
    ("head", [4608, 12288, 512], [false, true]),
    ("input gradient", [4608, 512, 2048], [false, false]),
    ("weight gradient", [2048, 512, 4608], [true, false]),
    ("decode 16", [16, 2048, 512], [false, true]),
];

fn matrix(data: &[f32], rows: usize, columns: usize, transposed: bool) -> Matrix<'_, f32> {
    match transposed {
        false => Matrix::new(data, rows, columns),
        true => Matrix::new(data, columns, rows).t(),
    }
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (name, [m, n, k], [ta, tb]) in SHAPES {
        let (a, b, mut c) = (numbers(m * k), numbers(k * n), vec![0.0; m * n]);
        let (a, b) = (matrix(&a, m, k, ta), matrix(&b, k, n, tb));
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        group.bench_function(BenchmarkId::new("f32", name), |bench| {
            bench.iter(|| gemm(black_box(&mut c), Beta::Zero, 1.0, a, b));
        });
        let Some(unit) = Bf16Unit::get() else { continue };
        group.bench_function(BenchmarkId::new("bf16", name), |bench| {
            bench.iter(|| gemm_bf16(unit, black_box(&mut c), Beta::Zero, 1.0, a, b, Epilogue::NONE));
        });
        let packed = PackedB::new(unit, b);
        group.bench_function(BenchmarkId::new("bf16 packed", name), |bench| {
            bench.iter(|| gemm_packed(unit, black_box(&mut c), Beta::Zero, 1.0, a, &packed, Epilogue::NONE));
        });
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
