//! The folder of a measurement that goes on after an interruption: it belongs to one set of settings.

use crate::{
    bounded_read,
    data::output::write_whole,
    error::{Context, Hint, Result, ensure, failed, plain},
    nn::weights::{self, Values},
};
use candle_core::Tensor;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    path::Path,
};

/// Maximum size of the settings in bytes.
const MAX_SETTINGS: u64 = 1 << 20;

/// Stores the settings as `name` in `folder`, which is made if needed, or checks that those stored there are the same.
///
/// # Errors
/// The folder cannot be written, or belongs to a measurement with other settings.
pub(super) fn begin<T: Serialize + DeserializeOwned + PartialEq>(
    folder: &Path,
    name: &str,
    settings: &T,
) -> Result<()> {
    let cannot = || format!("cannot write to {}", folder.display());
    fs::create_dir_all(folder).hint(cannot(), "choose another folder with -o")?;
    let (file, hint) = (folder.join(name), "delete the folder, or choose another one with -o");
    if file.exists() {
        let damaged = || format!("{} is damaged", file.display());
        let bytes = bounded_read::read(&file, MAX_SETTINGS).hint(damaged(), hint)?;
        let there: T = serde_json::from_slice(&bytes).map_err(plain).hint(damaged(), hint)?;
        let what = format!("{} holds another measurement", folder.display());
        ensure!(there == *settings, failed(what, hint));
        return Ok(());
    }
    let bytes = serde_json::to_vec_pretty(settings)?;
    write_whole(&file, |out| Ok(out.write_all(&bytes).map(|()| true)?)).with_context(cannot)
}

/// Stores the tensors of a finished part of the measurement, all or none.
///
/// # Errors
/// The file cannot be written.
pub(super) fn write_part(file: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let values = tensors.iter().map(|(name, tensor)| Ok((name.clone(), weights::of_tensor(tensor)?)));
    let values: BTreeMap<String, Values> = values.collect::<Result<_>>()?;
    write_whole(file, |out| weights::write(out, &values).map(|()| true))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The tensors of a finished part.
///
/// # Errors
/// The file is missing or damaged, or lacks one of `names`.
pub(super) fn read_part(file: &Path, names: &[&str]) -> Result<HashMap<String, Tensor>> {
    let (shown, hint) = (file.display(), "delete the file and run the same command again");
    let bytes = fs::read(file).hint(format_args!("cannot read {shown}"), hint)?;
    let stored = weights::parse(&bytes, &shown.to_string())?;
    for name in names {
        ensure!(stored.contains_key(*name), failed(format_args!("{shown} has no `{name}`"), hint));
    }
    Ok(stored)
}
