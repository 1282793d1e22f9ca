//! `y = x·Wᵀ + b`. Also the example of how an op is written: kernels on slices, a candle `CustomOp` around them with
//! its `bwd`, the same from stock ops for other devices and as the reference (`linear_on_device`), and a function that
//! chooses.

use super::{
    bf16::{gemm::gemm_bf16, unit::Bf16Unit},
    epilogue::Epilogue,
    gemm::{gemm, gemm_in},
    linear_on_device::on_device,
    matrix::{Beta, Matrix},
};
use crate::{
    config::Precision,
    error::Result,
    ops::{
        pointwise::gelu,
        simd::{Real, multiversion},
        slices::{by_dtype, fresh, slice, storage, tensor, view},
    },
};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

/// `x (.., in)`, `w (out, in)`, `b (out)` → `(.., out)`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return on_device(x, w, b, [x.dtype(); 2]);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    Ok(match b {
        Some(b) => x.apply_op3(&w, &b.contiguous()?, Linear)?,
        None => x.apply_op2(&w, Linear)?,
    })
}

/// [`linear()`] with factors and product rounded to `precision` by stock candle ops, also in the backward pass, in the type
/// of x. On a CPU candle has no bf16 product and computes in f32.
pub fn linear_in(precision: Precision, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let dtype = match matmul_weight_dtype(precision) {
        Some(dtype) if dtype == DType::F16 || !x.device().is_cpu() => dtype,
        _ => return linear(x, w, b),
    };
    on_device(x, w, b, [dtype, x.dtype()])
}

/// The dtype that factors are cast to for products in this precision; `None`: no cast.
pub fn matmul_weight_dtype(precision: Precision) -> Option<DType> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(DType::BF16),
        Precision::F16 => Some(DType::F16),
    }
}

/// Whether linear layers in training round their weights to bf16 on this device, so that sending them in bf16 loses
/// nothing.
pub fn rounds_to_bf16(precision: Precision, device: &Device) -> bool {
    precision == Precision::Bf16 && (!device.is_cpu() || Bf16Unit::get().is_some())
}

/// `y (rows, out) = x (rows, in) · w (out, in)ᵀ + b`.
pub fn forward<T: Real>(x: &[T], w: &[T], b: Option<&[T]>, rows: usize, inputs: usize, outputs: usize) -> Vec<T> {
    let fill = |y: &mut [T]| {
        let beta = start(y, outputs, b, None);
        gemm(y, beta, 1.0, Matrix::new(x, rows, inputs), Matrix::new(w, outputs, inputs).t());
    };
    // SAFETY: the bias, or the product itself, is written to every element before anything is read.
    unsafe { fresh(rows * outputs, fill) }
}

/// dx (rows, in) = dy (rows, out) · w (out, in).
pub fn backward_input<T: Real>(dy: &[T], w: &[T], rows: usize, inputs: usize, outputs: usize) -> Vec<T> {
    let (dy, w) = (Matrix::new(dy, rows, outputs), Matrix::new(w, outputs, inputs));
    // SAFETY: a product onto nothing writes every element.
    unsafe { fresh(rows * inputs, |dx| gemm(dx, Beta::Zero, 1.0, dy, w)) }
}

/// dw (out, in) = dy (rows, out)ᵀ · x (rows, in).
pub fn backward_weight<T: Real>(dy: &[T], x: &[T], rows: usize, inputs: usize, outputs: usize) -> Vec<T> {
    let (dy, x) = (Matrix::new(dy, rows, outputs).t(), Matrix::new(x, rows, inputs));
    // SAFETY: a product onto nothing writes every element.
    unsafe { fresh(outputs * inputs, |dw| gemm(dw, Beta::Zero, 1.0, dy, x)) }
}

/// `y (rows, out) = x (rows, in) · w (out, in)ᵀ + bias + residual` in `precision`, and gelu(y) in a second matrix.
pub fn forward_in(
    precision: Precision,
    x: &[f32],
    w: &[f32],
    [rows, inputs, outputs]: [usize; 3],
    epilogue: Epilogue<f32>,
) -> Vec<f32> {
    let (x, w) = (Matrix::new(x, rows, inputs), Matrix::new(w, outputs, inputs).t());
    let fill = |y: &mut [f32]| match Bf16Unit::for_precision(precision) {
        Some(unit) => gemm_bf16(unit, y, Beta::Zero, 1.0, x, w, epilogue),
        None => {
            let beta = start(y, outputs, epilogue.bias, epilogue.residual);
            gemm_in(precision, y, beta, 1.0, x, w);
            if let Some(gelu) = epilogue.gelu {
                gelu::forward_into(gelu, y);
            }
        }
    };
    // SAFETY: the epilogue, or the product itself, is written to every element before anything is read.
    unsafe { fresh(rows * outputs, fill) }
}

