//! 3×3 convolutions with stride 1 by Winograd's F(2×2, 3×3) (arXiv 1509.09308): 16 multiplications instead of 36 for
//! each 2×2 pixels of the output, computed as 16 matrix products. The transforms only add and halve, so that rounding
//! errors are those of f32 sums.
//!
//! A task takes a strip of the output, transforms its patches in cache, multiplies at each of the 16 points, and
//! transforms back. No buffer has the size of the image.

use super::{
    geometry::Geometry,
    loops::{BLOCK, sum_partials},
    region::{Image, Region},
};

mod bf16;
pub(super) mod element;
pub(super) mod products;
mod transforms;

use element::WinogradElement;
use products::{GROUP, Multiplier, point_stride};
use rayon::prelude::*;
use transforms::{Output, POINTS, Patch, Transforms};

/// Number of patches transformed at once: as many as fit in L2 together with the filters.
const FORWARD_PATCHES: usize = 32;
/// The same where the sums of each point pass through the cache once per strip.
const GRADIENT_PATCHES: usize = 64;
/// Minimum number of tasks that sum the filters' gradient; fixed, so that the result does not depend on the number of
/// threads.
const TASKS: usize = 8;
/// Number of sums of one task: as many as stay in cache while all strips are processed. Larger filters are split by
/// inputs.
const SUMS: usize = 1 << 19;

/// Whether Winograd applies: a 3×3 kernel, stride 1, and channels in multiples of [`GROUP`] and of `width`, the outputs
/// of one panel.
pub(super) fn fits(g: &Geometry, width: usize) -> bool {
    let square = (g.kernel_height, g.kernel_width, g.stride) == (3, 3, 1);
    let whole = |channels: usize| channels > 0 && channels.is_multiple_of(GROUP);
    square && whole(g.inputs) && whole(g.outputs) && g.outputs.is_multiple_of(width)
}

/// Splits patches into strips; returns (rows, columns) of patches per strip.
fn strip(g: &Geometry, patches: usize) -> (usize, usize) {
    let (rows, columns) = (g.out_height.div_ceil(2), g.out_width.div_ceil(2).max(1));
    let columns = columns.min(patches);
    ((patches / columns).clamp(1, rows.max(1)), columns)
}

/// Transforms patches of `size` pixels, 2 apart, in layout (point, group, patch, channel of the group).
fn transform<T: WinogradElement>(
    f: unsafe fn(Patch<T>),
    region: &Region<T>,
    size: usize,
    (rows, columns, channels): (usize, usize, usize),
    group: usize,
    to: &mut Vec<T>,
) {
    let (patches, point) = (rows * columns, point_stride(rows * columns, channels));
    to.resize(POINTS * point, T::ZERO);
    let needed = (2 * (rows - 1) + size - 1) * region.row + (2 * (columns - 1) + size - 1) * region.pixel + channels;
    assert!(region.pixels.len() >= needed && channels.is_multiple_of(group));
    for i in 0..patches {
        let start = 2 * (i / columns) * region.row + 2 * (i % columns) * region.pixel;
        let patch = Patch {
            pixels: region.pixels[start..].as_ptr(),
            row: region.row,
            pixel: region.pixel,
            channels,
            to: to[i * group..].as_mut_ptr(),
            point,
            group,
            group_stride: patches * group,
        };
        // SAFETY: the assertion for the pixels; `to` holds 16 points of `patches · channels` and more.
        unsafe { f(patch) };
    }
}

/// Buffers of one task.
struct Scratch<T, B> {
    pixels: Vec<T>,
    input: Vec<T>,
    other: Vec<T>,
    multiplier: B,
}

impl<T, B: Default> Scratch<T, B> {
    fn new() -> Self {
        Self { pixels: Vec::new(), input: Vec::new(), other: Vec::new(), multiplier: B::default() }
    }
}

