//! Nearest-neighbor upsampling by 2 followed by a 3×3 convolution (padding 1) as one operation, without building the
//! larger input.
//!
//! Along one axis, output 2i depends on inputs i-1 (weight w₀) and i (w₁ + w₂), output 2i + 1 on i (w₀ + w₁) and i + 1
//! (w₂): the transpose of a convolution with stride 2, padding 1 and the kernel `[w₂, w₁ + w₂, w₀ + w₁, w₀]`. That is 4
//! products per output instead of 9.

use super::{
    factors,
    geometry::{Geometry, Padding},
    kernel::Element,
    loops::{convolve, convolve_transposed, weight_gradient as convolution_gradient},
};
use crate::config::Precision;

/// The convolution whose transpose this is: from `(b, 2h, 2w, out)` to `(b, h, w, in)`.
fn geometry([images, height, width, inputs]: [usize; 4], outputs: usize) -> Geometry {
    let padding = Padding::same(1);
    Geometry::new([images, 2 * height, 2 * width, outputs], [inputs, outputs, 4, 4], 2, padding)
}

/// `x (b, h, w, in)` of the given shape, `w (out, in, 3, 3)` → `y (b, 2h, 2w, out)`. In bf16 it runs in f32, in f16 as
/// [`super::forward`].
pub fn forward<T: Element>(precision: Precision, x: &[T], shape: [usize; 4], w: &[T], b: &[T], y: &mut [T]) {
    let [x, w] = &factors(precision, [x, w]);
    convolve_transposed(x, &spread(w, shape[3], b.len()), Some(b), y, geometry(shape, b.len()));
}

/// Writes the gradient of `x`.
pub fn input_gradient<T: Element>(
    precision: Precision,
    dy: &[T],
    w: &[T],
    outputs: usize,
    dx: &mut [T],
    shape: [usize; 4],
) {
    let [dy, w] = &factors(precision, [dy, w]);
    convolve(dy, &spread(w, shape[3], outputs), None, None, dx, geometry(shape, outputs));
}

/// Adds the gradient of `w` to `dw`.
pub fn weight_gradient<T: Element>(
    precision: Precision,
    x: &[T],
    shape: [usize; 4],
    dy: &[T],
    outputs: usize,
    dw: &mut [T],
) {
    let [x, dy] = &factors(precision, [x, dy]);
    let inputs = shape[3];
    let mut kernel = vec![T::ZERO; inputs * outputs * 16];
    convolution_gradient(dy, x, &mut kernel, geometry(shape, outputs));
    for (i, dw) in dw.chunks_exact_mut(9).enumerate() {
        let at = (i % inputs * outputs + i / inputs) * 16;
        let rows: [[T; 3]; 4] = std::array::from_fn(|y| gather(std::array::from_fn(|x| kernel[at + 4 * y + x])));
        for x in 0..3 {
            for (y, value) in gather([rows[0][x], rows[1][x], rows[2][x], rows[3][x]]).into_iter().enumerate() {
                dw[3 * y + x] += value;
            }
        }
    }
}

/// The kernels `(in, out, 4, 4)` of weights `(out, in, 3, 3)`.
fn spread<T: Element>(w: &[T], inputs: usize, outputs: usize) -> Vec<T> {
    let line = |w: [T; 3]| [w[2], w[1] + w[2], w[0] + w[1], w[0]];
    let mut kernel = vec![T::ZERO; inputs * outputs * 16];
    for (i, w) in w.chunks_exact(9).enumerate() {
        let rows: [[T; 4]; 3] = std::array::from_fn(|y| line([w[3 * y], w[3 * y + 1], w[3 * y + 2]]));
        let at = (i % inputs * outputs + i / inputs) * 16;
        for x in 0..4 {
            for (y, value) in line([rows[0][x], rows[1][x], rows[2][x]]).into_iter().enumerate() {
                kernel[at + 4 * y + x] = value;
            }
        }
    }
    kernel
}

/// The transpose of `spread` along one axis.
fn gather<T: Element>(k: [T; 4]) -> [T; 3] {
    [k[2] + k[3], k[1] + k[2], k[0] + k[1]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{
            conv2d,
            testing::{at_each_level, normal, values},
            upsample_nearest2x,
        },
    };
    use candle_core::DType;

    #[test]
    fn equals_upsampling_and_then_convolving() -> Result<()> {
        at_each_level(|| {
            for (shape, outputs) in [([1, 1, 1, 1], 1), ([2, 3, 5, 6], 9), ([1, 6, 4, 32], 16)] {
                let x = normal("x", &shape, DType::F64);
                let w = normal("w", &[outputs, shape[3], 3, 3], DType::F64);
                let b = normal("b", &[outputs], DType::F64);
                let y = conv2d(&upsample_nearest2x(&x)?, &w, Some(&b), 1, Padding::same(1))?;
                let dy = normal("dy", y.dims(), DType::F64);
                let store = (&y * dy.as_tensor())?.sum_all()?.backward()?;
                let gradient = |var| store.get(var).map(values).unwrap_or_default();

                let (xs, ws, dys) = (values(&x), values(&w), values(&dy));
                let [mut ours, mut dx, mut dw] = [dys.len(), xs.len(), ws.len()].map(|count| vec![0.0; count]);
                forward(Precision::F32, &xs, shape, &ws, &values(&b), &mut ours);
                input_gradient(Precision::F32, &dys, &ws, outputs, &mut dx, shape);
                weight_gradient(Precision::F32, &xs, shape, &dys, outputs, &mut dw);
                for (ours, theirs) in [(ours, values(&y)), (dx, gradient(&x)), (dw, gradient(&w))] {
                    assert_eq!(ours.len(), theirs.len());
                    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-10), "{shape:?}");
                }
            }
            Ok(())
        })
    }

    #[test]
    fn f16_rounds_the_factors() {
        let (shape, outputs) = ([1, 3, 4, 6], 5);
        let numbers = |name: &str, count: usize| values(&normal(name, &[count], DType::F64));
        let (x, w, b, dy) = (numbers("x", 72), numbers("w", 270), numbers("b", 5), numbers("dy", 240));
        let rounded = |x: &[f64]| x.iter().map(|x| half::f16::from_f64(*x).to_f64()).collect::<Vec<_>>();
        let all = |precision, x: &[f64], w: &[f64], dy: &[f64]| {
            let [mut y, mut dx, mut dw] = [240, 72, 270].map(|count| vec![0.0; count]);
            forward(precision, x, shape, w, &b, &mut y);
            input_gradient(precision, dy, w, outputs, &mut dx, shape);
            weight_gradient(precision, x, shape, dy, outputs, &mut dw);
            [y, dx, dw]
        };
        let ours = all(Precision::F16, &x, &w, &dy);
        assert_eq!(ours, all(Precision::F32, &rounded(&x), &rounded(&w), &rounded(&dy)));
        assert_ne!(ours, all(Precision::F32, &x, &w, &dy));
    }
}
