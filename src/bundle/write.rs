//! Writing a model folder.

use super::{ATTRIBUTION, Bundle, CONFIG, IMAGE_TOKENIZER, VOCAB, WEIGHTS};
use crate::{
    config::{Config, Source},
    error::{Context, Result, ensure, usage},
    nn::weights::{self, Values},
};
use safetensors::Dtype;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// What a model folder is made of.
pub struct Parts<'a> {
    pub config: &'a Config,
    pub weights: BTreeMap<String, Values<'a>>,
    pub vocab: Option<String>,
    pub attribution: String,
    pub image_tokenizer: Option<Bundle>,
}

/// Writes a model folder; an older one in its place is replaced when the new one is complete.
pub fn write(folder: &Path, parts: &Parts, dtype: Dtype) -> Result<()> {
    replace_folder(folder, WEIGHTS, |new| write_parts(new, parts, dtype))
}

/// Has `write` fill a new folder, which then takes the place of an older one with the file `mark`.
pub(super) fn replace_folder(folder: &Path, mark: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let ours = !folder.exists() || folder.join(mark).exists() || fs::read_dir(folder)?.next().is_none();
    let hint = "name a new folder";
    ensure!(ours, usage(format_args!("{} exists and is not a model folder", folder.display()), hint));
    let (new, old) = (sibling(folder, ".new"), sibling(folder, ".old"));
    for stale in [&new, &old] {
        if stale.exists() {
            fs::remove_dir_all(stale)?;
        }
    }
    fs::create_dir_all(&new)
        .map_err(Into::into)
        .and_then(|()| write(&new))
        .with_context(|| format!("cannot write the model folder {}", folder.display()))?;
    if folder.exists() {
        fs::rename(folder, &old)?;
    }
    fs::rename(&new, folder)?;
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    Ok(())
}

/// Writes a file of weights.
pub(super) fn write_weights(path: &Path, values: &BTreeMap<String, Values>) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    weights::write(&mut out, values)?;
    Ok(out.flush()?)
}

pub(super) fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn write_parts(folder: &Path, parts: &Parts, dtype: Dtype) -> Result<()> {
    // Paths of the training machine mean nothing elsewhere.
    let mut config = parts.config.clone();
    config.data.sources.clear();
    config.train.init_from.clear();
    config.image_tokenizer.perceptual.clear();
    config.text.vocab = parts.vocab.as_ref().map_or(String::new(), |_| VOCAB.into());
    config.image_tokenizer.path = parts.image_tokenizer.as_ref().map_or(String::new(), |_| IMAGE_TOKENIZER.into());
    fs::write(folder.join(CONFIG), config.to_toml()?)?;
    write_weights(&folder.join(WEIGHTS), &parts.weights)?;
    if let Some(vocab) = &parts.vocab {
        fs::write(folder.join(VOCAB), vocab)?;
    }
    if !parts.attribution.is_empty() {
        fs::write(folder.join(ATTRIBUTION), &parts.attribution)?;
    }
    if let Some(tokenizer) = &parts.image_tokenizer {
        tokenizer.export(&folder.join(IMAGE_TOKENIZER), dtype, None)?;
    }
    Ok(())
}

/// The `ATTRIBUTION.md` files that lie in the folders of `sources` or up to two above, joined.
pub fn attribution_of(sources: &[Source]) -> String {
    let mut texts = Vec::new();
    for source in sources {
        let mut folders = Path::new(&source.path).ancestors().filter(|folder| folder.is_dir()).take(3);
        let text = folders.find_map(|folder| fs::read_to_string(folder.join(ATTRIBUTION)).ok());
        texts.extend(text.filter(|text| !texts.contains(text)));
    }
    texts.join("\n")
}
