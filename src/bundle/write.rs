//! Writing a model folder.

use super::{
    ATTRIBUTION, Bundle, CONFIG, Changes, IMAGE_TOKENIZER, MANIFEST, VOCAB, WEIGHTS, codes, manifest::Manifest, publish,
};
use crate::{
    bounded_read,
    config::{Config, Source, Task},
    error::{Context, Result},
    nn::weights::{self, Values},
};
use safetensors::Dtype;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// What a model folder is made of.
pub struct Parts<'a> {
    pub config: &'a Config,
    pub weights: BTreeMap<String, Values<'a>>,
    /// The text of `vocab.txt`, for a generator or a matcher.
    pub vocab: Option<String>,
    pub attribution: String,
    pub image_tokenizer: Option<Bundle>,
}

/// Writes a model folder with its manifest. An older model folder in its place is replaced when the new one is complete.
///
/// # Errors
/// There is something else in its place, or it cannot be written.
pub fn write(folder: &Path, parts: &Parts, dtype: Dtype) -> Result<()> {
    write_as(folder, parts, dtype, None, false)
}

/// The same for a generator whose image tokenizer was trained with it and consists of the parts `tokenizer`.
///
/// # Errors
/// As [`write()`].
pub fn write_with_tokenizer(folder: &Path, parts: &Parts, tokenizer: &Parts, dtype: Dtype) -> Result<()> {
    publish::folder(folder, false, |new| {
        let inside = new.join(IMAGE_TOKENIZER);
        write(&inside, tokenizer, dtype)?;
        let weights = weights::map(&inside.join(WEIGHTS))?;
        let codes = codes::fingerprint(&tokenizer.config.image_tokenizer, &weights, WEIGHTS)?;
        write_around(new, parts, Some(codes))
    })
}

/// The same, where the image tokenizer's codes have the fingerprint `codes`, otherwise computed from its weights; with
/// `force` any folder is replaced.
pub(super) fn write_as(folder: &Path, parts: &Parts, dtype: Dtype, codes: Option<String>, force: bool) -> Result<()> {
    publish::folder(folder, force, |new| write_parts(new, parts, dtype, codes))
}

/// Writes a file of weights.
pub(super) fn write_weights(path: &Path, values: &BTreeMap<String, Values>) -> Result<()> {
    write_weights_to(File::create(path)?, values)
}

/// Writes weights to an open file.
pub(super) fn write_weights_to(file: File, values: &BTreeMap<String, Values>) -> Result<()> {
    let mut out = BufWriter::new(file);
    weights::write(&mut out, values)?;
    Ok(out.flush()?)
}

fn write_parts(folder: &Path, parts: &Parts, dtype: Dtype, codes: Option<String>) -> Result<()> {
    let Some(tokenizer) = &parts.image_tokenizer else { return write_around(folder, parts, codes) };
    tokenizer.export(&folder.join(IMAGE_TOKENIZER), dtype, &Changes::default(), false)?;
    write_around(folder, parts, Some(codes.map_or_else(|| tokenizer.digest(), Ok)?))
}

/// Writes all but the image tokenizer's folder. `codes` is the fingerprint of its codes, if it is not computed from the
/// weights of `parts`.
fn write_around(folder: &Path, parts: &Parts, codes: Option<String>) -> Result<()> {
    // Paths of the training machine mean nothing elsewhere.
    let mut config = parts.config.clone();
    config.data.sources.clear();
    config.train.init_from.clear();
    config.image_tokenizer.perceptual.clear();
    config.text.vocab = parts.vocab.as_ref().map_or(String::new(), |_| VOCAB.into());
    config.image_tokenizer.path = parts.image_tokenizer.as_ref().map_or(String::new(), |_| IMAGE_TOKENIZER.into());
    let toml = config.to_toml()?;
    fs::write(folder.join(CONFIG), &toml)?;
    write_weights(&folder.join(WEIGHTS), &parts.weights)?;
    if let Some(vocab) = &parts.vocab {
        fs::write(folder.join(VOCAB), vocab)?;
    }
    if !parts.attribution.is_empty() {
        fs::write(folder.join(ATTRIBUTION), &parts.attribution)?;
    }
    let written = weights::map(&folder.join(WEIGHTS))?;
    let codes = match (codes, config.task) {
        (Some(codes), _) => codes,
        (None, Task::ImageTokenizer) => codes::fingerprint(&config.image_tokenizer, &written, WEIGHTS)?,
        (None, Task::Generator | Task::EndToEnd | Task::Matcher) => String::new(),
    };
    let mut files = vec![(CONFIG, toml.as_bytes()), (WEIGHTS, &written[..])];
    files.extend(parts.vocab.as_ref().map(|vocab| (VOCAB, vocab.as_bytes())));
    fs::write(folder.join(MANIFEST), serde_json::to_vec_pretty(&Manifest::new(files, codes))?)
        .with_context(|| format!("cannot write {MANIFEST}"))
}

/// The `ATTRIBUTION.md` files in the folders of `sources`, or up to two folders above, joined.
pub fn attribution_of(sources: &[Source]) -> String {
    let mut texts = Vec::new();
    for source in sources {
        let mut folders = Path::new(&source.path).ancestors().filter(|folder| folder.is_dir()).take(3);
        let text =
            folders.find_map(|folder| bounded_read::read_text(&folder.join(ATTRIBUTION), bounded_read::TEXT).ok());
        texts.extend(text.filter(|text| !texts.contains(text)));
    }
    texts.join("\n")
}
