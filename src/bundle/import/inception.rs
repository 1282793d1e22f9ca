//! InceptionV3 as pytorch-fid publishes it, for the FID.

use super::write_network;
use crate::{
    error::{Hint, Result},
    eval::inception::{self, Inception},
    nn::{checkpoint_file::CheckpointFile, params::Scope},
};
use candle_core::{DType, Device};
use std::{collections::HashMap, path::Path};

/// Writes the network to `folder`. Its classifier is left out.
///
/// # Errors
/// A tensor is missing or misshapen, or the folder holds something else.
pub fn inception(source: &Path, folder: &Path, force: bool) -> Result<()> {
    let file = CheckpointFile::open(source)?;
    let features = |name: &&str| !name.starts_with("fc.") && !name.starts_with("AuxLogits.");
    let tensors = file.names().filter(features).map(|name| Ok((name.to_owned(), file.tensor(name)?)));
    let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
    let scope = Scope::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
    let built = Inception::new(&scope).and_then(|_| scope.finish());
    let hint = "pytorch-fid publishes it as pt_inception-2015-12-05-*.pth";
    built.hint(format!("{} is not pytorch-fid's InceptionV3", source.display()), hint)?;
    write_network(folder, inception::FILE, &tensors, force)
}
