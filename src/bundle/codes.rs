//! Which codes an image tokenizer makes: shards of codes and generators belong to one such fingerprint.
//!
//! Only what makes codes counts: encoder, `quant_conv` and codebook with the settings that their shapes do not show. A
//! fine-tuned decoder keeps the fingerprint, and so does an export in another precision: `manifest.json` carries it on.

use super::Bundle;
use crate::{
    config::{self, QuantizerKind},
    error::Result,
    nn::weights,
    tokenizer,
};
use safetensors::Dtype;
use std::io::Write;

/// Keys of an image tokenizer that the digest of earlier versions leaves out.
const TRAINING_KEYS: &[&str] = &[
    "codebook_decay",
    "entropy_weight",
    "kl_weight",
    "temperature",
    "temperature_steps",
    "kl_steps",
    "perceptual",
    "perceptual_weight",
    "perceptual_start",
    "adversarial_weight",
    "adversarial_start",
    "adversarial_loss",
    "discriminator_channels",
    "discriminator_layers",
    "discriminator_ceiling",
    "lecam_weight",
    "channel_permutation",
];

/// The settings beside weights and their shapes that say what codes are, as text.
pub(super) fn settings(tokenizer: &config::ImageTokenizer) -> Result<String> {
    let quantizer = (tokenizer.quantizer, &tokenizer.fsq_levels, tokenizer.l2_normalize);
    Ok(serde_json::to_string(&(tokenizer.architecture, tokenizer.image_size, &tokenizer.attention_sides, quantizer))?)
}

/// The fingerprint of the codes that an image tokenizer with these settings and this file of weights makes: blake3 of
/// [`settings`] and, in the order of their names, of name, shape and f32 values of each tensor that makes codes.
///
/// # Errors
/// `bytes` are not a sound safetensors file.
pub(super) fn fingerprint(tokenizer: &config::ImageTokenizer, bytes: &[u8], origin: &str) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    write!(hasher, "vilg codes 1\n{}\n", settings(tokenizer)?)?;
    for (name, values) in weights::stored(bytes, origin, Dtype::F32)? {
        if tokenizer::makes_codes(&name) {
            writeln!(hasher, "{name} {:?}", values.shape)?;
            values.write(&mut hasher)?;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

impl Bundle {
    /// The fingerprint of the image tokenizer's codes: as the manifest says, otherwise computed from the weights.
    pub fn digest(&self) -> Result<String> {
        let folder = self.image_tokenizer_folder()?;
        match &folder.manifest {
            Some(manifest) => Ok(manifest.codes.clone()),
            None => folder.computed_codes(),
        }
    }

    /// Digest of the bytes of the file of weights.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn weights_digest(&self) -> Result<String> {
        Ok(blake3::hash(&self.place.weights()?).to_hex().to_string())
    }

    /// Whether `digest` stands for the codes of this image tokenizer; digests that earlier versions wrote do, too.
    pub fn makes_codes_of(&self, digest: &str) -> Result<bool> {
        let folder = self.image_tokenizer_folder()?;
        Ok(folder.digest()? == digest || folder.computed_codes()? == digest || folder.early_digest()? == digest)
    }

    fn computed_codes(&self) -> Result<String> {
        fingerprint(&self.config.image_tokenizer, &self.place.weights()?, &self.place.file(super::WEIGHTS))
    }

    /// The digest of earlier versions: of the settings and of all bytes of the weights.
    fn early_digest(&self) -> Result<String> {
        let settings = config::ImageTokenizer { path: String::new(), ..self.config.image_tokenizer.clone() };
        let mut settings = toml::Table::try_from(settings)?;
        settings.retain(|key, _| !TRAINING_KEYS.contains(&key));
        if self.config.image_tokenizer.quantizer == QuantizerKind::Nearest {
            settings.retain(|key, _| key != "quantizer" && key != "fsq_levels" && key != "architecture");
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(toml::to_string(&settings)?.as_bytes());
        hasher.update(&self.place.weights()?);
        Ok(hasher.finalize().to_hex().to_string())
    }
}
