//! Weights in the files of others: safetensors, PyTorch's `.pt`/`.pth`/`.ckpt` (zip archives, and the older kind), pickles
//! of numpy arrays. Nothing in them is run, and a tensor is only converted when it is taken.

use super::{
    pickle::{At, Object, Pickle},
    weights::{self, REPLACE, finite},
};
use crate::{
    error::{Context, Hint, Result, bail, ensure},
    runtime::Mapped,
};
use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Cursor,
    ops::Range,
    path::Path,
};
use zip::{CompressionMethod, ZipArchive};

/// Entries of nested dictionaries that are looked at: far above any checkpoint's.
const MAX_ENTRIES: usize = 1 << 20;
/// Dictionaries in each other.
const MAX_DEPTH: usize = 12;
/// The number at the beginning of PyTorch's older files, as a pickle.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";

/// The float tensors of one or several files.
pub struct CheckpointFile {
    files: Vec<(String, Mapped)>,
    tensors: BTreeMap<String, Stored>,
}

/// A tensor in a file: element (i, j, ..) lies at `offset + i · strides[0] + j · strides[1] + ..` of `bytes`.
struct Stored {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
    bytes: Range<usize>,
}

impl CheckpointFile {
    /// Opens a file, or all files of a folder together. Names of tensors are those in the file's `state_dict` or
    /// `model` where it has one, those of nested dictionaries joined by dots.
    ///
    /// # Errors
    /// A file is of no known kind, damaged, or a pickle that would call what is no part of a checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let mut paths = vec![path.to_owned()];
        if path.is_dir() {
            let entries = fs::read_dir(path)?.collect::<std::io::Result<Vec<_>>>()?;
            paths = entries.into_iter().map(|entry| entry.path()).filter(|path| is_checkpoint(path)).collect();
            paths.sort();
            let hint = "name a file, or a folder with .safetensors, .pt, .pth, .ckpt or .bin files";
            (!paths.is_empty()).then_some(()).hint(format!("{} holds no checkpoint", path.display()), hint)?;
        }
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            let name = path.display().to_string();
            let bytes = Mapped::open(&path)?;
            let stored = read(&bytes, all.files.len()).hint(format!("cannot read {name}"), REPLACE)?;
            for (tensor, stored) in stored {
                ensure!(
                    all.tensors.insert(tensor.clone(), stored).is_none(),
                    "`{tensor}` is in two files, one is {name}"
                );
            }
            all.files.push((name, bytes));
        }
        Ok(all)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// A tensor as f32.
    ///
    /// # Errors
    /// There is none of this name, or it holds numbers that are not finite.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
        let (file, bytes) = &self.files[stored.file];
        let (first, last) = stored.extent();
        let width = stored.dtype.bitsize() / 8;
        let start = stored.bytes.start;
        let values = finite(&bytes[start + first * width..start + last * width], stored.dtype, name, file)?;
        let values = if stored.strides == row_major(&stored.shape) { values } else { stored.gather(&values) };
        Ok(Tensor::from_vec(values, stored.shape.as_slice(), &Device::Cpu)?)
    }
}

fn is_checkpoint(path: &Path) -> bool {
    let known = ["safetensors", "pt", "pth", "ckpt", "bin", "pkl"];
    path.is_file() && path.extension().and_then(|end| end.to_str()).is_some_and(|end| known.contains(&end))
}

impl Stored {
    /// The elements of `bytes` among which the tensor lies.
    fn extent(&self) -> (usize, usize) {
        if self.shape.contains(&0) {
            return (0, 0);
        }
        let last: usize = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride).sum();
        (self.offset, self.offset + last + 1)
    }

    /// Checks that the tensor lies in its bytes and is not longer than they are.
    fn check(self) -> Result<Self> {
        let held = self.bytes.len() / (self.dtype.bitsize() / 8).max(1);
        let mut steps =
            self.shape.iter().zip(&self.strides).map(|(size, stride)| size.saturating_sub(1).checked_mul(*stride));
        let end = steps.try_fold(self.offset, |sum, step| sum.checked_add(step?));
        let count = self.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let fits = self.shape.len() == self.strides.len() && count.is_some_and(|count| count <= held);
        let inside = self.shape.contains(&0) || end.is_some_and(|end| end < held);
        ensure!(fits && inside, "a tensor of shape {:?} in {held} elements", self.shape);
        Ok(self)
    }

    /// The elements in row-major order, from those in [`Stored::extent`].
    fn gather(&self, values: &[f32]) -> Vec<f32> {
        let mut places = vec![0];
        for (size, stride) in self.shape.iter().zip(&self.strides) {
            places = places.iter().flat_map(|place| (0..*size).map(move |i| place + i * stride)).collect();
        }
        places.into_iter().map(|place| values[place]).collect()
    }
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides: Vec<usize> = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

