//! Sparse attention as devices compute it, against attention with a full mask.

use super::{case::Case, halves, tolerance};
use crate::{
    config::{ConvBorder, RowExtent},
    model::Layout,
    nn::{
        attention::dense_masked,
        pattern::{Grid, Pattern},
    },
    ops::attention::blockwise,
    runtime::Kernels,
};
use candle_core::{DType, Device};

const PATTERNS: [(&str, Pattern); 6] = [
    ("dense", Pattern::Dense),
    ("row window", Pattern::Row(RowExtent::Window)),
    ("same row", Pattern::Row(RowExtent::SameRow)),
    ("column", Pattern::Column),
    ("conv", Pattern::Conv { size: 11, border: ConvBorder::Clip }),
    ("conv with wrapped border", Pattern::Conv { size: 3, border: ConvBorder::RasterWrap }),
];

/// Each pattern over each list of spans on a small odd grid, and over text → image with 32 × 32 codes, in f32 and in half
/// precision.
pub fn cases(device: &Device) -> Vec<Case> {
    let grid = Grid { height: 4, width: 7 };
    let layouts = [
        ("text→image", Layout::text_to_image(5, grid)),
        ("image→text", Layout::image_to_text(grid, 6)),
        ("question", Layout::visual_question(grid, 5, 4)),
    ];
    let mut cases = Vec::new();
    for dtype in [DType::F32].iter().chain(halves(device)).copied() {
        for (name, pattern) in PATTERNS {
            for (list, layout) in &layouts {
                cases.push(case(
                    &format!("{name}, {list}"),
                    layout.clone(),
                    pattern,
                    &[5, 1, 4],
                    dtype,
                    Kernels::Stock,
                ));
            }
        }
        let paper = Layout::text_to_image(64, Grid { height: 32, width: 32 });
        for (name, pattern) in [PATTERNS[1], PATTERNS[3], PATTERNS[4]] {
            cases.push(case(&format!("{name}, 32 x 32 codes"), paper.clone(), pattern, &[40], dtype, Kernels::Stock));
        }
    }
    cases
}

/// Each pattern with the kernel of the softmax; on a GPU also in bf16 and with 32 × 32 codes.
pub fn fused_cases(device: &Device) -> Vec<Case> {
    let small = Layout::text_to_image(5, Grid { height: 4, width: 7 });
    let paper = Layout::text_to_image(64, Grid { height: 32, width: 32 });
    let fused = |name: &str, layout: &Layout, pattern: Pattern, lengths: &'static [usize], dtype: DType| {
        case(&format!("{name}, fused kernel"), layout.clone(), pattern, lengths, dtype, Kernels::Fused)
    };
    let mut cases: Vec<Case> =
        PATTERNS.map(|(name, pattern)| fused(name, &small, pattern, &[5, 1, 0], DType::F32)).into();
    if device.is_cuda() {
        cases.extend(PATTERNS.map(|(name, pattern)| fused(name, &small, pattern, &[5, 1, 0], DType::BF16)));
        for dtype in [DType::F32, DType::BF16] {
            cases.extend(
                [PATTERNS[1], PATTERNS[3], PATTERNS[4]]
                    .map(|(name, pattern)| fused(&format!("{name}, 32 x 32 codes"), &paper, pattern, &[40], dtype)),
            );
        }
    }
    cases
}

/// `lengths`: tokens of the source text of each sample.
fn case(
    name: &str,
    layout: Layout,
    pattern: Pattern,
    lengths: &'static [usize],
    dtype: DType,
    kernels: Kernels,
) -> Case {
    let keys = layout.keys(pattern, lengths);
    let positions = layout.positions();
    Case {
        name: name.to_owned(),
        inputs: vec![vec![lengths.len(), positions, 3, 2, 16]],
        dtype,
        tested: Box::new(move |v| blockwise::attention_by(kernels, &v[0], &keys)),
        reference: Box::new(move |v| dense_masked(&v[0], &layout.mask(pattern, lengths, v[0].device())?)),
        // Scores are sums of products, and exponential functions follow.
        tolerance: 4.0 * tolerance(dtype),
    }
}
