//! KV cache with stock candle ops: attention of one new position at a time, on any device. It is the reference for
//! [`slot_cache`](super::slot_cache).
//!
//! Each layer only keeps the codes that its pattern can still need: a row window needs a ring of `width + 1` codes, a
//! conv neighborhood a ring of `size / 2 · (width + 1) + 1` codes, and a column layer all codes, stored by column. Text
//! and the start of the image are never dropped.

use super::{
    attention::masked_softmax,
    pattern::{Grid, Pattern},
};
use crate::{
    config::RowExtent,
    error::{Result, ensure},
};
use candle_core::{DType, Device, Tensor};

/// Position of a new key and value in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Visible to all later positions: text, or the start of the image.
    Dense,
    /// A code at this position of the grid, visible by the layer's pattern.
    Image(usize),
}

/// Number of image codes that a layer with this pattern keeps.
pub fn slots(pattern: Pattern, grid: Grid) -> usize {
    match pattern {
        Pattern::Dense | Pattern::Column => grid.len(),
        Pattern::Row(RowExtent::Window) => (grid.width + 1).min(grid.len()),
        Pattern::Row(RowExtent::SameRow) => grid.width,
        Pattern::Conv { size, .. } => ((size / 2) * grid.width + size / 2 + 1).min(grid.len()),
    }
}

/// The slot of a code.
pub fn slot_of(pattern: Pattern, grid: Grid, code: usize) -> usize {
    match pattern {
        Pattern::Column => (code % grid.width) * grid.height + code / grid.width,
        _ => code % slots(pattern, grid),
    }
}

/// The slots that the newest code attends to.
fn seen(pattern: Pattern, grid: Grid, query: usize) -> Vec<u32> {
    let mut list = Vec::new();
    pattern.runs(grid, true, query, |start, len, stride| {
        list.extend((0..len).map(|i| slot_of(pattern, grid, start + i * stride) as u32));
    });
    list
}

/// Keys and values in numbered slots, both (b·heads, slots, d).
struct Store {
    keys: Tensor,
    values: Tensor,
}

impl Store {
    fn new(shape: (usize, usize, usize), dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self { keys: Tensor::zeros(shape, dtype, device)?, values: Tensor::zeros(shape, dtype, device)? })
    }

    fn write(&self, slot: usize, key: &Tensor, value: &Tensor) -> Result<()> {
        self.keys.slice_set(key, 1, slot)?;
        Ok(self.values.slice_set(value, 1, slot)?)
    }

    fn read(&self, slots: &[u32]) -> Result<(Tensor, Tensor)> {
        let slots = Tensor::new(slots, self.keys.device())?;
        Ok((self.keys.index_select(&slots, 1)?, self.values.index_select(&slots, 1)?))
    }

    fn reorder(&mut self, index: &Tensor, heads: usize) -> Result<()> {
        let (rows, slots, d) = self.keys.dims3()?;
        let pick = |tensor: &Tensor| -> Result<Tensor> {
            let picked = tensor.reshape((rows / heads, heads * slots * d))?.index_select(index, 0)?;
            Ok(picked.reshape((index.elem_count() * heads, slots, d))?)
        };
        (self.keys, self.values) = (pick(&self.keys)?, pick(&self.values)?);
        Ok(())
    }
}

/// The keys and values of one layer for a batch of sequences.
pub struct Cache {
    dense: Store,
    /// Number of used slots of `dense`.
    filled: usize,
    /// Padding mask (b, slots of `dense`), 0 at padding; present if the sources differ in length.
    mask: Option<Tensor>,
    image: Option<(Store, Pattern, Grid)>,
    heads: usize,
}

/// The sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub heads: usize,
    /// Head dimension.
    pub dims: usize,
    /// Number of positions visible to all later ones: the source, and dense positions decoded one at a time.
    pub dense: usize,
}

impl Cache {
    /// An empty cache. `image` is set if codes will be stored at [`Place::Image`]; `mask` (b, dense) is 0 at padding.
    pub fn new(
        sizes: Sizes,
        image: Option<(Pattern, Grid)>,
        mask: Option<Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let store = |slots| Store::new((sizes.batch * sizes.heads, slots, sizes.dims), dtype, device);
        let image = match image {
            Some((pattern, grid)) => Some((store(slots(pattern, grid))?, pattern, grid)),
            None => None,
        };
        Ok(Self { dense: store(sizes.dense)?, filled: 0, mask, image, heads: sizes.heads })
    }

    /// Appends a whole source, `qkv` (b, l, 3, heads, d).
    ///
    /// # Errors
    /// The source is longer than the cache.
    pub fn fill(&mut self, qkv: &Tensor) -> Result<()> {
        let [_, keys, values] = parts(qkv)?;
        self.dense.write(self.filled, &keys, &values)?;
        self.filled += qkv.dim(1)?;
        Ok(())
    }

