//! The tensors of a checkpoint in parts: any number of ranks can read what any other number of ranks wrote.
//!
//! The name of a stored tensor says which elements it holds: `adamw_m/text_head.weight` holds all,
//! `adamw_m/text_head.weight@1024..2048` holds elements 1024 to 2047 in row-major order.

use crate::{
    error::{Context, Result, ensure, failed},
    nn::weights::{self, Piece, Values},
    runtime::Mapped,
};
use safetensors::{Dtype, SafeTensors};
use std::{borrow::Cow, collections::BTreeMap, io::Write, ops::Range, path::Path};

/// A part of a tensor to write.
#[derive(Clone)]
pub struct Part<'a> {
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Its elements, in row-major order.
    pub range: Range<usize>,
    pub values: Cow<'a, [f32]>,
}

/// Parts by the name of their tensor.
pub type Parts<'a> = BTreeMap<String, Part<'a>>;

impl Part<'_> {
    /// The tensor's name in a file: whole ones keep their shape, others their range.
    fn stored(&self, name: &str) -> (String, Values<'_>) {
        let whole = self.range == (0..self.shape.iter().product());
        let Range { start, end } = self.range;
        let name = if whole { name.to_owned() } else { format!("{name}@{start}..{end}") };
        let shape = if whole { self.shape.clone() } else { vec![self.range.len()] };
        (name, Values { shape, pieces: vec![Piece::Floats(Cow::Borrowed(&self.values))], dtype: Dtype::F32 })
    }
}

/// Writes a safetensors file of these parts.
pub fn write(out: &mut impl Write, parts: &Parts<'_>) -> Result<()> {
    weights::write(out, &parts.iter().map(|(name, part)| part.stored(name)).collect())
}

/// The tensors of the files of a checkpoint; only requested ones are read.
pub struct Stored {
    files: Vec<Mapped>,
    /// By tensor, in order of their elements.
    intervals: BTreeMap<String, Vec<Interval>>,
}

/// The elements of a tensor in one file.
struct Interval {
    range: Range<usize>,
    /// Whether the file holds all elements of the tensor.
    whole: bool,
    file: usize,
    bytes: Range<usize>,
}

impl Stored {
    /// Opens files of parts.
    ///
    /// # Errors
    /// A file is damaged, or a name in it is malformed.
    pub fn open<'p>(paths: impl IntoIterator<Item = &'p Path>) -> Result<Self> {
        let (mut files, mut intervals) = (Vec::new(), BTreeMap::<String, Vec<Interval>>::new());
        for (file, path) in paths.into_iter().enumerate() {
            let mapped = Mapped::open(path)?;
            let origin = path.display();
            let tensors = SafeTensors::deserialize(&mapped).with_context(|| format!("{origin} is damaged"))?;
            for (stored, view) in tensors.iter() {
                ensure!(view.dtype() == Dtype::F32, "{origin}: `{stored}` is {:?}", view.dtype());
                let (name, range) = parse_stored(stored, view.shape().iter().product())
                    .with_context(|| format!("{origin}: the tensor's name `{stored}` is malformed"))?;
                let start = view.data().as_ptr().addr() - mapped.as_ptr().addr();
                let (whole, bytes) = (name == stored, start..start + view.data().len());
                intervals.entry(name.to_owned()).or_default().push(Interval { range, whole, file, bytes });
            }
            files.push(mapped);
        }
        intervals.values_mut().for_each(|list| list.sort_by_key(|interval| interval.range.start));
        Ok(Self { files, intervals })
    }

    fn bytes(&self, interval: &Interval) -> &[u8] {
        &self.files[interval.file][interval.bytes.clone()]
    }

    /// Checks that all tensors are `known`.
    ///
    /// # Errors
    /// Names the first unknown tensor.
    pub fn only(&self, known: impl Fn(&str) -> bool) -> Result<()> {
        match self.intervals.keys().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                Err(failed(format!("the checkpoint holds an unknown tensor `{name}`"), "it is of another model"))
            }
        }
    }

    /// Reads the elements `range` of a tensor of `len` elements.
    ///
    /// # Errors
    /// The tensor is missing, of another size, or holds a number that is not finite.
    pub fn read(&self, name: &str, len: usize, range: &Range<usize>, into: &mut [f32]) -> Result<()> {
        let intervals = self.intervals.get(name).map_or(&[][..], Vec::as_slice);
        let fits = |i: &Interval| if i.whole { i.range.end == len } else { i.range.end <= len };
        ensure!(intervals.iter().all(fits), "the checkpoint's `{name}` has another size");
        let mut count = 0;
        for interval in intervals {
            let common = range.start.max(interval.range.start)..range.end.min(interval.range.end);
            if common.is_empty() {
                continue;
            }
            count += common.len();
            let bytes = common.start - interval.range.start..common.end - interval.range.start;
            let bytes = &self.bytes(interval)[4 * bytes.start..4 * bytes.end];
            let values = &mut into[common.start - range.start..common.end - range.start];
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            ensure!(
                values.iter().all(|value| value.is_finite()),
                "the checkpoint's `{name}` holds numbers that are not finite"
            );
        }
        ensure!(count == range.len(), "the checkpoint holds {count} of {} elements of `{name}`", range.len());
        Ok(())
    }

    /// The whole tensor `name`, to be written as `dtype`.
    ///
    /// # Errors
    /// Some of its elements are missing.
    pub fn whole(&self, name: &str, shape: &[usize], dtype: Dtype) -> Result<Values<'_>> {
        let intervals = self.intervals.get(name).with_context(|| format!("the checkpoint lacks `{name}`"))?;
        let joined = intervals.windows(2).all(|pair| pair[0].range.end == pair[1].range.start);
        ensure!(joined, "the checkpoint holds parts of `{name}` twice or not at all");
        let pieces = intervals.iter().map(|interval| Piece::Stored(self.bytes(interval), Dtype::F32)).collect();
        Ok(Values { shape: shape.to_vec(), pieces, dtype })
    }
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
        let mut bytes = Vec::new();
        write(&mut bytes, &Parts::from([(name.to_owned(), part)])).unwrap();
        bytes
    }

    fn filled(range: Range<usize>, files: &[Vec<u8>]) -> Result<Vec<f32>> {
        let folder = tempfile::tempdir()?;
        let paths: Vec<_> = (0..files.len()).map(|i| folder.path().join(i.to_string())).collect();
        paths.iter().zip(files).try_for_each(|(path, bytes)| std::fs::write(path, bytes))?;
        let stored = Stored::open(paths.iter().map(|path| path.as_path()))?;
        stored.only(|name| name == "a")?;
        let mut values = vec![-1.0; range.len()];
        stored.read("a", 12, &range, &mut values)?;
        Ok(values)
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
