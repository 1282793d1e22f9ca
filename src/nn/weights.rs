//! Reads and writes safetensors files; they are checked before large memory is allocated.

use super::params::Params;
use crate::{
    error::{Context, Hint, Result, bail, ensure, failed},
    runtime::Mapped,
};
use candle_core::{DType, Device, Tensor};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo, TensorView},
};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    io::Write,
    path::Path,
};

/// Number of bytes converted at a time; a multiple of the size of every float.
const CHUNK: usize = 1 << 16;

pub(super) const REPLACE: &str = "the file is damaged or has another format; copy it again or choose another folder";

const NOT_FINITE: &str =
    "the file is damaged, or the training of these weights diverged: copy it again or choose another";

/// Maps a safetensors file into memory.
///
/// # Errors
/// The file is missing or not a regular file, or its header is longer than the file.
pub fn map(path: &Path) -> Result<Mapped> {
    let bytes = Mapped::open(path)?;
    check_header(&bytes).hint(format!("{} is not a safetensors file, or truncated", path.display()), REPLACE)?;
    Ok(bytes)
}

/// Parses a safetensors file.
///
/// # Errors
/// The bytes are not a safetensors file, are truncated, or two tensors have the same name.
pub(super) fn tensors(bytes: &[u8]) -> Result<SafeTensors<'_>> {
    check_header(bytes)?;
    let tensors = SafeTensors::deserialize(bytes)?;
    // The safetensors crate checks the length of the header, but keeps the last of several equal names.
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    serde_json::from_slice::<UniqueKeys>(bytes.get(8..).and_then(|rest| rest.get(..length)).unwrap_or_default())?;
    Ok(tensors)
}

/// A JSON object with distinct keys; its values are skipped.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut keys = HashSet::new();
        while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(key) = keys.replace(key) {
                return Err(de::Error::custom(format_args!("it contains `{key}` twice")));
            }
        }
        Ok(self)
    }
}

/// Whether the bytes start like a safetensors file: with the length of a JSON header that fits into the file. Read as
/// such a length, the first bytes of a pickle or zip archive exceed the size of any file.
pub(super) fn is_safetensors(bytes: &[u8]) -> bool {
    check_header(bytes).is_ok() && bytes.get(8) == Some(&b'{')
}

/// Checks that the header fits into the file before it is read into memory.
fn check_header(bytes: &[u8]) -> Result<()> {
    let header = bytes.first_chunk().copied().map(u64::from_le_bytes);
    let header = header.with_context(|| format!("only {} bytes", bytes.len()))?;
    ensure!(header.checked_add(8).is_some_and(|end| end <= bytes.len() as u64), "its header is longer than the file");
    Ok(())
}

/// The tensors of a safetensors file in their stored dtypes, to be written as `dtype`.
///
/// # Errors
/// The header is malformed, a dtype is not a float, or a number is not finite.
pub fn stored<'a>(bytes: &'a [u8], origin: &str, dtype: Dtype) -> Result<BTreeMap<String, Values<'a>>> {
    let values = |(name, view): (&str, TensorView<'a>)| {
        // Checked now and converted during writing, so that little is in memory at a time.
        view.data().chunks(CHUNK).try_for_each(|chunk| finite(chunk, view.dtype(), name, origin).map(drop))?;
        let pieces = vec![Piece::Stored(view.data(), view.dtype())];
        Ok((name.to_owned(), Values { shape: view.shape().to_vec(), pieces, dtype }))
    };
    open(bytes, origin)?.iter().map(values).collect()
}

/// All tensors of a safetensors file as f32 by name; `origin` is the file's name in error messages.
///
/// # Errors
/// The header is malformed, a dtype is not a float, or a number is not finite.
pub fn parse(bytes: &[u8], origin: &str) -> Result<HashMap<String, Tensor>> {
    let tensor = |(name, view): (&str, TensorView<'_>)| {
        let values = finite(view.data(), view.dtype(), name, origin)?;
        Ok((name.to_owned(), Tensor::from_vec(values, view.shape(), &Device::Cpu)?))
    };
    open(bytes, origin)?.iter().map(tensor).collect()
}

fn open<'a>(bytes: &'a [u8], origin: &str) -> Result<SafeTensors<'a>> {
    tensors(bytes).hint(format!("{origin} is not a complete safetensors file"), REPLACE)
}

/// The tensor `name` as f32.
pub(super) fn finite(bytes: &[u8], dtype: Dtype, name: &str, origin: &str) -> Result<Vec<f32>> {
    let values = floats(bytes, dtype).with_context(|| format!("{origin}: tensor `{name}`"))?;
    let what = || format!("{origin}: tensor `{name}` holds numbers that are not finite");
    ensure!(values.iter().all(|x| x.is_finite()), failed(what(), NOT_FINITE));
    Ok(values)
}

/// A tensor to write: its shape and its values as consecutive pieces.
pub struct Values<'a> {
    pub shape: Vec<usize>,
    pub pieces: Vec<Piece<'a>>,
    /// Number format of the file.
    pub dtype: Dtype,
}

