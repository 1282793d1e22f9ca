//! Weights that others published, converted to our folders: names and layouts of their files.

mod chinese_clip;
mod dvae;
mod inception;
mod lpips;
mod vqgan;

pub use chinese_clip::chinese_clip;
pub(in crate::bundle) use chinese_clip::layout::{Form, Layout};
pub use dvae::dvae;
pub use inception::inception;
pub use lpips::lpips;
pub use vqgan::{Family, vqgan};

use super::{publish, write::write_weights};
use crate::{
    error::{Result, bail, failed},
    nn::{checkpoint_file::CheckpointFile, params::Params, weights},
};
use candle_core::Tensor;
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// How the file may store a tensor of ours.
struct Candidate {
    name: String,
    /// Kernels of flax are `(kh, kw, in, out)`.
    flax: bool,
}

impl Candidate {
    fn new(name: String) -> Self {
        Self { name, flax: false }
    }
}

/// The tensors `wanted` (by name and shape), each under the first of its `candidates` that the file holds.
fn take(
    file: &CheckpointFile,
    source: &Path,
    wanted: &Params,
    candidates: impl Fn(&str) -> Vec<Candidate>,
) -> Result<HashMap<String, Tensor>> {
    let (mut tensors, mut missing) = (HashMap::new(), Vec::new());
    for (name, var) in wanted {
        let Some(found) = candidates(name).into_iter().find(|candidate| file.shape(&candidate.name).is_some()) else {
            missing.push(name.as_str());
            continue;
        };
        let mut tensor = file.tensor(&found.name)?;
        if found.flax {
            tensor = tensor.permute((3, 2, 0, 1))?.contiguous()?;
        }
        if tensor.shape() != var.shape() {
            bail!("{}: `{}` has shape {:?}, expected {:?}", source.display(), found.name, tensor.dims(), var.dims());
        }
        tensors.insert(name.clone(), tensor);
    }
    if let Some(first) = missing.first() {
        let held = file.names().next().map_or("nothing".to_owned(), |name| format!("`{name}`, .."));
        let what = format!("{} lacks {} of {} tensors, `{first}` first", source.display(), missing.len(), wanted.len());
        return Err(failed(what, format!("it holds {held}: is it of this kind?")));
    }
    Ok(tensors)
}

/// Writes a folder with one file of weights; an older one of this program is replaced, with `force` any folder.
fn write_network(folder: &Path, file: &str, tensors: &HashMap<String, Tensor>, force: bool) -> Result<()> {
    let values = tensors.iter().map(|(name, tensor)| Ok((name.clone(), weights::of_tensor(tensor)?)));
    let values = values.collect::<Result<BTreeMap<_, _>>>()?;
    publish::folder(folder, force, |new| write_weights(&new.join(file), &values))
}
