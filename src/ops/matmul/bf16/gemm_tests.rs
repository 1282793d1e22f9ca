use super::*;
use crate::ops::{
    simd::{Level, level, tests::FORCED},
    testing::with_each_unit,
};
use half::bf16;
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

/// Numbers that need rounding.
fn numbers(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn rounded(x: f32) -> f64 {
    f64::from(bf16::from_f32(x))
}

#[derive(Debug, Clone, Copy)]
struct Case {
    sizes: [usize; 3],
    transposed: [bool; 2],
    beta: bool,
    alpha: f32,
    epilogue: [bool; 3],
}

/// A matrix in a slice with gaps between its rows.
const GAP: usize = 3;

fn stored(seed: u32, rows: usize, columns: usize, transposed: bool) -> (Vec<f32>, usize) {
    let (lines, length) = if transposed { (columns, rows) } else { (rows, columns) };
    (numbers(seed, lines * (length + GAP)), length + GAP)
}

fn matrix(data: &[f32], rows: usize, columns: usize, stride: usize, transposed: bool) -> Matrix<'_, f32> {
    match transposed {
        false => Matrix::strided(data, rows, columns, stride),
        true => Matrix::strided(data, columns, rows, stride).t(),
    }
}

fn at(m: Matrix<f32>, i: usize, j: usize) -> f32 {
    m.data[i * m.row_stride + j * m.column_stride]
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh())
}

