//! InceptionV3 as pytorch-fid and torchvision publish it, for the FID.

use super::write_network;
use crate::{
    error::{Hint, Result},
    eval::fid::{INCEPTION_FILE, Inception},
    nn::checkpoint_file::CheckpointFile,
};
use candle_core::Device;
use std::{collections::HashMap, path::Path};

/// Writes the network to `folder`, with its classifier but without the bias and the auxiliary classifier.
///
/// # Errors
/// A tensor is missing or misshapen, or the folder holds something else.
pub fn inception(source: &Path, folder: &Path, force: bool) -> Result<()> {
    let file = CheckpointFile::open(source)?;
    let used = |name: &&str| *name != "fc.bias" && !name.starts_with("AuxLogits.");
    let tensors = file.names().filter(used).map(|name| Ok((name.to_owned(), file.tensor(name)?)));
    let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
    let hint = "pytorch-fid publishes it as pt_inception-2015-12-05-*.pth, torchvision as inception_v3_google-*.pth";
    Inception::from_tensors(tensors.clone(), &Device::Cpu)
        .hint(format!("{} is not an InceptionV3 of pytorch-fid or torchvision", source.display()), hint)?;
    write_network(folder, INCEPTION_FILE, &tensors, force)
}