/// Filters of a convolution: its weights `(out, in, 3, 3)`, or, for the input's gradient, the flipped weights of the
/// transposed convolution, `(in, out, 3, 3)`.
#[derive(Clone, Copy)]
pub(super) enum Filters<'a, T> {
    Plain(&'a [T]),
    Flipped(&'a [T]),
}

/// `y (b, h', w', out)`: the convolution, the bias and the residual.
pub(super) fn convolve<T: WinogradElement, M: Multiplier<T>>(
    multiplier: M,
    x: &[T],
    filters: Filters<T>,
    bias: Option<&[T]>,
    residual: Option<&[T]>,
    y: &mut [T],
    g: Geometry,
) {
    let transforms = T::transforms();
    let filters = multiplier.filters(transform_filters(filters, g, multiplier.width()), g.inputs);
    let zeros = vec![T::ZERO; if bias.is_some() { 0 } else { g.outputs }];
    let bias = bias.unwrap_or(&zeros);
    let (strip_rows, strip_columns) = strip(&g, FORWARD_PATCHES);
    let out_image = g.out_height * g.out_row();
    let strips = y.par_chunks_mut(out_image).enumerate().flat_map(|(i, y)| {
        y.par_chunks_mut(2 * strip_rows * g.out_row()).enumerate().map(move |(j, y)| (i, 2 * j * strip_rows, y))
    });
    strips.for_each_init(Scratch::new, |scratch, (i, top, y)| {
        let image = Image::new(x, i, g.height, g.width, g.inputs);
        let residual = residual.map(|r| &r[i * out_image + top * g.out_row()..][..y.len()]);
        for left in (0..g.out_width).step_by(2 * strip_columns) {
            let rows = (y.len() / g.out_row()).div_ceil(2);
            let columns = strip_columns.min((g.out_width - left).div_ceil(2));
            let corner = (top as isize - g.top, left as isize - g.left);
            let region = image.region(corner, (2 * rows + 2, 2 * columns + 2), &mut scratch.pixels);
            let shape = (rows, columns, g.inputs);
            transform(transforms.input, &region, 4, shape, g.inputs, &mut scratch.input);
            let Scratch { input, other, multiplier: buffer, .. } = scratch;
            multiplier.multiply(input, &filters, other, rows * columns, g, buffer);
            let strip = Strip { products: &scratch.other, rows, columns, left, bias, residual };
            put(strip, y, g, transforms);
        }
    });
}

/// (G g Gᵀ) of all filters: (panel of outputs, point, input, output of the panel).
fn transform_filters<T: WinogradElement>(filters: Filters<T>, g: Geometry, width: usize) -> Vec<T> {
    let (w, flipped) = match filters {
        Filters::Plain(w) => (w, false),
        Filters::Flipped(w) => (w, true),
    };
    let mut transformed = vec![T::ZERO; POINTS * g.inputs * g.outputs];
    let half = T::from_f64(0.5);
    let line = |g: [T; 3]| [g[0], (g[0] + g[1] + g[2]) * half, (g[0] - g[1] + g[2]) * half, g[2]];
    let point = g.inputs * width;
    transformed.par_chunks_mut(POINTS * point).enumerate().for_each(|(panel, transformed)| {
        for (input, lane) in (0..g.inputs).flat_map(|input| (0..width).map(move |lane| (input, lane))) {
            let output = panel * width + lane;
            let at = if flipped { input * g.outputs + output } else { output * g.inputs + input } * 9;
            let filter = |i: usize, j: usize| w[at + if flipped { 8 - (3 * i + j) } else { 3 * i + j }];
            let rows: [[T; 4]; 3] = std::array::from_fn(|i| line([filter(i, 0), filter(i, 1), filter(i, 2)]));
            for j in 0..4 {
                for (i, v) in line([rows[0][j], rows[1][j], rows[2][j]]).into_iter().enumerate() {
                    transformed[(4 * i + j) * point + input * width + lane] = v;
                }
            }
        }
    });
    transformed
}

/// The products of a strip, and the values added to them.
struct Strip<'a, T> {
    products: &'a [T],
    rows: usize,
    columns: usize,
    left: usize,
    bias: &'a [T],
    residual: Option<&'a [T]>,
}

/// Transforms products back to the pixels of the strip; pixels beyond the image's border are dropped.
fn put<T: WinogradElement>(strip: Strip<T>, y: &mut [T], g: Geometry, transforms: Transforms<T>) {
    let point = point_stride(strip.rows * strip.columns, g.outputs);
    let height = y.len() / g.out_row();
    assert!(strip.products.len() >= POINTS * point && strip.bias.len() == g.outputs);
    assert!(strip.residual.is_none_or(|r| r.len() == y.len()));
    for i in 0..strip.rows * strip.columns {
        let (top, left) = (2 * (i / strip.columns), strip.left + 2 * (i % strip.columns));
        let start = top * g.out_row() + left * g.outputs;
        let output = Output {
            products: strip.products[i * g.outputs..].as_ptr(),
            point,
            channels: g.outputs,
            bias: strip.bias.as_ptr(),
            residual: strip.residual.map_or(std::ptr::null(), |r| r[start..].as_ptr()),
            y: y[start..].as_mut_ptr(),
            row: g.out_row(),
            rows: (height - top).min(2),
            columns: (g.out_width - left).min(2),
        };
        // SAFETY: the assertions above; `rows` and `columns` end at the image's edge.
        unsafe { (transforms.output)(output) };
    }
}

