//! Weights in published files: safetensors, PyTorch's `.pt`/`.pth`/`.ckpt` (zip archives, and the older format), and
//! pickles of numpy arrays. No code in them is run. A tensor is only converted when it is read.

use super::{
    pickle::{At, Object, Pickle},
    weights::{self, REPLACE, finite},
};
use crate::{
    error::{Context, Hint, Result, bail, ensure, hint_if_none},
    report,
    runtime::Mapped,
};
use candle_core::{Device, Tensor};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Cursor,
    ops::Range,
    path::Path,
};
use stored::{MAX_DIMENSIONS, Stored, row_major};
use zip::{CompressionMethod, ZipArchive};

mod stored;
#[cfg(test)]
mod tests;

/// Maximum number of entries of nested dictionaries, far above any real checkpoint.
const MAX_ENTRIES: usize = 1 << 17;
/// Maximum size of all tensor names together, in bytes.
const MAX_NAMES: usize = 16 << 20;
/// Maximum depth of nested dictionaries.
const MAX_DEPTH: usize = 12;
/// Maximum number of repeated elements in a file, as in the views that `expand` makes.
const MAX_REPEATED: usize = 1 << 24;
/// Prefixes that wrappers add to the tensor names of a model: DataParallel, torch.compile, and transformers of
/// taming-transformers, which contain their image tokenizer.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "first_stage_model."];
/// Magic number at the start of PyTorch's older format, as a pickle.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";

/// The float tensors of one or several checkpoint files.
pub struct CheckpointFile {
    files: Vec<(String, Mapped)>,
    tensors: BTreeMap<String, Stored>,
}

impl CheckpointFile {
    /// Opens a file, or all files of a folder. Tensor names are those of the file's `state_dict` or `model`, if it has
    /// one; names of nested dictionaries are joined by dots, and prefixes of wrappers are removed. If a file has both
    /// `model` and `ema` (a moving average of the weights), `ema` is read, as in LlamaGen's evaluation.
    ///
    /// # Errors
    /// A file has an unknown format, is damaged, or is a pickle that calls a function that checkpoints do not need.
    pub fn open(path: &Path) -> Result<Self> {
        let mut paths = vec![path.to_owned()];
        if path.is_dir() {
            let entries = fs::read_dir(path)?.collect::<std::io::Result<Vec<_>>>()?;
            paths = entries.into_iter().map(|entry| entry.path()).filter(|path| is_checkpoint(path)).collect();
            paths.sort();
            let hint = "name a file, or a folder with .safetensors, .pt, .pth, .ckpt or .bin files";
            (!paths.is_empty()).then_some(()).hint(format!("{} contains no checkpoint", path.display()), hint)?;
        }
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            let name = path.display().to_string();
            let cannot = format!("cannot read {name}");
            let bytes = hint_if_none(Mapped::open(&path), &cannot, REPLACE)?;
            let stored = hint_if_none(read(&bytes, all.files.len()), cannot, REPLACE)?;
            for (tensor, stored) in unwrapped(stored) {
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

    /// Shape of the tensor `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// Reads a tensor as f32.
    ///
    /// # Errors
    /// There is no tensor of this name, or it contains numbers that are not finite.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
        let (file, bytes) = &self.files[stored.file];
        let (first, last) = stored.extent();
        let width = stored.dtype.bitsize() / 8;
        let start = stored.bytes.start;
        let values = finite(&bytes[start + first * width..start + last * width], stored.dtype, name, file)?;
        let values = if stored.strides == row_major(&stored.shape) { values } else { stored.contiguous(&values) };
        Ok(Tensor::from_vec(values, stored.shape.as_slice(), &Device::Cpu)?)
    }
}

/// Removes the prefixes of wrappers from tensor names. If two names would become equal, both keep their prefix.
fn unwrapped(stored: BTreeMap<String, Stored>) -> BTreeMap<String, Stored> {
    fn plain(mut name: &str) -> &str {
        while let Some(rest) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
            name = rest;
        }
        name
    }
    let mut counts: HashMap<String, usize> = HashMap::new();
    stored.keys().for_each(|name| *counts.entry(plain(name).to_owned()).or_default() += 1);
    let renamed = |(name, tensor): (String, Stored)| match counts.get(plain(&name)) {
        Some(1) => (plain(&name).to_owned(), tensor),
        _ => (name, tensor),
    };
    stored.into_iter().map(renamed).collect()
}

fn is_checkpoint(path: &Path) -> bool {
    let known = ["safetensors", "pt", "pth", "ckpt", "bin", "pkl"];
    path.is_file() && path.extension().and_then(|end| end.to_str()).is_some_and(|end| known.contains(&end))
}

