//! Groups the codes of a list of keys for blockwise attention, and makes the biases that hide what the list does not name.

use super::{
    blocks::{Biases, Blocks, Shape},
    key_ranges::{Codes, KeyLists, KeyRanges},
};
use crate::error::{Context, Result};
use candle_core::{D, Device, Tensor};
use std::sync::{Arc, PoisonError};

/// Hides a key. It is finite, because a row of infinities would become NaN.
pub(super) const HIDDEN: f32 = -1e30;

/// The blocks of a list on a device, made at their first use.
pub(super) fn blocks(lists: &KeyLists, positions: usize, device: &Device) -> Result<Arc<Blocks>> {
    let mut made = lists.blocks.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, blocks)) = made.iter().find(|(location, _)| *location == device.location()) {
        return Ok(blocks.clone());
    }
    let blocks = Arc::new(build(lists, positions, device)?);
    made.push((device.location(), blocks.clone()));
    Ok(blocks)
}

/// The blocks of a list with the biases that hide what it does not name.
fn build(lists: &KeyLists, positions: usize, device: &Device) -> Result<Blocks> {
    let mut blocks = grouped(lists, positions);
    let (groups, size) = blocks.groups();
    let width = blocks.around_len() + blocks.width();
    let mut bias = vec![HIDDEN; groups * size * width];
    for query in blocks.codes.clone() {
        for [group, member, key] in lists.keys_of(query).filter_map(|key| blocks.place(query, key)) {
            bias[(group * size + member) * width + key] = 0.0;
        }
    }
    blocks.codes_bias = tensor(bias, &[groups, size, width], device)?;
    let others: Vec<usize> = (0..positions).filter(|position| !blocks.codes.contains(position)).collect();
    let mut bias = vec![HIDDEN; others.len() * blocks.reach];
    for (row, &query) in others.iter().enumerate() {
        lists.keys_of(query).for_each(|key| bias[row * blocks.reach + key] = 0.0);
    }
    blocks.others_bias = tensor(bias, &[others.len(), blocks.reach], device)?;
    Ok(blocks)
}

/// The smallest groups that contain all keys of a list, without biases.
pub(super) fn grouped(lists: &KeyLists, positions: usize) -> Blocks {
    let Codes { positions: codes, width } = lists.codes.clone().unwrap_or(Codes { positions: 0..0, width: 1 });
    let (mut before, mut after, mut same_column, mut reach) = (0, 0, true, 0);
    let mut around = [codes.start..codes.start, codes.end..codes.end];
    for query in 0..positions {
        if !codes.contains(&query) {
            reach = lists.keys_of(query).map(|key| key + 1).fold(reach, usize::max);
            continue;
        }
        let code = query - codes.start;
        for key in lists.keys_of(query) {
            match key {
                key if key < codes.start => around[0].start = around[0].start.min(key),
                key if key >= codes.end => around[1].end = around[1].end.max(key + 1),
                key => {
                    let key = key - codes.start;
                    before = before.max((code / width).saturating_sub(key / width));
                    after = after.max((key / width).saturating_sub(code / width));
                    same_column &= key % width == code % width;
                }
            }
        }
    }
    let (grid, band) = ((codes.len().div_ceil(width), width), before + 1 + after);
    let shape = match () {
        () if same_column && grid.0 < band * width => Shape::Columns,
        () if band < grid.0 => Shape::Band { before, after },
        () => Shape::All,
    };
    let has_empty = (0..positions).any(|query| lists.keys_of(query).next().is_none());
    Blocks { shape, codes, grid, around, reach, codes_bias: None, others_bias: None, has_empty }
}

/// A bias on the device; `None`: it hides nothing.
fn tensor(bias: Vec<f32>, shape: &[usize], device: &Device) -> Result<Option<Tensor>> {
    let hides = bias.contains(&HIDDEN);
    Ok(if hides { Some(Tensor::from_vec(bias, shape, device)?) } else { None })
}

/// The biases of a batch, made at their first use.
pub(super) fn biases<'a>(keys: &'a KeyRanges, blocks: &Blocks, device: &Device) -> Result<&'a Biases> {
    if keys.biases.get().is_none() {
        let _ = keys.biases.set(with_padding(keys, blocks, device)?);
    }
    keys.biases.get().context("blockwise attention has no biases")
}

fn with_padding(keys: &KeyRanges, blocks: &Blocks, device: &Device) -> Result<Biases> {
    let broadcast = |bias: &Option<Tensor>| -> Result<Option<Tensor>> {
        Ok(bias.as_ref().map(|bias| bias.unsqueeze(0)?.unsqueeze(0)).transpose()?)
    };
    let (codes, others) = (broadcast(&blocks.codes_bias)?, broadcast(&blocks.others_bias)?);
    let text = &keys.lists.text;
    let padded = keys.text_lengths.as_ref().filter(|lengths| lengths.iter().any(|length| *length < text.len()));
    let Some(lengths) = padded else { return Ok(Biases { codes, others, has_empty: blocks.has_empty }) };
    let around: Vec<usize> = blocks.around.iter().cloned().flatten().collect();
    let reach: Vec<usize> = (0..blocks.reach).collect();
    let codes = if around.is_empty() {
        codes
    } else {
        let padding = padding(keys, lengths.len(), &around, device)?.reshape((lengths.len(), 1, 1, 1, around.len()))?;
        Some(sum(codes, padding.pad_with_zeros(D::Minus1, 0, blocks.width())?)?)
    };
    let others = if reach.is_empty() {
        others
    } else {
        Some(sum(others, padding(keys, lengths.len(), &reach, device)?.reshape((lengths.len(), 1, 1, reach.len()))?)?)
    };
    // In a sample without text, a query that only sees the text has no keys.
    Ok(Biases { codes, others, has_empty: blocks.has_empty || lengths.contains(&0) })
}

/// The bias of some positions (samples, positions): hides the padding of each sample's text.
fn padding(keys: &KeyRanges, samples: usize, positions: &[usize], device: &Device) -> Result<Tensor> {
    let of_sample = |sample: usize| {
        let padding = keys.padding(sample);
        positions.iter().map(move |position| if padding.contains(position) { HIDDEN } else { 0.0 })
    };
    let values: Vec<f32> = (0..samples).flat_map(of_sample).collect();
    Ok(Tensor::from_vec(values, (samples, positions.len()), device)?)
}

fn sum(bias: Option<Tensor>, padding: Tensor) -> Result<Tensor> {
    Ok(match bias {
        Some(bias) => bias.broadcast_add(&padding)?,
        None => padding,
    })
}
