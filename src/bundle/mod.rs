//! A model is a folder: config.toml, model.safetensors, vocab.txt, ATTRIBUTION.md, manifest.json and, for a generator,
//! the folder of its image tokenizer. The demo model is such a folder inside the program.

use crate::{
    bounded_read,
    config::{Config, Precision, Task},
    error::{Context, Hint, Result, ensure, usage},
    model::{Generator, Matcher},
    nn::{params::Scope, weights},
    runtime::{self, Mapped},
    text::WordPiece,
    tokenizer,
};
use candle_core::{DType, Tensor};
use std::{
    borrow::Cow,
    collections::HashMap,
    ops::Deref,
    path::{Path, PathBuf},
};

mod adapter;
mod calibrate;
mod changes;
mod codes;
mod export;
mod export_chinese_clip;
pub mod import;
mod manifest;
mod publish;
#[cfg(test)]
mod tests;
mod write;

pub use adapter::{ADAPTER, write_adapter};
#[cfg(test)]
pub(crate) use calibrate::tests::model as tiny_matcher;
pub use changes::Changes;
use manifest::Manifest;
pub use manifest::{allow_mismatch, tolerate};
pub use write::{Parts, attribution_of, write, write_with_tokenizer};

const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "model.safetensors";
const VOCAB: &str = "vocab.txt";
const ATTRIBUTION: &str = "ATTRIBUTION.md";
const MANIFEST: &str = "manifest.json";
const IMAGE_TOKENIZER: &str = "image-tokenizer";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_BASE: &str = "base.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

macro_rules! demo {
    ($($path:literal),* $(,)?) => { &[$(($path, include_bytes!(concat!("../demo/", $path)))),*] };
}

/// The files of the demo model by path in its folder.
static DEMO: &[(&str, &[u8])] = demo![
    "config.toml",
    "model.safetensors",
    "vocab.txt",
    "ATTRIBUTION.md",
    "image-tokenizer/config.toml",
    "image-tokenizer/model.safetensors",
    "image-tokenizer/ATTRIBUTION.md",
    "matcher/config.toml",
    "matcher/model.safetensors",
    "matcher/vocab.txt",
    "matcher/ATTRIBUTION.md",
];

/// The name of the demo model.
pub const DEMO_NAME: &str = "demo";

const COPY: &str = "copy the whole folder again; a model folder is what `vilg train` writes to runs/NAME/model";

#[derive(Debug, Clone)]
enum Place {
    Folder(PathBuf),
    /// Below this prefix of the demo model's paths.
    Demo(&'static str),
}

/// An opened model folder; its parts are read when they are asked for.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The configuration it was trained with.
    pub config: Config,
    place: Place,
    /// What its parts must be like; `None` where nothing says so, or where they are not and that was allowed.
    manifest: Option<Manifest>,
    /// Merged into its weights.
    adapter: Option<adapter::Adapter>,
}

impl Bundle {
    /// Opens the model folder `model`, the model of the training run in the folder `model`, or the demo model by its
    /// name.
    ///
    /// # Errors
    /// There is no such folder, it is not a model folder, or its parts do not belong together.
    pub fn open(model: &str) -> Result<Self> {
        if model != DEMO_NAME {
            return Self::at(Place::Folder(model_folder(model.into())?));
        }
        Self::at(Place::Demo(""))
    }

    fn at(place: Place) -> Result<Self> {
        if let Place::Folder(folder) = &place {
            let hint = format!("name a folder like runs/NAME/model, or `{DEMO_NAME}`");
            ensure!(folder.is_dir(), usage(format_args!("there is no model folder {}", folder.display()), hint));
        }
        let name = place.file(CONFIG);
        let text =
            String::from_utf8(place.read(CONFIG)?.into_owned()).with_context(|| format!("{name} is not text"))?;
        let config = Config::parse(&text, &name)?;
        config.validate().with_context(|| name)?;
        let mut bundle = Self { config, place, manifest: None, adapter: None };
        if let Some(manifest) = bundle.place.manifest()? {
            bundle.manifest = manifest::accept(bundle.check(&manifest))?.then_some(manifest);
        }
        Ok(bundle)
    }