fn read(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    match bytes {
        // Checked first, because the length of a safetensors header may start with any byte, also those of other
        // formats.
        _ if weights::is_safetensors(bytes) => read_safetensors(bytes, file),
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
    let whole = weights::tensors(bytes)?;
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

/// The present format of `torch.save`: a zip archive with `NAME/data.pkl`, and a file for each storage.
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
        let start =
            usize::try_from(entry.data_start().with_context(|| format!("`{name}` has no data in the archive"))?)?;
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

/// The format until 2020: several pickles, followed by the storages.
fn read_old(bytes: &[u8], file: usize) -> Result<BTreeMap<String, Stored>> {
    let mut base = 0;
    // The magic number, the protocol version and facts about the machine.
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

/// Name and dtype of a storage, from the reference to it.
fn storage<'p>(pickle: &'p Pickle, object: &Object) -> Option<(&'p str, Dtype)> {
    let Object::Persistent(id) = object else { return None };
    let [kind, class, key, ..] = pickle.list(*id)? else { return None };
    let Object::Global(_, class) = pickle.get(*class) else { return None };
    (pickle.text(*kind)? == "storage").then_some((pickle.text(*key)?, torch_dtype(class)))
}

/// The dtype of a storage class. Of dtypes that are not floats, only the width matters.
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

/// Finds the tensors among the objects of a pickle.
struct Reader<'a> {
    pickle: &'a Pickle,
    /// Offset of the pickle in the file.
    base: usize,
    file: usize,
    storages: &'a HashMap<String, Range<usize>>,
}

/// The tensors found so far, and the remaining budgets.
struct Found {
    tensors: BTreeMap<String, Stored>,
    entries: usize,
    /// Total size of names in bytes.
    names: usize,
    /// Remaining part of [`MAX_REPEATED`].
    repeated: usize,
}

impl Reader<'_> {
    fn tensors(&self) -> Result<BTreeMap<String, Stored>> {
        let root = self.pickle.root();
        let entries = self.pickle.dict(root).context("the pickle is no dictionary of tensors")?;
        let inner = |name: &str| {
            let found = entries.iter().find(|(key, _)| self.pickle.text(*key) == Some(name));
            found.map(|(_, value)| *value).filter(|value| self.pickle.dict(*value).is_some_and(|dict| !dict.is_empty()))
        };
        let chosen = match (inner("model"), inner("ema")) {
            (Some(_), Some(ema)) => {
                report::note("the file contains the weights and their moving average: using the average (`ema`)");
                Some(ema)
            }
            (model, _) => inner("state_dict").or(model),
        };
        let mut found = Found { tensors: BTreeMap::new(), entries: 0, names: 0, repeated: MAX_REPEATED };
        self.flatten("", chosen.unwrap_or(root), 0, &mut found)?;
        Ok(found.tensors)
    }

    fn flatten(&self, prefix: &str, at: At, depth: usize, found: &mut Found) -> Result<()> {
        for (key, value) in self.pickle.dict(at).unwrap_or_default() {
            found.entries += 1;
            ensure!(found.entries < MAX_ENTRIES && depth < MAX_DEPTH, "dictionaries without end");
            let Some(key) = self.pickle.text(*key) else { continue };
            found.names += prefix.len() + key.len() + 1;
            ensure!(found.names < MAX_NAMES, "names of tensors without end");
            let name = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
            if let Some(stored) = self.tensor(*value).with_context(|| format!("tensor `{name}`"))? {
                if is_float(stored.dtype) {
                    let stored = stored.check(&mut found.repeated).with_context(|| format!("tensor `{name}`"))?;
                    found.tensors.insert(name, stored);
                }
            } else {
                self.flatten(&name, *value, depth + 1, found)?;
            }
        }
        Ok(())
    }

    /// The tensor or array at `at`, if it is one.
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
        let shape = self.sizes(shape).context("its shape")?;
        let strides = self.sizes(strides).context("its strides")?;
        Ok(Stored { file: self.file, dtype, shape, strides, offset, bytes })
    }

    /// A list of sizes, one per dimension.
    fn sizes(&self, at: At) -> Option<Vec<usize>> {
        self.pickle.list(at).filter(|list| list.len() <= MAX_DIMENSIONS)?;
        self.pickle.sizes(at)
    }

    /// A numpy array; its state is (version, shape, dtype, Fortran order, bytes).
    fn array(&self, at: At) -> Result<Option<Stored>> {
        let Object::Call { state: Some(state), .. } = self.pickle.get(at) else { bail!("an array without content") };
        let Some([_, shape, dtype, fortran, content]) = self.pickle.list(*state) else { bail!("an array's state") };
        let Object::Bytes(bytes) = self.pickle.get(*content) else { return Ok(None) };
        let shape = self.sizes(*shape).context("its shape")?;
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
