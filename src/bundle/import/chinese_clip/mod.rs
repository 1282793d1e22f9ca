//! Chinese-CLIP (arXiv 2211.01335): OFA-Sys's checkpoints, and Hugging Face folders of `ChineseCLIPModel`.

pub(in crate::bundle) mod layout;
mod sizes;
#[cfg(test)]
mod tests;

use crate::{
    bundle::{Parts, write::write_as},
    config::{Config, Precision, Task, Text},
    error::{Context, Hint, Result, bail, ensure, failed, hint_if_none, usage},
    model::Matcher,
    nn::{
        checkpoint_file::CheckpointFile,
        params::{Params, Scope},
        weights::{self, Values},
    },
    text::WordPiece,
};
use candle_core::Device;
use layout::{Form, Layout};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Text positions of all published models.
const MAX_TOKENS: usize = 52;
const VOCAB: &str = "vocab.txt";
const HINT: &str = "SRC is a checkpoint of OFA-Sys (clip_cn_*.pt), or a Hugging Face folder of a ChineseCLIPModel";

/// Writes the model folder of a matcher. `vocab`: its vocabulary, if it is not the `vocab.txt` in the folder or beside the
/// file.
///
/// # Errors
/// There is no vocabulary or one of another size; a tensor is missing, left over or misshapen.
pub fn chinese_clip(source: &Path, vocab: Option<&Path>, folder: &Path, force: bool) -> Result<()> {
    let (path, beside) = located(source);
    let text = vocabulary(source, vocab, &beside)?;
    let file = CheckpointFile::open(&path)?;
    let layout = layout_of(&file).hint(format!("{} is not a Chinese-CLIP", path.display()), HINT)?;
    let config = Some(beside.join("config.json")).filter(|path| path.exists());
    let (matcher, vocab_size) = sizes::sizes(&file, layout, config.as_deref())
        .hint(format!("{} is not a Chinese-CLIP that can be imported", path.display()), HINT)?;
    let hint = "take the vocabulary that was published with these weights";
    let what = format!("the vocabulary has {} tokens, but {} has {vocab_size}", text.vocab_size(), path.display());
    ensure!(text.vocab_size() == vocab_size, failed(what, hint));

    let max_tokens = MAX_TOKENS.min(matcher.text_positions);
    let name = folder.file_name().map_or("chinese-clip".to_owned(), |name| name.to_string_lossy().into_owned());
    let text_section = Text { max_tokens, vocab: VOCAB.to_owned(), ..Text::default() };
    let config = Config { name, task: Task::Matcher, text: text_section, matcher, ..Config::default() };
    config.validate().with_context(|| format!("{}: its sizes", path.display()))?;
    let scope = Scope::empty_from_seed(0, &Device::Cpu);
    Matcher::new(&scope, &config.matcher, (vocab_size, max_tokens), Precision::F32)?;
    let weights = take(&file, &path, layout, &scope.params())?;
    let attribution = format!(
        "# Attribution\n\nWeights of Chinese-CLIP (arXiv 2211.01335), imported from `{}`.\nThe code of Chinese-CLIP is \
         under the MIT licence. For the licence of the weights, see where they were published.\n",
        source.file_name().unwrap_or(source.as_os_str()).to_string_lossy()
    );
    let vocab = Some(text.vocab_text());
    let parts = Parts { config: &config, weights, vocab, attribution, image_tokenizer: None };
    write_as(folder, &parts, Dtype::F32, None, force)
}

/// The file of weights, or the folder whose files are all read; and the folder in which the other files are looked for.
fn located(source: &Path) -> (PathBuf, PathBuf) {
    if !source.is_dir() {
        return (source.to_owned(), source.parent().map(Path::to_owned).unwrap_or_default());
    }
    // Hugging Face folders may have the same weights in several formats.
    let files = ["model.safetensors", "pytorch_model.bin"].map(|name| source.join(name));
    let file = files.into_iter().find(|path| path.exists());
    (file.unwrap_or_else(|| source.to_owned()), source.to_owned())
}

fn vocabulary(source: &Path, named: Option<&Path>, beside: &Path) -> Result<WordPiece> {
    let found = beside.join(VOCAB);
    let what = format!("there is no vocabulary for {}", source.display());
    let hint = format!(
        "name it with --vocab FILE, or copy it to {}: it is the vocab.txt of the Hugging Face folder, and \
         cn_clip/clip/vocab.txt in the Python package cn_clip",
        found.display()
    );
    ensure!(named.is_some() || found.exists(), usage(what, hint));
    WordPiece::load(named.unwrap_or(&found))
}

fn layout_of(file: &CheckpointFile) -> Result<Layout> {
    let layouts = [Layout::OfaSys, Layout::HuggingFace];
    let first = |layout: Layout| layout.forms("image.patch").iter().flat_map(Form::names).next().cloned();
    for layout in layouts {
        if first(layout).is_some_and(|name| file.shape(&name).is_some()) {
            return Ok(layout);
        }
    }
    bail!("it has neither `{}` nor `{}`", first(layouts[0]).unwrap_or_default(), first(layouts[1]).unwrap_or_default())
}

/// The tensors `wanted`, from any of their forms. Nothing may be left over but BERT's pooler, which is not used.
fn take(
    file: &CheckpointFile,
    path: &Path,
    layout: Layout,
    wanted: &Params,
) -> Result<BTreeMap<String, Values<'static>>> {
    let (mut tensors, mut missing, mut known) = (BTreeMap::new(), Vec::new(), BTreeSet::new());
    let mut forms = BTreeMap::new();
    for ours in wanted.keys() {
        let mut candidates = layout.forms(ours);
        match candidates.iter().position(|form| form.is_in(file)) {
            Some(found) => {
                let form = candidates.swap_remove(found);
                known.extend(form.names().to_vec());
                forms.insert(ours, form);
            }
            None => {
                let lacks = |name: &&String| file.shape(name).is_none();
                let first = candidates.first().and_then(|form| form.names().iter().find(lacks)).cloned();
                missing.push(first.unwrap_or_default());
            }
        }
    }
    if let Some(first) = missing.first() {
        let what = format!("{} lacks {} of {} tensors, `{first}` first", path.display(), missing.len(), wanted.len());
        return Err(failed(what, HINT));
    }
    let pooler = format!("{}.pooler.", layout.text_prefix());
    let left = file.names().find(|name| !known.contains(*name) && !name.starts_with(&pooler));
    let what = || format!("{} holds `{}`", path.display(), left.unwrap_or_default());
    ensure!(left.is_none(), failed(what(), "a Chinese-CLIP of these sizes has no such tensor"));
    for (ours, form) in forms {
        let tensor = hint_if_none(form.read(file), path.display(), HINT)?;
        let shape = wanted[ours].shape();
        // A scalar in the file is a row of one number here.
        let tensor = if tensor.elem_count() == 1 && shape.elem_count() == 1 { tensor.reshape(shape)? } else { tensor };
        if tensor.shape() != shape {
            let theirs = form.names().join("`, `");
            let what =
                format!("{}: `{theirs}` gives the shape {:?}, expected {shape:?}", path.display(), tensor.dims());
            return Err(failed(what, HINT));
        }
        tensors.insert(ours.clone(), weights::of_tensor(&tensor)?);
    }
    Ok(tensors)
}