    /// Checks the parts of the folder against its manifest. What is missing is named when it is asked for.
    fn check(&self, manifest: &Manifest) -> Result<()> {
        let Place::Folder(folder) = &self.place else { return Ok(()) };
        for file in manifest.files().filter(|file| folder.join(file).exists()) {
            let (weights, text);
            let bytes: &[u8] = if file == WEIGHTS {
                weights = self.place.weights()?;
                &weights
            } else {
                text = self.place.read(file)?;
                &text
            };
            manifest.check(file, bytes, &self.place.file(file))?;
        }
        if self.config.task.is_generator() && !manifest.codes.is_empty() {
            let tokenizer = self.image_tokenizer_folder()?;
            let what = format!("{} makes other codes than the generator was trained with", tokenizer.place.name());
            ensure!(tokenizer.makes_codes_of(&manifest.codes)?, manifest::mismatch(what));
        }
        Ok(())
    }

    /// The folder's name in messages.
    pub fn name(&self) -> String {
        self.place.name()
    }

    /// The image tokenizer's folder: this one, or the one inside a generator's.
    ///
    /// # Errors
    /// It is missing, or this is another kind of model.
    pub fn image_tokenizer_folder(&self) -> Result<Self> {
        match (self.config.task, &self.place) {
            (Task::Generator | Task::EndToEnd, Place::Folder(folder)) => {
                Self::at(Place::Folder(folder.join(IMAGE_TOKENIZER)))
            }
            (Task::Generator | Task::EndToEnd, Place::Demo(_)) => Self::at(Place::Demo("image-tokenizer/")),
            (Task::ImageTokenizer | Task::Matcher, _) => {
                self.expect(Task::ImageTokenizer)?;
                Ok(self.clone())
            }
        }
    }

    /// The image tokenizer.
    pub fn image_tokenizer(&self) -> Result<tokenizer::ImageTokenizer> {
        let folder = self.image_tokenizer_folder()?;
        let settings = &folder.config.image_tokenizer;
        folder.build(|scope| tokenizer::ImageTokenizer::new(scope, settings))
    }

    /// Checks what kind of model this is. An end-to-end generator is a generator too.
    ///
    /// # Errors
    /// It is of another task.
    pub fn expect(&self, task: Task) -> Result<()> {
        let what = format!("{} is {}, not {}", self.place.name(), self.config.task.model(), task.model());
        ensure!(self.config.task.serves_as(task), usage(what, task.hint()));
        Ok(())
    }

    /// The transformer.
    pub fn generator(&self) -> Result<Generator> {
        self.expect(Task::Generator)?;
        let (codebook, grid) = (self.config.image_tokenizer.codebook_size, self.config.image_tokenizer.grid());
        let vocab_size = self.text()?.vocab_size();
        self.build(|scope| Generator::new(scope, &self.config, vocab_size, codebook, grid))
    }

    /// The matcher's folder: this one, or the one inside the demo model.
    ///
    /// # Errors
    /// This is another kind of model.
    pub fn matcher_folder(&self) -> Result<Self> {
        match (self.config.task, &self.place) {
            (Task::Generator, Place::Demo(_)) => Self::at(Place::Demo("matcher/")),
            _ => {
                self.expect(Task::Matcher)?;
                Ok(self.clone())
            }
        }
    }

    /// The image–text matcher.
    pub fn matcher(&self) -> Result<Matcher> {
        self.expect(Task::Matcher)?;
        let text = (self.text()?.vocab_size(), self.config.text.max_tokens);
        self.build(|scope| Matcher::new(scope, &self.config.matcher, text, Precision::F32))
    }

    fn build<T>(&self, make: impl FnOnce(&Scope) -> Result<T>) -> Result<T> {
        let name = self.place.file(WEIGHTS);
        let scope = Scope::from_tensors(self.weights()?, DType::F32, &runtime::device()?);
        let hint = "the files of the folder are of different models; copy the whole folder again";
        let built = make(&scope).and_then(|built| scope.finish().map(|()| built));
        built.hint(format_args!("{name} does not fit the config.toml and vocab.txt beside it"), hint)
    }