/// `y = x · wᵀ + bias + residual` and gelu(y), both (rows, out), computed in `precision`.
pub fn forward_gelu(
    precision: Precision,
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    sizes: [usize; 3],
) -> (Vec<f32>, Vec<f32>) {
    let mut y = Vec::new();
    let fill = |gelu: &mut [f32]| {
        y = forward_in(precision, x, w, sizes, Epilogue { bias: Some(bias), residual, gelu: Some(gelu) });
    };
    // SAFETY: the epilogue writes gelu of every element.
    let gelu = unsafe { fresh(sizes[0] * sizes[2], fill) };
    (y, gelu)
}

/// Initializes the matrix to which the product is added, if there is a bias or residual.
fn start<T: Real>(y: &mut [T], outputs: usize, bias: Option<&[T]>, residual: Option<&[T]>) -> Beta {
    let chunk = outputs.max(1) * 64;
    match (bias, residual) {
        (None, None) => return Beta::Zero,
        (None, Some(residual)) => {
            y.par_chunks_mut(chunk).zip(residual.par_chunks(chunk)).for_each(|(y, r)| y.copy_from_slice(r));
        }
        (Some(bias), None) => y.par_chunks_mut(chunk).for_each(|rows| {
            rows.chunks_exact_mut(outputs.max(1)).for_each(|row| row.copy_from_slice(bias));
        }),
        (Some(bias), Some(residual)) => {
            y.par_chunks_mut(chunk).zip(residual.par_chunks(chunk)).for_each(|(y, r)| {
                for (y, r) in y.chunks_exact_mut(outputs.max(1)).zip(r.chunks_exact(outputs.max(1))) {
                    y.iter_mut().zip(r).zip(bias).for_each(|((y, &r), &b)| *y = r + b);
                }
            });
        }
    }
    Beta::One
}

