//! Blockwise attention over the layouts of the paper, against attention with a full mask.

use super::{
    batch::{Batch, Tokens},
    sequence::Layout,
    tests::{LISTS, spans},
};
use crate::{
    error::Result,
    nn::{
        attention::dense_masked,
        pattern::{Grid, Pattern, tests::all_patterns},
    },
    ops::{
        attention::blockwise,
        testing::{assert_same, normal, values},
    },
};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Layouts of all lists of spans over odd grids, with the lengths of three source texts.
fn layouts() -> Vec<(Layout, Vec<usize>)> {
    let mut all = Vec::new();
    for list in LISTS {
        for (text, height, width) in [(2, 1, 1), (4, 5, 4), (5, 4, 7), (3, 1, 6), (2, 6, 1)] {
            let layout = Layout::new(&spans(list, [text, text + 1, height * width]), Grid { height, width }).unwrap();
            all.extend([layout.clone(), layout.reading_last()].map(|layout| (layout, vec![text, 1, text - 1])));
        }
    }
    all
}

#[test]
fn blockwise_attention_equals_dense_attention() -> Result<()> {
    for (layout, lengths) in layouts() {
        for pattern in all_patterns() {
            let qkv = [normal("qkv", &[3, layout.positions(), 3, 2, 4], DType::F64)];
            let (keys, mask) = (layout.keys(pattern, &lengths), layout.mask(pattern, &lengths, qkv[0].device())?);
            let same = |tolerance| {
                assert_same(&qkv, tolerance, &|v| blockwise::attention(&v[0], &keys), &|v| dense_masked(&v[0], &mask))
            };
            same(1e-10).map_err(|e| e.context(format!("{layout:?} {pattern:?}")))?;
        }
    }
    Ok(())
}

/// In f16, against the same numbers in f32.
#[test]
fn half_precision_has_its_own_rounding_only() -> Result<()> {
    let grid = Grid { height: 5, width: 6 };
    let layout = Layout::text_to_image(4, grid);
    for pattern in all_patterns() {
        let keys = layout.keys(pattern, &[4, 2]);
        let qkv = normal("qkv", &[2, layout.positions(), 3, 2, 8], DType::F32).to_dtype(DType::F16)?;
        let half = blockwise::attention(&qkv, &keys)?;
        assert_eq!(half.dtype(), DType::F16);
        let full = blockwise::attention(&qkv.to_dtype(DType::F32)?, &keys)?;
        let worst = values(&half).iter().zip(values(&full)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 5e-3, "{pattern:?}: {worst}");
    }
    Ok(())
}

/// The largest tensor at 32 × 32 codes and 64 tokens of text: scores of a few rows or a column, never n × n.
#[test]
fn scores_are_a_small_share_of_the_full_matrix() {
    let grid = Grid { height: 32, width: 32 };
    let layout = Layout::text_to_image(64, grid);
    let share = |pattern: Pattern| {
        let scores = blockwise::scores(&layout.keys(pattern, &[64]).lists, layout.positions());
        scores as f64 / layout.positions().pow(2) as f64
    };
    let model = crate::config::Model { layers: 48, ..Default::default() };
    // 65 keys of text and start, and two rows of 32, one column of 32, or six rows of 32.
    for (layer, keys) in [(1, 65 + 64), (2, 65 + 32), (48, 65 + 192)] {
        let expected = (1024 * keys) as f64 / 1088_f64.powi(2);
        let found = share(Pattern::of_layer(layer, &model));
        assert!((found - expected).abs() < 1e-3, "layer {layer}: {found} instead of {expected}");
    }
}

#[test]
fn a_batch_makes_the_keys_of_a_pattern_once() -> Result<()> {
    let grid = Grid { height: 2, width: 3 };
    let (device, pattern) = (Device::Cpu, Pattern::Column);
    let text = Tokens::pad(&[vec![1, 2], vec![1, 2, 3]], 4, 0, &device)?;
    let batch = Batch::text_to_image(text, Tensor::zeros((2, 6), DType::U32, &device)?)?;
    let keys = batch.keys(grid, pattern)?;
    assert!(Arc::ptr_eq(&keys, &batch.keys(grid, pattern)?));
    assert!(!Arc::ptr_eq(&keys, &batch.keys(grid, Pattern::Dense)?));
    // Another batch of the layout shares the lists, and with them the masks on the device, but not the padding.
    let text = Tokens::pad(&[vec![1], vec![1]], 4, 0, &device)?;
    let other = Batch::text_to_image(text, Tensor::zeros((2, 6), DType::U32, &device)?)?.keys(grid, pattern)?;
    assert!(Arc::ptr_eq(&keys.lists, &other.lists) && !Arc::ptr_eq(&keys, &other));
    let longer = batch.reading_last().keys(grid, pattern)?;
    longer.check(2, 4 + 1 + 6)?;
    Ok(())
}