    /// All weights by name, as f32, with the adapter merged into them.
    pub fn weights(&self) -> Result<HashMap<String, Tensor>> {
        let mut weights = weights::parse(&self.place.weights()?, &self.place.file(WEIGHTS))?;
        self.adapt(&mut weights)?;
        Ok(weights)
    }

    /// The text side.
    pub fn text(&self) -> Result<WordPiece> {
        let hint = "a vocabulary has one token a line; copy the whole folder again";
        let text =
            WordPiece::parse(&self.vocab()?).hint(format_args!("cannot use {}", self.place.file(VOCAB)), hint)?;
        Ok(text.with_normalization(self.config.text.normalize))
    }

    fn vocab(&self) -> Result<String> {
        let name = self.place.file(VOCAB);
        String::from_utf8(self.place.read(VOCAB)?.into_owned()).with_context(|| format!("{name} is not UTF-8"))
    }

    /// Where the training data came from and its licences; empty where the folder says nothing.
    pub fn attribution(&self) -> String {
        let own = self.place.read(ATTRIBUTION).map(|text| String::from_utf8_lossy(&text).into_owned());
        let all: Vec<String> = own.ok().into_iter().chain(self.adapter_attribution()).collect();
        all.join("\n")
    }
}

impl Place {
    fn name(&self) -> String {
        match self {
            Place::Folder(folder) => folder.display().to_string(),
            Place::Demo(_) => "the demo model".into(),
        }
    }

    /// The name of a file in messages.
    fn file(&self, file: &str) -> String {
        match self {
            Place::Folder(folder) => folder.join(file).display().to_string(),
            Place::Demo(prefix) => format!("demo:{prefix}{file}"),
        }
    }

    fn read(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        Ok(match self {
            Place::Folder(folder) => {
                Cow::Owned(bounded_read::read(&self.existing(folder, file)?, bounded_read::VOCABULARY)?)
            }
            Place::Demo(prefix) => Cow::Borrowed(self.embedded(prefix, file)?),
        })
    }

    /// The manifest; folders of earlier versions and the demo have none.
    fn manifest(&self) -> Result<Option<Manifest>> {
        let Place::Folder(folder) = self else { return Ok(None) };
        let there = folder.join(MANIFEST).symlink_metadata().is_ok();
        there.then(|| Manifest::parse(&self.read(MANIFEST)?, &self.file(MANIFEST))).transpose()
    }

    /// The file of weights.
    fn weights(&self) -> Result<Weights> {
        Ok(match self {
            Place::Folder(folder) => Weights::Mapped(weights::map(&self.existing(folder, WEIGHTS)?)?),
            Place::Demo(prefix) => Weights::Demo(self.embedded(prefix, WEIGHTS)?),
        })
    }

    fn existing(&self, folder: &Path, file: &str) -> Result<PathBuf> {
        let path = folder.join(file);
        path.exists().then_some(path).hint(self.lacks(file), COPY)
    }

    fn embedded(&self, prefix: &str, file: &str) -> Result<&'static [u8]> {
        let found = DEMO.iter().find(|(path, _)| path.strip_prefix(prefix) == Some(file));
        Ok(found.hint(self.lacks(file), COPY)?.1)
    }

    fn lacks(&self, file: &str) -> String {
        format!("the model folder lacks {}", self.file(file))
    }
}

/// The bytes of a file of weights.
enum Weights {
    Mapped(Mapped),
    Demo(&'static [u8]),
}

impl Deref for Weights {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Demo(bytes) => bytes,
        }
    }
}

/// `folder`, or the `model` in it where `folder` is that of a training run.
fn model_folder(folder: PathBuf) -> Result<PathBuf> {
    let model = folder.join("model");
    if folder.join(WEIGHTS).exists() || !folder.join("checkpoints").is_dir() && !model.join(WEIGHTS).exists() {
        return Ok(folder);
    }
    let name = folder.display();
    let (what, hint) = match folder.join(ADAPTER).is_dir() {
        true => {
            ("trained an adapter, not a model", format!("name its train.init_from as --model, and --adapter {name}"))
        }
        false => ("has no model yet", "a run writes its model when it ends: start `vilg train` again to go on".into()),
    };
    ensure!(model.is_dir(), usage(format_args!("the run {name} {what}"), hint));
    Ok(model)
}