    /// Appends one position, `qkv` (b, 1, 3, heads, d), and computes its attention → (b, 1, heads·d).
    ///
    /// # Errors
    /// There is more than one position, the cache is full, or it has no slots for image codes.
    pub fn attend(&mut self, qkv: &Tensor, place: Place) -> Result<Tensor> {
        let (b, l, _, heads, d) = qkv.dims5()?;
        ensure!(l == 1, "cached attention takes one position at a time, not {l}");
        let [query, key, value] = parts(qkv)?;
        let image = match (place, &self.image) {
            (Place::Dense, _) => {
                self.dense.write(self.filled, &key, &value)?;
                self.filled += 1;
                None
            }
            (Place::Image(code), Some((store, pattern, grid))) => {
                store.write(slot_of(*pattern, *grid, code), &key, &value)?;
                Some(store.read(&seen(*pattern, *grid, code))?)
            }
            (Place::Image(_), None) => crate::error::bail!("this cache has no slots for image codes"),
        };
        let query = (query * (d as f64).powf(-0.5))?;
        let dense = |tensor: &Tensor| tensor.narrow(1, 0, self.filled);
        let (keys, values) = (dense(&self.dense.keys)?, dense(&self.dense.values)?);
        let mut scores = query.matmul(&keys.t()?)?;
        if let Some((keys, _)) = &image {
            scores = Tensor::cat(&[scores, query.matmul(&keys.t()?)?], 2)?;
        }
        let weights = masked_softmax(&scores, &self.mask(&scores)?)?;
        let dense_weights = weights.narrow(2, 0, self.filled)?.contiguous()?;
        let mut out = dense_weights.matmul(&values)?;
        if let Some((_, values)) = &image {
            let image_weights = weights.narrow(2, self.filled, values.dim(1)?)?.contiguous()?;
            out = (out + image_weights.matmul(values)?)?;
        }
        Ok(out.reshape((b, 1, heads * d))?)
    }

    /// Additive mask (b·heads, 1, keys) for the scores of this step.
    fn mask(&self, scores: &Tensor) -> Result<Tensor> {
        let (rows, _, keys) = scores.dims3()?;
        let Some(mask) = &self.mask else {
            return Ok(Tensor::ones((1, 1, 1), DType::U8, scores.device())?);
        };
        let b = rows / self.heads;
        let dense = mask.narrow(1, 0, self.filled)?;
        let image = Tensor::ones((b, keys - self.filled), DType::U8, scores.device())?;
        let mask = if keys > self.filled { Tensor::cat(&[dense, image], 1)? } else { dense };
        Ok(mask.unsqueeze(1)?.broadcast_as((b, self.heads, keys))?.reshape((rows, 1, keys))?)
    }

    /// Replaces sequence `i` by a copy of the old sequence `index[i]`; `index` (new b) u32.
    pub fn reorder(&mut self, index: &Tensor) -> Result<()> {
        self.dense.reorder(index, self.heads)?;
        if let Some((store, ..)) = &mut self.image {
            store.reorder(index, self.heads)?;
        }
        if let Some(mask) = &mut self.mask {
            *mask = mask.index_select(index, 0)?;
        }
        Ok(())
    }
}

/// Queries, keys and values of qkv (b, l, 3, heads, d), each (b·heads, l, d).
fn parts(qkv: &Tensor) -> Result<[Tensor; 3]> {
    let (b, l, _, heads, d) = qkv.dims5()?;
    let part = |i: usize| -> Result<Tensor> {
        Ok(qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous()?.reshape((b * heads, l, d))?)
    };
    Ok([part(0)?, part(1)?, part(2)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn rings_hold_28_percent_of_the_dense_slots() {
        let (model, grid) = (config::Model { layers: 48, ..Default::default() }, Grid { height: 32, width: 32 });
        let kept: usize = (1..=48).map(|layer| slots(Pattern::of_layer(layer, &model), grid)).sum();
        assert_eq!(kept, 35 * 33 + 12 * 1024 + 166);
        assert_eq!((kept as f64 / (48.0 * 1024.0) * 100.0).round(), 28.0);
    }

    /// Decoding a whole image never overwrites a code that is still visible, and reads exactly the visible codes.
    #[test]
    fn slots_hold_exactly_the_visible_codes() {
        for (height, width) in [(1, 1), (1, 6), (6, 1), (3, 5), (5, 3), (7, 9)] {
            let grid = Grid { height, width };
            for pattern in crate::nn::pattern::tests::all_patterns() {
                let mut held = vec![None; slots(pattern, grid)];
                for query in 0..grid.len() {
                    held[slot_of(pattern, grid, query)] = Some(query);
                    let slots = seen(pattern, grid, query);
                    let mut keys: Vec<_> = slots.into_iter().map(|slot| held[slot as usize]).collect();
                    keys.sort_unstable();
                    let visible = (0..=query).filter(|&key| pattern.visible(grid, true, query, key)).map(Some);
                    assert_eq!(keys, visible.collect::<Vec<_>>(), "{pattern:?} {grid:?} {query}");
                }
            }
        }
    }
}