/// Adds the gradient of the filters `(out, in, 3, 3)` to `dw`.
pub(super) fn weight_gradient<T: WinogradElement, M: Multiplier<T>>(
    multiplier: M,
    x: &[T],
    dy: &[T],
    dw: &mut [T],
    g: Geometry,
) {
    let transforms = T::transforms();
    let (strip_rows, strip_columns) = strip(&g, GRADIENT_PATCHES);
    let per_image = g.out_height.div_ceil(2 * strip_rows);
    let strips = g.images * per_image;
    let cuts = (POINTS * g.inputs * g.outputs).div_ceil(SUMS);
    let inputs = g.inputs.div_ceil(cuts).next_multiple_of(GROUP);
    let cuts = g.inputs.div_ceil(inputs);
    let tasks = (TASKS / cuts).clamp(1, strips.max(1));
    let partial = |(first, task): (usize, usize)| {
        let cut = Geometry { inputs: inputs.min(g.inputs - first), ..g };
        let mut sums = vec![T::ZERO; POINTS * cut.inputs * g.outputs];
        let (mut scratch, mut dy_pixels) = (Scratch::new(), Vec::new());
        for strip in strips * task / tasks..strips * (task + 1) / tasks {
            let (image, top) = (strip / per_image, strip % per_image * 2 * strip_rows);
            let x = Image::new(x, image, g.height, g.width, g.inputs);
            let dy = Image::new(dy, image, g.out_height, g.out_width, g.outputs);
            let rows = strip_rows.min((g.out_height - top).div_ceil(2));
            for left in (0..g.out_width).step_by(2 * strip_columns) {
                let columns = strip_columns.min((g.out_width - left).div_ceil(2));
                let corner = (top as isize - g.top, left as isize - g.left);
                let region = x.region(corner, (2 * rows + 2, 2 * columns + 2), &mut scratch.pixels);
                let (region, shape) = (region.without_channels(first), (rows, columns, cut.inputs));
                transform(transforms.input, &region, 4, shape, GROUP, &mut scratch.input);
                let corner = (top as isize, left as isize);
                let region = dy.region(corner, (2 * rows, 2 * columns), &mut dy_pixels);
                let shape = (rows, columns, g.outputs);
                transform(transforms.gradient, &region, 2, shape, multiplier.width(), &mut scratch.other);
                let Scratch { input, other, multiplier: buffer, .. } = &mut scratch;
                multiplier.add_products(input, other, &mut sums, rows * columns, cut, buffer);
            }
        }
        sums
    };
    let partials: Vec<Vec<T>> =
        (0..cuts * tasks).into_par_iter().map(|i| partial((i / tasks * inputs, i % tasks))).collect();
    let mut partials = partials.into_iter();
    let sums: Vec<Vec<T>> = (0..cuts).map(|_| sum_partials(partials.by_ref().take(tasks).collect())).collect();
    dw.par_chunks_mut(BLOCK * 9 * g.inputs).enumerate().for_each(|(block, dw)| {
        let outputs = dw.len() / (9 * g.inputs);
        // Adjacent outputs share cache lines of the sums.
        for (input, output) in (0..g.inputs).flat_map(|input| (0..outputs).map(move |output| (input, output))) {
            let (sums, input_of_cut) = (&sums[input / inputs], input % inputs);
            let rows = sums.len() / (POINTS * g.outputs);
            let at = |point: usize| sums[(point * rows + input_of_cut) * g.outputs + block * BLOCK + output];
            add_filter_gradient(std::array::from_fn(at), &mut dw[(output * g.inputs + input) * 9..][..9]);
        }
    });
}