impl Values<'_> {
    /// The values as f32, in row-major order.
    pub fn floats(&self) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for piece in &self.pieces {
            match piece {
                Piece::Floats(values) => all.extend_from_slice(values),
                Piece::Stored(bytes, dtype) => all.extend(floats(bytes, *dtype)?),
            }
        }
        Ok(all)
    }

    /// Writes the values as `dtype`, in row-major order and little-endian.
    pub fn write(&self, out: &mut impl Write) -> Result<()> {
        self.pieces.iter().try_for_each(|piece| piece.write(out, self.dtype))
    }
}

/// Floats in memory, or in the bytes of a file.
pub enum Piece<'a> {
    Floats(Cow<'a, [f32]>),
    Stored(&'a [u8], Dtype),
}

impl Piece<'_> {
    fn elements(&self) -> usize {
        match self {
            Self::Floats(values) => values.len(),
            Self::Stored(bytes, dtype) => bytes.len() * 8 / dtype.bitsize().max(1),
        }
    }

    /// Writes the piece as `dtype`, a small part at a time.
    fn write(&self, out: &mut impl Write, dtype: Dtype) -> Result<()> {
        let (bytes, from): (&[u8], _) = match self {
            Self::Floats(values) => (bytemuck::cast_slice(values), Dtype::F32),
            Self::Stored(bytes, from) => (bytes, *from),
        };
        if from == dtype {
            return Ok(out.write_all(bytes)?);
        }
        for chunk in bytes.chunks(CHUNK) {
            let values = floats(chunk, from)?;
            let converted: Vec<u8> = match dtype {
                Dtype::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            out.write_all(&converted)?;
        }
        Ok(())
    }
}

/// Bytes of a file as f32.
fn floats(bytes: &[u8], dtype: Dtype) -> Result<Vec<f32>> {
    let f64 = |b: &[u8; 8]| f64::from_le_bytes(*b) as f32;
    Ok(match dtype {
        Dtype::F64 => bytes.as_chunks().0.iter().map(f64).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => bail!("expected a float, not {other:?}"),
    })
}

/// Parameters in memory, to be written as f32.
pub fn of_params(params: &Params) -> Result<BTreeMap<String, Values<'static>>> {
    params.iter().map(|(name, var)| Ok((name.clone(), of_tensor(var)?))).collect()
}

/// A tensor in memory, to be written as f32.
pub fn of_tensor(tensor: &Tensor) -> Result<Values<'static>> {
    let floats = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let (shape, pieces) = (tensor.dims().to_vec(), vec![Piece::Floats(Cow::Owned(floats))]);
    Ok(Values { shape, pieces, dtype: Dtype::F32 })
}

/// Writes these tensors to `out` as a safetensors file, with one piece in memory at a time.
///
/// # Errors
/// The pieces of a tensor do not match its shape, or `out` cannot be written.
pub fn write(out: &mut impl Write, tensors: &BTreeMap<String, Values<'_>>) -> Result<()> {
    // Wide numbers first, so that all are aligned.
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, values)| Reverse(values.dtype.bitsize()));
    let mut end = 0;
    let infos = order.iter().map(|(name, values)| {
        let start = end;
        end += values.shape.iter().product::<usize>() * values.dtype.bitsize() / 8;
        let info = TensorInfo { dtype: values.dtype, shape: values.shape.clone(), data_offsets: (start, end) };
        ((*name).clone(), info)
    });
    let mut header = serde_json::to_vec(&Metadata::new(None, infos.collect())?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (name, values) in order {
        let wanted: usize = values.shape.iter().product();
        let held: usize = values.pieces.iter().map(Piece::elements).sum();
        ensure!(held == wanted, "`{name}` has {held} elements for {:?}", values.shape);
        values.write(out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;

    fn file(dtype: Dtype) -> Vec<u8> {
        let piece = |values| Piece::Floats(Cow::Borrowed(values));
        let pieces = vec![piece(&[1.0, -2.5][..]), piece(&[0.1, 3e4])];
        let values = Values { shape: vec![2, 2], pieces, dtype };
        let mut bytes = Vec::new();
        write(&mut bytes, &BTreeMap::from([("a.weight".to_owned(), values)])).unwrap();
        bytes
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
            assert!(map(&path).and_then(|bytes| parse(&bytes, "test")).is_err(), "cut at {end}");
        }
        let twice = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let twice = [&(twice.len() as u64).to_le_bytes()[..], twice, &[0; 4]].concat();
        assert!(format!("{:#}", parse(&twice, "test").unwrap_err()).contains("`a` twice"));
        std::fs::write(&path, [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
        assert!(map(&path).is_err());
        assert!(map(dir.path()).is_err());
        let mut nan = whole.clone();
        let end = nan.len();
        nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        let error = parse(&nan, "test").unwrap_err();
        assert!(
            error.to_string().contains("a.weight") && hint_of(&error).is_some_and(|hint| hint.contains("diverged"))
        );
        let export = |bytes: &[u8]| stored(bytes, "test", Dtype::BF16).map(drop);
        assert!(export(&whole).is_ok() && export(&nan).unwrap_err().to_string().contains("a.weight"));
    }
}