fn read(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    match bytes {
        [b'P', b'K', ..] => read_zip(bytes, file),
        _ if bytes.starts_with(OLD_MAGIC) => read_old(bytes, file),
        [0x80, ..] => {
            let (pickle, _) = Pickle::read(bytes)?;
            Reader { pickle: &pickle, base: 0, file, storages: &HashMap::new() }.tensors()
        }
        _ => read_safetensors(bytes, file),
    }
}

fn read_safetensors(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    weights::check_header(bytes)?;
    let whole = SafeTensors::deserialize(bytes)?;
    let stored = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
        let (shape, bytes) = (view.shape().to_vec(), start..start + view.data().len());
        let stored = Stored { file, dtype: view.dtype(), strides: row_major(&shape), shape, offset: 0, bytes };
        (name.to_owned(), stored)
    };
    Ok(whole.iter().map(stored).filter(|(_, stored)| is_float(stored.dtype)).collect())
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// What `torch.save` writes today: `NAME/data.pkl`, and a file for each storage.
fn read_zip(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    let mut archive = ZipArchive::new(Cursor::new(bytes))?;
    let (mut pickled, mut storages) = (None, HashMap::new());
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i)?;
        let name = entry.name()?.into_owned();
        let Some((_, inner)) = name.split_once('/') else { continue };
        ensure!(
            entry.compression() == CompressionMethod::Stored,
            "`{name}` is compressed, which torch.save never does"
        );
        let start = usize::try_from(entry.data_start().with_context(|| format!("`{name}` lies nowhere"))?)?;
        let end = start.checked_add(usize::try_from(entry.size())?).filter(|&end| end <= bytes.len());
        let range = start..end.with_context(|| format!("`{name}` is cut off"))?;
        if inner == "data.pkl" {
            pickled = Some(range);
        } else if let Some(key) = inner.strip_prefix("data/") {
            storages.insert(key.to_owned(), range);
        }
    }
    let pickled = pickled.context("a zip archive without a data.pkl")?;
    let (base, (pickle, _)) = (pickled.start, Pickle::read(&bytes[pickled])?);
    Reader { pickle: &pickle, base, file, storages: &storages }.tensors()
}

/// What it wrote until 2020: a few pickles, and the storages one after the other.
fn read_old(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    let mut base = 0;
    // The magic number, the version and facts about the machine.
    for _ in 0..3 {
        base += Pickle::read(&bytes[base..])?.1;
    }
    let (pickle, length) = Pickle::read(&bytes[base..])?;
    let mut at = base + length;
    let (keys, length) = Pickle::read(&bytes[at..])?;
    at += length;
    let kinds: HashMap<&str, Dtype> = pickle.objects().filter_map(|object| storage(&pickle, object)).collect();
    let mut storages = HashMap::new();
    for key in keys.list(keys.root()).context("the list of storages is missing")? {
        let key = keys.text(*key).context("a storage without a name")?;
        let width = kinds.get(key).map_or(1, |dtype| dtype.bitsize() / 8);
        let rest = bytes.get(at..).and_then(<[u8]>::first_chunk).context("the file is cut off")?;
        let count = usize::try_from(u64::from_le_bytes(*rest))?;
        let end = count.checked_mul(width).and_then(|length| (at + 8).checked_add(length));
        let end = end.filter(|&end| end <= bytes.len()).context("the file is cut off")?;
        storages.insert(key.to_owned(), at + 8..end);
        at = end;
    }
    Reader { pickle: &pickle, base, file, storages: &storages }.tensors()
}

/// Name and kind of a storage, from the reference to it.
fn storage<'p>(pickle: &'p Pickle, object: &Object) -> Option<(&'p str, Dtype)> {
    let Object::Persistent(id) = object else { return None };
    let [kind, class, key, ..] = pickle.list(*id)? else { return None };
    let Object::Global(_, class) = pickle.get(*class) else { return None };
    (pickle.text(*kind)? == "storage").then_some((pickle.text(*key)?, torch_dtype(class)))
}

/// The elements of a storage class; those that are no floats are told apart by their width alone.
fn torch_dtype(class: &str) -> Dtype {
    match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" | "ComplexFloatStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        _ => Dtype::U8,
    }
}

