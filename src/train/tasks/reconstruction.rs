//! What end-to-end training needs beside a generator's samples and weights: images, and a reconstructor to start from.

use crate::{
    bundle::Bundle,
    config::{self, Config, ReconstructorInit},
    data::{self, Kind},
    error::{Context, Result, ensure, failed},
    model::end_to_end::RECONSTRUCTOR,
    nn::params::Params,
    train::data_loader::DataLoader,
};

/// Shards of codes with their images, or images that are encoded when they are read.
pub fn sample_kind(config: &Config, tokenizer: &config::ImageTokenizer) -> Kind {
    let side = u32::try_from(tokenizer.image_size).unwrap_or(u32::MAX);
    match config.data.sources.iter().all(|source| data::are_codes(&source.path, &config.data)) {
        true => Kind::CodesAndImages(side),
        false => Kind::Pairs(side),
    }
}

/// Checks that shards of codes hold images too, by their first samples.
pub fn check_images(data_loader: &DataLoader, kind: Kind) -> Result<()> {
    if !kind.has_codes() {
        return Ok(());
    }
    let dataset = data_loader.dataset();
    for (i, source) in dataset.sources.iter().enumerate() {
        let without = matches!(dataset.read(i, 0), Err(bad) if bad.cause == data::Cause::NoImage);
        let what = format!("the shards of codes in {} hold no images", source.path);
        ensure!(!without, failed(what, "encode them again with `vilg data encode --keep-images`"));
    }
    Ok(())
}

/// Whether a parameter begins with the value that it has in the image tokenizer.
pub fn starts_from_tokenizer(config: &Config, name: &str) -> bool {
    config.end_to_end.reconstructor_init == ReconstructorInit::Tokenizer && config::begins_with(name, RECONSTRUCTOR)
}

/// Sets the reconstructor to the image tokenizer's decoder, if it is to start from that.
pub fn start_reconstructor(config: &Config, params: &Params, image_tokenizer: &Bundle) -> Result<()> {
    let weights = image_tokenizer.weights()?;
    for (name, var) in params.iter().filter(|(name, _)| starts_from_tokenizer(config, name)) {
        let theirs = name.strip_prefix(RECONSTRUCTOR).and_then(|rest| rest.strip_prefix('.')).unwrap_or_default();
        let weight = weights.get(theirs).with_context(|| format!("the image tokenizer lacks `{theirs}`"))?;
        var.set(&weight.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}
