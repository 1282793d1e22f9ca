//! Weights on disk: safetensors files, checked before anything large is allocated.

use crate::error::{Context, Hint, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, View};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Read,
    path::Path,
};

const REPLACE: &str = "the file is damaged or of another kind; copy it again or name another folder";

/// The bytes of a safetensors file.
///
/// # Errors
/// The file is missing, not a regular file, or its header does not fit into it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let meta = file.metadata()?;
    ensure!(meta.is_file(), "{} is not a regular file", path.display());
    let mut start = [0; 8];
    file.read_exact(&mut start).hint(format!("{} is truncated: {} bytes", path.display(), meta.len()), REPLACE)?;
    let header = u64::from_le_bytes(start);
    let fits = header.checked_add(8).is_some_and(|end| end <= meta.len());
    fits.then_some(()).hint(format!("{} is not a safetensors file, or truncated", path.display()), REPLACE)?;
    let mut bytes = start.to_vec();
    file.read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

/// All tensors of a safetensors file as f32 by name; `origin` is its name in messages.
///
/// # Errors
/// A malformed header, a dtype other than a float, a number that is not finite.
pub fn parse(bytes: &[u8], origin: &str) -> Result<HashMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).hint(format!("{origin} is not a whole safetensors file"), REPLACE)?;
    let mut tensors = HashMap::with_capacity(file.len());
    for (name, view) in file.iter() {
        let dtype = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => bail!("{origin}: tensor `{name}` is {other:?}, expected a float"),
        };
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
        // NaN and infinity survive the sum of 0 · x.
        let finite = tensor.elem_count() == 0 || (&tensor * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0;
        ensure!(finite, "{origin}: tensor `{name}` holds numbers that are not finite");
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(tensors)
}

/// A tensor to be written: its shape and f32 values.
pub struct Values<'a> {
    pub shape: Vec<usize>,
    pub values: Cow<'a, [f32]>,
    /// Stored as f32 or rounded to bf16 or f16.
    pub dtype: Dtype,
}

impl View for &Values<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.iter();
        Cow::Owned(match self.dtype {
            Dtype::BF16 => values.flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F16 => values.flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
            _ => values.flat_map(|x| x.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.dtype.bitsize() / 8
    }
}

/// The bytes of a safetensors file that holds `tensors`.
pub fn encode(tensors: &BTreeMap<String, Values<'_>>) -> Result<Vec<u8>> {
    Ok(safetensors::serialize(tensors.iter().map(|(name, v)| (name.as_str(), v)), None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dtype: Dtype) -> Vec<u8> {
        let values = Values { shape: vec![2, 2], values: Cow::Borrowed(&[1.0, -2.5, 0.1, 3e4]), dtype };
        encode(&BTreeMap::from([("a.weight".to_owned(), values)])).unwrap()
    }

    #[test]
    fn round_trips_in_each_precision() {
        for (dtype, tolerance) in [(Dtype::F32, 0.0), (Dtype::F16, 1e-3), (Dtype::BF16, 8e-3)] {
            let tensors = parse(&file(dtype), "test").unwrap();
            let values: Vec<f32> = tensors["a.weight"].flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(tensors["a.weight"].dims(), [2, 2]);
            for (x, y) in values.iter().zip([1.0, -2.5, 0.1, 3e4]) {
                assert!((x - y).abs() <= tolerance * f32::abs(y), "{dtype:?}: {x} {y}");
            }
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        let whole = file(Dtype::F32);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        for end in 0..whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(read(&path).and_then(|bytes| parse(&bytes, "test")).is_err(), "cut at {end}");
        }
        std::fs::write(&path, [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
        assert!(read(&path).is_err());
        assert!(read(dir.path()).is_err());
        let mut nan = whole.clone();
        let end = nan.len();
        nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(parse(&nan, "test").unwrap_err().to_string().contains("a.weight"));
    }
}