/// Finds the tensors among a pickle's objects.
struct Reader<'a> {
    pickle: &'a Pickle,
    /// Where the pickle begins in the file.
    base: usize,
    file: usize,
    storages: &'a HashMap<String, Range<usize>>,
}

impl Reader<'_> {
    fn tensors(&self) -> Result<BTreeMap<String, Stored>> {
        let (mut tensors, mut seen) = (BTreeMap::new(), 0);
        let root = self.pickle.root();
        let entries = self.pickle.dict(root).context("the pickle is no dictionary of tensors")?;
        let of_tensors = |key| matches!(self.pickle.text(key), Some("state_dict" | "model"));
        let inner = entries.iter().find(|(key, value)| of_tensors(*key) && self.pickle.dict(*value).is_some());
        self.flatten("", inner.map_or(root, |(_, value)| *value), 0, &mut seen, &mut tensors)?;
        Ok(tensors)
    }

    fn flatten(
        &self,
        prefix: &str,
        at: At,
        depth: usize,
        seen: &mut usize,
        tensors: &mut BTreeMap<String, Stored>,
    ) -> Result<()> {
        for (key, value) in self.pickle.dict(at).unwrap_or_default() {
            *seen += 1;
            ensure!(*seen < MAX_ENTRIES && depth < MAX_DEPTH, "dictionaries without end");
            let Some(key) = self.pickle.text(*key) else { continue };
            let name = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
            if let Some(stored) = self.tensor(*value).with_context(|| format!("tensor `{name}`"))? {
                if is_float(stored.dtype) {
                    tensors.insert(name, stored.check()?);
                }
            } else {
                self.flatten(&name, *value, depth + 1, seen, tensors)?;
            }
        }
        Ok(())
    }

    /// The tensor or array at this place, if it is one.
    fn tensor(&self, at: At) -> Result<Option<Stored>> {
        let Some((function, arguments)) = self.pickle.call(at) else { return Ok(None) };
        match (function, arguments) {
            ("_rebuild_parameter", [data, ..]) if *data != at => match self.pickle.call(*data) {
                Some(("_rebuild_parameter", _)) => bail!("a parameter of a parameter"),
                _ => self.tensor(*data),
            },
            ("_rebuild_tensor" | "_rebuild_tensor_v2", [storage, offset, shape, strides, ..]) => {
                self.torch_tensor(*storage, [*offset, *shape, *strides]).map(Some)
            }
            ("_reconstruct", _) => self.array(at),
            _ => Ok(None),
        }
    }

    fn torch_tensor(&self, at: At, [offset, shape, strides]: [At; 3]) -> Result<Stored> {
        let (key, dtype) = storage(self.pickle, self.pickle.get(at)).context("its storage is of an unknown kind")?;
        let bytes = self.storages.get(key).with_context(|| format!("its storage `{key}` is missing"))?.clone();
        let offset = self.pickle.size(offset).context("its offset")?;
        let shape = self.pickle.sizes(shape).context("its shape")?;
        let strides = self.pickle.sizes(strides).context("its strides")?;
        Ok(Stored { file: self.file, dtype, shape, strides, offset, bytes })
    }

    /// A numpy array: the state is (version, shape, dtype, Fortran order, bytes).
    fn array(&self, at: At) -> Result<Option<Stored>> {
        let Object::Call { state: Some(state), .. } = self.pickle.get(at) else { bail!("an array without content") };
        let Some([_, shape, dtype, fortran, content]) = self.pickle.list(*state) else { bail!("an array's state") };
        let Object::Bytes(bytes) = self.pickle.get(*content) else { return Ok(None) };
        let shape = self.pickle.sizes(*shape).context("its shape")?;
        let Some(("dtype", [kind, ..])) = self.pickle.call(*dtype) else { bail!("its dtype") };
        let dtype = match self.pickle.text(*kind) {
            Some("f8") => Dtype::F64,
            Some("f4") => Dtype::F32,
            Some("f2") => Dtype::F16,
            _ => return Ok(None),
        };
        let mut strides = row_major(&shape);
        if self.pickle.get(*fortran) == &Object::Bool(true) {
            strides = row_major(&shape.iter().rev().copied().collect::<Vec<_>>());
            strides.reverse();
        }
        let bytes = self.base + bytes.start..self.base + bytes.end;
        Ok(Some(Stored { file: self.file, dtype, shape, strides, offset: 0, bytes }))
    }
}

#[cfg(test)]
mod tests;
