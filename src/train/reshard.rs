//! The tensors of a checkpoint in parts: any number of ranks reads what any other number wrote, by copying intervals.
//!
//! A stored tensor's name says which elements it holds of what: `adamw_m/text_head.weight` all of them,
//! `adamw_m/text_head.weight@1024..2048` those from 1024 to 2047 in row-major order.

use crate::{
    error::{Context, Result, ensure, failed},
    nn::weights::{self, Values},
    ops,
};
use std::{borrow::Cow, collections::BTreeMap, ops::Range};

/// Elements of a tensor of the state, to be written or read.
pub struct Part<'a> {
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    /// Which elements, in row-major order.
    pub range: Range<usize>,
    pub values: Cow<'a, [f32]>,
}

/// Parts of tensors by the tensors' names.
pub type Parts<'a> = BTreeMap<String, Part<'a>>;

impl Part<'_> {
    fn len_of_whole(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor's name in a file: whole ones keep their shape, others their range.
    fn stored(&self, name: &str) -> (String, Values<'_>) {
        let whole = self.range == (0..self.len_of_whole());
        let Range { start, end } = self.range;
        let name = if whole { name.to_owned() } else { format!("{name}@{start}..{end}") };
        let shape = if whole { self.shape.clone() } else { vec![self.range.len()] };
        (name, Values { shape, values: Cow::Borrowed(&self.values), dtype: safetensors::Dtype::F32 })
    }

    /// Copies what `stored`, the elements `range` of the whole tensor, has in common with this part; returns how much.
    fn copy(&mut self, stored: &[f32], range: &Range<usize>) -> usize {
        let common = range.start.max(self.range.start)..range.end.min(self.range.end);
        if common.is_empty() {
            return 0;
        }
        let within = |of: &Range<usize>| common.start - of.start..common.end - of.start;
        self.values.to_mut()[within(&self.range)].copy_from_slice(&stored[within(range)]);
        common.len()
    }
}

/// The bytes of a safetensors file of these parts.
pub fn encode(parts: &Parts<'_>) -> Result<Vec<u8>> {
    weights::encode(&parts.iter().map(|(name, part)| part.stored(name)).collect())
}

/// Fills `wanted` from files of (name, bytes).
///
/// # Errors
/// A tensor is missing, unknown, or of another size.
pub fn fill<'f>(wanted: &mut Parts<'_>, files: impl Iterator<Item = Result<(&'f str, Vec<u8>)>>) -> Result<()> {
    let mut filled: BTreeMap<String, usize> = BTreeMap::new();
    for file in files {
        let (file, bytes) = file?;
        for (stored, tensor) in weights::parse(&bytes, file)? {
            let (name, range) = parse_stored(&stored, tensor.elem_count())
                .with_context(|| format!("{file}: the tensor's name `{stored}` is malformed"))?;
            let unknown =
                || failed(format!("the checkpoint holds an unknown tensor `{name}`"), "it is of another model");
            let part = wanted.get_mut(name).ok_or_else(unknown)?;
            let (whole, all) = (part.len_of_whole(), name == stored);
            ensure!(
                if all { range.end == whole } else { range.end <= whole },
                "the checkpoint's `{stored}` has another size"
            );
            *filled.entry(name.to_owned()).or_default() +=
                ops::with_slice(&tensor, |values| part.copy(values, &range))?;
        }
    }
    for (name, part) in wanted {
        let (count, len) = (filled.get(name).copied().unwrap_or(0), part.range.len());
        ensure!(count == len, "the checkpoint holds {count} of {len} elements of `{name}`");
    }
    Ok(())
}

/// `name` or `name@start..end`, of a tensor of `len` elements.
fn parse_stored(stored: &str, len: usize) -> Result<(&str, Range<usize>)> {
    let Some((name, range)) = stored.split_once('@') else { return Ok((stored, 0..len)) };
    let (start, end) = range.split_once("..").context("no range")?;
    let range = start.parse()?..end.parse()?;
    ensure!(range.start < range.end && range.end - range.start == len, "a range of another length");
    Ok((name, range))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(range: Range<usize>) -> Part<'static> {
        let values = range.clone().map(|i| i as f32).collect();
        Part { shape: vec![3, 4], range, values: Cow::Owned(values) }
    }

    fn file(name: &str, part: Part<'_>) -> Vec<u8> {
        encode(&Parts::from([(name.to_owned(), part)])).unwrap()
    }

    fn filled(range: Range<usize>, files: &[Vec<u8>]) -> Result<Vec<f32>> {
        let room = Part { values: Cow::Owned(vec![-1.0; range.len()]), ..part(range) };
        let mut wanted = Parts::from([("a".to_owned(), room)]);
        fill(&mut wanted, files.iter().map(|bytes| Ok(("test", bytes.clone()))))?;
        Ok(wanted.remove("a").unwrap().values.into_owned())
    }

    #[test]
    fn any_cut_is_read_from_any_other() {
        let numbers: Vec<f32> = (0..12).map(|i| i as f32).collect();
        for cuts in [vec![0, 12], vec![0, 5, 12], vec![0, 1, 2, 9, 12]] {
            let files: Vec<_> = cuts.windows(2).map(|cut| file("a", part(cut[0]..cut[1]))).collect();
            for start in 0..12 {
                for end in start..=12 {
                    assert_eq!(filled(start..end, &files).unwrap(), numbers[start..end]);
                }
            }
        }
    }

    #[test]
    fn what_is_missing_twice_or_foreign_is_refused() {
        let message = |files: &[Vec<u8>]| format!("{:#}", filled(2..8, files).unwrap_err());
        assert!(message(&[file("a", part(0..5))]).contains("3 of 6 elements of `a`"));
        assert!(message(&[file("a", part(0..12)), file("a", part(3..4))]).contains("7 of 6 elements"));
        assert!(message(&[file("b", part(0..12))]).contains("unknown tensor `b`"));
        let large = Part { shape: vec![4, 4], range: 0..16, values: Cow::Owned(vec![0.0; 16]) };
        assert!(message(&[file("a", large)]).contains("another size"));
        for name in ["a@", "a@1..2", "a@5..1", "a@x..y", "a@20..32"] {
            let whole = Part { shape: vec![12], range: 0..12, values: Cow::Owned(vec![0.0; 12]) };
            assert!(filled(2..8, &[file(name, whole)]).is_err(), "{name}");
        }
    }
}
