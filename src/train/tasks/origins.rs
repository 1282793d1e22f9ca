//! What a generator's weights belong to: a vocabulary, an image tokenizer and, for low-rank adapters, a base model.

use super::{Fingerprint, vocabulary};
use crate::{
    bundle::Bundle,
    config::{Config, Task},
    error::{Context, Result},
    text::WordPiece,
};

/// The name of the image tokenizer among the digests.
pub const IMAGE_TOKENIZER: &str = "image tokenizer";
/// The name of the model that adapters are trained for among the digests.
pub const BASE: &str = "base model";

/// Digests of what a generator's weights belong to: its vocabulary and its image tokenizer.
///
/// # Errors
/// A file of the image tokenizer cannot be read.
pub fn fingerprint(text: &WordPiece, image_tokenizer: &Bundle) -> Result<Fingerprint> {
    let vocabulary = (vocabulary::NAME.into(), vocabulary::digest(text));
    Ok(Fingerprint::from([vocabulary, (IMAGE_TOKENIZER.into(), image_tokenizer.digest()?)]))
}

/// The model folder of the image tokenizer `image_tokenizer.path`.
///
/// # Errors
/// There is no such folder, or it holds another kind of model.
pub fn open_image_tokenizer(path: &str) -> Result<Bundle> {
    let bundle = match path {
        "demo" => Bundle::open(path)?.image_tokenizer_folder()?,
        _ => Bundle::open(path).context("image_tokenizer.path")?,
    };
    bundle.expect(Task::ImageTokenizer).context("image_tokenizer.path")?;
    Ok(bundle)
}

/// The model that low-rank adapters belong to.
#[derive(Clone)]
pub struct Base {
    pub name: String,
    pub digest: String,
}

impl Base {
    /// Of the model in `train.init_from`, if the configuration trains adapters.
    ///
    /// # Errors
    /// There is no such model.
    pub fn of(config: &Config) -> Result<Option<Self>> {
        if !config.lora.is_on() {
            return Ok(None);
        }
        let model = Bundle::open(&config.train.init_from).context("train.init_from")?;
        Ok(Some(Self { digest: model.base_digest()?, name: model.config.name }))
    }
}