/// Adds Gᵀ s G.
fn add_filter_gradient<T: WinogradElement>(s: [T; POINTS], dw: &mut [T]) {
    let half = T::from_f64(0.5);
    let line = |s: [T; 4]| [s[0] + (s[1] + s[2]) * half, (s[1] - s[2]) * half, (s[1] + s[2]) * half + s[3]];
    let rows: [[T; 3]; 4] = std::array::from_fn(|i| line([s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]]));
    for j in 0..3 {
        for (i, v) in line([rows[0][j], rows[1][j], rows[2][j], rows[3][j]]).into_iter().enumerate() {
            dw[3 * i + j] += v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{
            conv::{Padding, kernel::Element, loops},
            testing::{self, at_each_level, normal, values},
        },
    };
    use candle_core::DType;

    fn numbers(name: &str, count: usize) -> Vec<f32> {
        values(&normal(name, &[count], DType::F32)).into_iter().map(|x| x as f32).collect()
    }

    fn assert_close(what: &str, ours: &[f32], theirs: &[f32]) {
        let scale = theirs.iter().fold(1e-3, |m: f32, x| m.max(x.abs()));
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 3e-6 * scale, "{what}: {a} instead of {b}");
        }
    }

    const UNEVEN: Padding = Padding { top: 2, bottom: 0, left: 0, right: 1 };
    const CASES: [([usize; 4], usize, Padding); 5] = [
        ([1, 1, 1, 32], 32, Padding::same(1)),
        ([2, 7, 9, 32], 64, Padding::same(1)),
        ([1, 3, 70, 64], 32, Padding::same(1)),
        ([3, 140, 3, 32], 32, UNEVEN),
        ([1, 6, 5, 96], 32, Padding::same(0)),
    ];
    /// Filters whose gradient is split into parts of two sizes.
    const WIDE: ([usize; 4], usize, Padding) = ([2, 5, 3, 416], 320, Padding::same(1));

    /// A case's geometry, image, weights, bias, output's gradient and residual.
    type Case = (Geometry, [Vec<f32>; 5]);

    fn case((x, outputs, padding): ([usize; 4], usize, Padding), numbers: impl Fn(&str, usize) -> Vec<f32>) -> Case {
        let g = Geometry::new(x, [outputs, x[3], 3, 3], 1, padding);
        let (count, out_count) = (x.iter().product(), g.output().iter().product());
        let counts = [("x", count), ("w", outputs * x[3] * 9), ("b", outputs), ("dy", out_count), ("r", out_count)];
        (g, counts.map(|(name, count)| numbers(name, count)))
    }

    /// Output, gradient of the input, gradient of the weights added to ones.
    fn run(multiplier: impl Multiplier<f32>, (g, [x, w, b, dy, residual]): &Case) -> [Vec<f32>; 3] {
        let g = *g;
        assert!(fits(&g, multiplier.width()) && fits(&g.transposed(), multiplier.width()));
        let (mut y, mut dx, mut dw) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()], vec![1.0; w.len()]);
        convolve(multiplier, x, Filters::Plain(w), Some(b), Some(residual), &mut y, g);
        convolve(multiplier, dy, Filters::Flipped(w), None, None, &mut dx, g.transposed());
        weight_gradient(multiplier, x, dy, &mut dw, g);
        [y, dx, dw]
    }

    fn directly((g, [x, w, b, dy, residual]): &Case) -> [Vec<f32>; 3] {
        let (mut y, mut dx, mut dw) = (vec![7.0; dy.len()], vec![7.0; x.len()], vec![1.0; w.len()]);
        loops::convolve(x, w, Some(b), Some(residual), &mut y, *g);
        loops::convolve_transposed(dy, w, None, &mut dx, *g);
        loops::weight_gradient(x, dy, &mut dw, *g);
        [y, dx, dw]
    }

    #[test]
    fn equals_the_direct_convolution_at_every_level() -> Result<()> {
        at_each_level(|| {
            for sizes in CASES.into_iter().chain([WIDE]) {
                let case = case(sizes, numbers);
                for (ours, theirs) in run(f32::kernel(sizes.1), &case).iter().zip(&directly(&case)) {
                    assert_close("a part", ours, theirs);
                }
            }
            Ok(())
        })
    }

    /// Small integers that the transforms keep exact in bf16.
    fn whole(name: &str, count: usize) -> Vec<f32> {
        let step = if name == "w" { 4.0 } else { 1.0 };
        numbers(name, count).into_iter().map(|x| step * (2.0 * x).round().clamp(-4.0, 4.0)).collect()
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn in_bf16_integers_are_exact_and_other_numbers_are_close() {
        testing::with_each_unit(|unit| {
            for sizes in CASES.into_iter().chain([WIDE]) {
                let exact = case(sizes, whole);
                assert_eq!(run(unit, &exact), directly(&exact));
                let case = case(sizes, numbers);
                for (ours, theirs) in run(unit, &case).iter().zip(&directly(&case)) {
                    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
                    let error = squares(&mut ours.iter().zip(theirs).map(|(a, b)| a - b));
                    let relative = (error / squares(&mut theirs.iter().copied())).sqrt();
                    assert!((1e-4..6e-3).contains(&relative), "{sizes:?}: {relative}");
                }
            }
        });
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn in_bf16_results_do_not_depend_on_the_number_of_threads() {
        testing::with_each_unit(|unit| {
            let case = case(([5, 20, 20, 64], 32, Padding::same(1)), numbers);
            let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            assert_eq!(one.install(|| run(unit, &case)), run(unit, &case));
        });
    }
}