impl Case {
    /// Computes C and gelu(C) with the kernel; checks them against plain loops in f64 and that no other memory was
    /// changed.
    fn check(self, unit: Bf16Unit) -> (Vec<f32>, Vec<f32>) {
        const UNTOUCHED: f32 = 1234.5;
        const MARGIN: usize = 40;
        let Self { sizes: [m, n, k], transposed: [ta, tb], beta, alpha, epilogue: [biased, residual, gelued] } = self;
        let ((a, a_stride), (b, b_stride)) = (stored(1, m, k, ta), stored(2, k, n, tb));
        let (a, b) = (matrix(&a, m, k, a_stride, ta), matrix(&b, k, n, b_stride, tb));
        let (old, bias, added) = (numbers(3, m * n), numbers(4, n), numbers(5, m * n));
        let (mut c, mut g) = (vec![UNTOUCHED; m * n + 2 * MARGIN], vec![UNTOUCHED; m * n + 2 * MARGIN]);
        let inside = MARGIN..MARGIN + m * n;
        if beta {
            c[inside.clone()].copy_from_slice(&old);
        }
        let epilogue = Epilogue {
            bias: biased.then_some(&bias[..]),
            residual: residual.then_some(&added[..]),
            gelu: gelued.then_some(&mut g[inside.clone()]),
        };
        let how = if beta { Beta::One } else { Beta::Zero };
        gemm_bf16(unit, &mut c[inside.clone()], how, alpha, a, b, epilogue);

        for i in 0..m {
            for j in 0..n {
                let terms = (0..k).map(|s| rounded(at(a, i, s) * alpha) * rounded(at(b, s, j)));
                let (mut sum, mut size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                for (there, x) in [(beta, old[i * n + j]), (biased, bias[j]), (residual, added[i * n + j])] {
                    if there {
                        sum += f64::from(x);
                        size += f64::from(x).abs();
                    }
                }
                let tolerance = (k + 8) as f64 * 2f64.powi(-24) * size;
                let place = MARGIN + i * n + j;
                assert!((f64::from(c[place]) - sum).abs() <= tolerance, "{self:?} ({i}, {j}): {} not {sum}", c[place]);
                if gelued {
                    let error = (f64::from(g[place]) - gelu(sum)).abs();
                    assert!(error <= 1.2 * tolerance + 1e-6, "{self:?} gelu ({i}, {j})");
                }
            }
        }
        let untouched = |x: &[f32]| x[..MARGIN].iter().chain(&x[MARGIN + m * n..]).all(|&x| x == UNTOUCHED);
        assert!(untouched(&c) && untouched(&g), "{self:?} wrote outside of C");
        assert!(gelued || g.iter().all(|&x| x == UNTOUCHED));
        (c, g)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn equals_plain_loops(
        sizes in prop_oneof![[1..80usize, 1..80, 1..100], [1..18usize, 1..150, 1..70], [1..3usize, 1..3, 1..3]],
        transposed: [bool; 2],
        beta: bool,
        alpha in prop_oneof![Just(1.0), Just(-0.7)],
        epilogue: [bool; 3],
    ) {
        with_each_unit(|unit| {
            Case { sizes, transposed, beta, alpha, epilogue }.check(unit);
        });
    }
}

/// More rows, columns and steps than one block, and sizes with and without remainders.
const LARGE: [[usize; 3]; 6] =
    [[320, 64, 64], [300, 33, 40], [40, 40, 2100], [16, 64, 1100], [140, 32, 1057], [64, 96, 96]];

#[test]
fn blocks_meet_without_seams() {
    for sizes in LARGE {
        for beta in [false, true] {
            with_each_unit(|unit| {
                Case { sizes, transposed: [beta; 2], beta, alpha: 1.0, epilogue: [true; 3] }.check(unit);
            });
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for sizes in LARGE {
        let case = Case { sizes, transposed: [true, false], beta: false, alpha: 1.0, epilogue: [false, true, true] };
        let on = |threads| {
            let results = std::sync::Mutex::new(Vec::new());
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| with_each_unit(|unit| results.lock().expect("no panic").push(case.check(unit))));
            results.into_inner().expect("no panic")
        };
        assert!(on(1) == on(5), "{sizes:?}");
    }
}

#[test]
fn sizes_of_zero_give_zeros() {
    with_each_unit(|unit| {
        for sizes in [[0, 3, 4], [3, 0, 4]] {
            Case { sizes, transposed: [false; 2], beta: false, alpha: 1.0, epilogue: [true; 3] }.check(unit);
        }
        for beta in [false, true] {
            for rows in [3, 20] {
                Case { sizes: [rows, 5, 0], transposed: [false; 2], beta, alpha: 1.0, epilogue: [true; 3] }.check(unit);
            }
        }
    });
}

#[test]
fn nan_and_infinity_propagate() {
    let mut a = numbers(1, 40 * 40);
    let b = vec![1.0; 40 * 40];
    (a[3 * 40 + 7], a[5 * 40], a[39 * 40 + 39]) = (f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001));
    with_each_unit(|unit| {
        let mut c = vec![0.0; 40 * 40];
        let (a, b) = (Matrix::new(&a, 40, 40), Matrix::new(&b, 40, 40));
        gemm_bf16(unit, &mut c, Beta::Zero, 1.0, a, b, Epilogue::NONE);
        for (i, row) in c.chunks_exact(40).enumerate() {
            let expected: fn(&f32) -> bool = match i {
                3 | 39 => |x| x.is_nan(),
                5 => |&x| x == f32::INFINITY,
                _ => |x| x.is_finite(),
            };
            assert!(row.iter().all(expected), "row {i}");
        }
    });
}

fn at_each_level(test: impl Fn(Level)) {
    let best = level();
    for l in [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&l| l <= best) {
        FORCED.set(Some(l));
        test(l);
        FORCED.set(None);
    }
}

/// Numbers with special cases of rounding, and many others.
fn hard_numbers(len: usize) -> Vec<f32> {
    let special = [0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let bits = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xff80_0001, 0x7fff_ffff, 1, 0x807f_ffff];
    let many = (0..u32::MAX).step_by(0x0003_1357).map(f32::from_bits);
    special.into_iter().chain(bits.map(f32::from_bits)).chain(many).cycle().take(len).collect()
}

#[test]
fn packing_rounds_and_lays_out_right_at_every_level() {
    for (rows, columns) in [(64, 64), (37, 45), (1, 1), (16, 33), (70, 5), (300, 300)] {
        let data = hard_numbers(rows * columns);
        for factor in [Factor::Left, Factor::Right] {
            for lines in [Matrix::new(&data, rows, columns), Matrix::new(&data, columns, rows).t()] {
                at_each_level(|level| {
                    let blocks = columns.div_ceil(STEPS);
                    let mut panel = vec![[Tile([[7; LINES]; LINES]); 3]; blocks];
                    let first = 5.min(rows - 1);
                    pack(&mut panel, factor, lines, (first, 0), 1.0);
                    for (line, step) in (0..3 * LINES).flat_map(|l| (0..blocks * STEPS).map(move |s| (l, s))) {
                        let there = first + line < rows && step < columns;
                        let expected = if there { at(lines, first + line, step) } else { 0.0 };
                        let tile = &panel[step / STEPS][line / LINES].0;
                        let (i, pair) = (line % LINES, step % STEPS / 2);
                        let pair = if factor == Factor::Left { tile[i][pair] } else { tile[pair][i] };
                        let got = bf16::from_bits((pair >> (16 * (step % 2))) as u16);
                        let expected = bf16::from_f32(expected);
                        let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                        assert!(same, "{level:?} {factor:?} ({line}, {step}): {got} instead of {expected}");
                    }
                });
            }
        }
    }
}

#[test]
fn a_packed_factor_serves_many_products() {
    let (k, n) = (70, 50);
    let w = numbers(7, n * k);
    with_each_unit(|unit| {
        let weight = Matrix::new(&w, n, k).t();
        let packed = PackedB::new(unit, weight);
        assert_eq!(packed.bytes(), 3 * 2 * 2048);
        for m in [1, 16, 17, 33] {
            let x = numbers(8, m * k);
            let (mut once, mut again) = (vec![0.0; m * n], vec![0.0; m * n]);
            gemm_bf16(unit, &mut once, Beta::Zero, 1.0, Matrix::new(&x, m, k), weight, Epilogue::NONE);
            gemm_packed(unit, &mut again, Beta::Zero, 1.0, Matrix::new(&x, m, k), &packed, Epilogue::NONE);
            assert_eq!(once, again);
        }
    });
}