/// dx (rows, in) = dy (rows, out) · w (out, in), computed in `precision`.
pub fn input_gradient(precision: Precision, dy: &[f32], w: &[f32], [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    let (dy, w) = (Matrix::new(dy, rows, outputs), Matrix::new(w, outputs, inputs));
    // SAFETY: a product onto nothing writes every element.
    unsafe { fresh(rows * inputs, |dx| gemm_in(precision, dx, Beta::Zero, 1.0, dy, w)) }
}

/// dw (out, in) (+)= dy (rows, out)ᵀ · x (rows, in), computed in `precision`.
pub fn weight_gradient(
    precision: Precision,
    dw: &mut [f32],
    beta: Beta,
    dy: &[f32],
    x: &[f32],
    [rows, inputs, outputs]: [usize; 3],
) {
    gemm_in(precision, dw, beta, 1.0, Matrix::new(dy, rows, outputs).t(), Matrix::new(x, rows, inputs));
}

/// Number of rows that one task sums; fixed, so that the result does not depend on the number of threads.
const SUM_ROWS: usize = 256;

/// Column sums of `x (rows, columns)`.
pub fn column_sums<T: Real>(x: &[T], columns: usize) -> Vec<T> {
    let mut total = vec![T::ZERO; columns];
    let partial = |x: &[T]| {
        let mut sums = vec![T::ZERO; columns];
        add_rows(&mut sums, x);
        sums
    };
    let partials: Vec<Vec<T>> = x.par_chunks(columns.max(1) * SUM_ROWS).map(partial).collect();
    partials.iter().for_each(|p| add_rows(&mut total, p));
    total
}

multiversion! {
    /// Adds each row of `x` to `sums`.
    fn add_rows<T: Real, const FMA: bool>(sums: &mut [T], x: &[T]) {
        for row in x.chunks_exact(sums.len().max(1)) {
            sums.iter_mut().zip(row).for_each(|(s, &x)| *s += x);
        }
    }
}

struct Linear;

impl Linear {
    fn fwd(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = lw.shape().dims2()?;
        let mut shape = lx.dims().to_vec();
        match shape.last_mut() {
            Some(last) if *last == inputs => *last = outputs,
            _ => candle_core::bail!("linear: input {:?} does not match the weight {:?}", lx.dims(), lw.dims()),
        }
        if let Some((_, lb)) = b
            && lb.dims() != [outputs]
        {
            candle_core::bail!("linear: bias {:?} does not match the weight {:?}", lb.dims(), lw.dims());
        }
        let rows = lx.shape().elem_count() / inputs.max(1);
        by_dtype!(x.dtype(), "linear", T => {
            let b = b.map(|(b, lb)| slice::<T>(b, lb)).transpose()?;
            let y = forward::<T>(slice(x, lx)?, slice(w, lw)?, b, rows, inputs, outputs);
            storage(y, shape)
        })
    }

    /// Gradients of x, w and b.
    fn bwd(&self, x: &Tensor, w: &Tensor, dy: &Tensor) -> candle_core::Result<[Option<Tensor>; 3]> {
        let (outputs, inputs) = w.dims2()?;
        let rows = x.elem_count() / inputs.max(1);
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), "linear", T => {
            let (xs, ws, dys) = (view::<T>(x)?, view::<T>(w)?, view::<T>(&dy)?);
            let dx = x.track_op().then(|| tensor(backward_input(&dys, &ws, rows, inputs, outputs), x.shape()));
            let dw = w.track_op().then(|| tensor(backward_weight(&dys, &xs, rows, inputs, outputs), w.shape()));
            let db = tensor(column_sums(&dys, outputs), outputs)?;
            Ok([dx.transpose()?, dw.transpose()?, Some(db)])
        })
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd((x, lx), (w, lw), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = Linear::bwd(self, x, w, dy)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd((x, lx), (w, lw), Some((b, lb)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(Linear::bwd(self, x, w, dy)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::linear_on_device::composed, *};
    use crate::ops::testing::*;

    const SHAPES: [(&[usize], usize); 5] =
        [(&[1, 1], 1), (&[7, 5], 3), (&[2, 3, 17], 33), (&[130, 64], 96), (&[1, 300], 2)];

    fn vars(x: &[usize], outputs: usize, dtype: DType) -> [candle_core::Var; 3] {
        let inputs = x[x.len() - 1];
        [normal("x", x, dtype), normal("w", &[outputs, inputs], dtype), normal("b", &[outputs], dtype)]
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for (x, outputs) in SHAPES {
            let vars = vars(x, outputs, DType::F32);
            assert_same(&vars, 1e-5, &|v| linear(&v[0], &v[1], Some(&v[2])), &|v| composed(&v[0], &v[1], Some(&v[2])))?;
            assert_same(&vars[..2], 1e-5, &|v| linear(&v[0], &v[1], None), &|v| composed(&v[0], &v[1], None))?;
        }
        Ok(())
    }

    #[test]
    fn a_transposed_gradient_is_supported() -> Result<()> {
        let vars = vars(&[6, 5], 4, DType::F32);
        let squared = |y: Tensor| -> Result<Tensor> { Ok(y.t()?.sqr()?) };
        assert_same(&vars, 1e-5, &|v| squared(linear(&v[0], &v[1], Some(&v[2]))?), &|v| {
            squared(composed(&v[0], &v[1], Some(&v[2]))?)
        })
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        assert_gradients(&vars(&[3, 2, 5], 4, DType::F64), &|v| linear(&v[0], &v[1], Some(&v[2])))
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 96, 200), (7, 96, 200), (700, 96, 200), (3000, 33, 1), (37, 3000, 65)] {
            let vars = vars(&[rows, inputs], outputs, DType::F32);
            assert_thread_independent(&vars, &|v| linear(&v[0], &v[1], Some(&v[2])))?;
        }
        Ok(())
    }

    /// bf16 keeps 8 bits of each factor; the epilogue is computed in f32.
    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn precisions_agree_with_every_epilogue() {
        let (rows, inputs, outputs) = (37, 50, 41);
        let flat = |name, shape: &[usize]| -> Vec<f32> {
            values(&normal(name, shape, DType::F64)).into_iter().map(|x| x as f32).collect()
        };
        let (x, w) = (flat("x", &[rows, inputs]), flat("w", &[outputs, inputs]));
        let (bias, residual) = (flat("b", &[outputs]), flat("r", &[rows, outputs]));
        for case in 0..8 {
            let run = |precision| {
                let mut beside = vec![0.0; rows * outputs];
                let epilogue = Epilogue {
                    bias: (case & 1 > 0).then_some(&bias[..]),
                    residual: (case & 2 > 0).then_some(&residual[..]),
                    gelu: (case & 4 > 0).then_some(&mut beside[..]),
                };
                (forward_in(precision, &x, &w, [rows, inputs, outputs], epilogue), beside)
            };
            let (exact, exact_gelu) = run(Precision::F32);
            let (y, gelu) = crate::ops::amx_emulator::with_amx(|| run(Precision::Bf16));
            assert!(y != exact, "bf16 does not round");
            // The sum of 50 products of standard normal numbers, each factor with an error of up to 2⁻⁹.
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.15);
            assert!(close(&y, &exact) && close(&gelu, &exact_gelu), "case {case}");
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let [x, w, b] = vars(&[4, 5], 3, DType::F32);
        assert!(linear(&x, &w.t().unwrap(), Some(&b)).is_err());
        assert!(linear(&x, &w, Some(&normal("b", &[4], DType::F32))).is_err());
    }
}
