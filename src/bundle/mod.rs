//! A model is a folder: config.toml, model.safetensors, vocab.txt, ATTRIBUTION.md and, for a
//! generator, the folder of its image tokenizer. The demo model is such a folder inside the program.

use crate::{
    config::{Config, ImageTokenizer, QuantizerKind, Task},
    error::{Context, Hint, Result, ensure, usage},
    model::Generator,
    nn::{params::Scope, weights},
    runtime::{self, Mapped},
    text::WordPiece,
    tokenizer,
};
use candle_core::{DType, Tensor};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    ops::Deref,
    path::{Path, PathBuf},
};

mod export;
pub mod import;
mod write;

pub use write::{Parts, attribution_of, write};

const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "model.safetensors";
const VOCAB: &str = "vocab.txt";
const ATTRIBUTION: &str = "ATTRIBUTION.md";
const IMAGE_TOKENIZER: &str = "image-tokenizer";

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
];

/// The name of the demo model.
pub const DEMO_NAME: &str = "demo";

/// Keys of an image tokenizer that its digest leaves out.
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
];

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
}

impl Bundle {
    /// Opens the model folder `model`, the model of the training run in the folder `model`, or the demo model by its
    /// name.
    ///
    /// # Errors
    /// There is no such folder, or it is not a model folder.
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
        Ok(Self { config, place })
    }

    /// The image tokenizer's folder: this one, or the one inside a generator's.
    pub fn image_tokenizer_folder(&self) -> Result<Self> {
        if self.config.task == Task::ImageTokenizer {
            return Ok(self.clone());
        }
        Self::at(match &self.place {
            Place::Folder(folder) => Place::Folder(folder.join(IMAGE_TOKENIZER)),
            Place::Demo(_) => Place::Demo("image-tokenizer/"),
        })
    }

    /// The image tokenizer.
    pub fn image_tokenizer(&self) -> Result<tokenizer::ImageTokenizer> {
        let folder = self.image_tokenizer_folder()?;
        let settings = &folder.config.image_tokenizer;
        folder.build(|scope| tokenizer::ImageTokenizer::new(scope, settings))
    }

    /// The transformer.
    pub fn generator(&self) -> Result<Generator> {
        let hint = "a run with task = \"generator\" writes one that paints and captions";
        let what = format!("{} is an image tokenizer, not a generator", self.place.name());
        ensure!(self.config.task == Task::Generator, usage(what, hint));
        let (codebook, grid) = (self.config.image_tokenizer.codebook_size, self.config.image_tokenizer.grid());
        let vocab_size = self.text()?.vocab_size();
        self.build(|scope| Generator::new(scope, &self.config, vocab_size, codebook, grid))
    }

    fn build<T>(&self, make: impl FnOnce(&Scope) -> Result<T>) -> Result<T> {
        let name = self.place.file(WEIGHTS);
        let scope = Scope::from_tensors(self.weights()?, DType::F32, &runtime::device()?);
        let hint = "the files of the folder are of different models; copy the whole folder again";
        let built = make(&scope).and_then(|built| scope.finish().map(|()| built));
        built.hint(format_args!("{name} does not fit the config.toml and vocab.txt beside it"), hint)
    }

    /// All weights by name, as f32.
    pub fn weights(&self) -> Result<HashMap<String, Tensor>> {
        weights::parse(&self.place.weights()?, &self.place.file(WEIGHTS))
    }

    /// The text side.
    pub fn text(&self) -> Result<WordPiece> {
        let hint = "a vocabulary has one token a line; copy the whole folder again";
        WordPiece::parse(&self.vocab()?).hint(format_args!("cannot use {}", self.place.file(VOCAB)), hint)
    }

    fn vocab(&self) -> Result<String> {
        let name = self.place.file(VOCAB);
        String::from_utf8(self.place.read(VOCAB)?.into_owned()).with_context(|| format!("{name} is not UTF-8"))
    }

    /// Where the training data came from and its licences; empty where the folder says nothing.
    pub fn attribution(&self) -> String {
        self.place.read(ATTRIBUTION).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }

    /// A digest of the image tokenizer's settings and weights: codes belong to one such digest.
    pub fn digest(&self) -> Result<String> {
        let folder = self.image_tokenizer_folder()?;
        let settings = ImageTokenizer { path: String::new(), ..folder.config.image_tokenizer.clone() };
        let mut settings = toml::Table::try_from(settings)?;
        // What it was trained against changes no code. Digests are as old as shards of codes: later keys stay out.
        settings.retain(|key, _| !TRAINING_KEYS.contains(&key));
        if folder.config.image_tokenizer.quantizer == QuantizerKind::Nearest {
            settings.retain(|key, _| key != "quantizer" && key != "fsq_levels" && key != "architecture");
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(toml::to_string(&settings)?.as_bytes());
        hasher.update(&folder.place.weights()?);
        Ok(hasher.finalize().to_hex().to_string())
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
            Place::Folder(folder) => Cow::Owned(read_small(&self.existing(folder, file)?)?),
            Place::Demo(prefix) => Cow::Borrowed(self.embedded(prefix, file)?),
        })
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
    let hint = "a run writes its model when it ends: start `vilg train` again to go on";
    ensure!(model.is_dir(), usage(format_args!("the run {} has no model yet", folder.display()), hint));
    Ok(model)
}

/// Reads a text file of a model folder; none is anywhere near this large.
fn read_small(path: &Path) -> Result<Vec<u8>> {
    const LIMIT: u64 = 64 << 20;
    let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(meta.is_file() && meta.len() <= LIMIT, "{} is not a file of at most 64 MB", path.display());
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::task_tests::generator_config;
    use safetensors::Dtype;

    fn message(error: &crate::error::Error) -> String {
        format!("{error:#}")
    }

    /// A generator's model folder with fresh weights.
    fn model(folder: &Path) -> PathBuf {
        let config = generator_config(folder);
        let tokenizer = Bundle::open(&config.image_tokenizer.path).unwrap();
        let text = WordPiece::load(&config.text.vocab).unwrap();
        let scope = Scope::from_seed(1, DType::F32, &runtime::device().unwrap());
        let settings = &config.image_tokenizer;
        Generator::new(&scope, &config, text.vocab_size(), settings.codebook_size, settings.grid()).unwrap();
        let weights = weights::of_params(&scope.params()).unwrap();
        let parts = Parts {
            config: &config,
            weights,
            vocab: Some(text.vocab_text()),
            attribution: "Ours.".into(),
            image_tokenizer: Some(tokenizer),
        };
        let path = folder.join("model");
        write(&path, &parts, Dtype::F32).unwrap();
        // A second one replaces the first.
        write(&path, &parts, Dtype::F32).unwrap();
        path
    }

    fn open(path: &Path) -> Result<Bundle> {
        Bundle::open(path.to_str().unwrap())
    }

    /// Opens everything that a model folder holds.
    fn open_all(path: &Path) -> Result<()> {
        let bundle = open(path)?;
        bundle.generator()?;
        bundle.image_tokenizer()?;
        Ok(())
    }

    #[test]
    fn written_exported_and_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        let text = fs::read_to_string(path.join(CONFIG)).unwrap();
        assert!(!text.contains(folder.path().to_str().unwrap()), "a path of this machine");
        open_all(&path).unwrap();
        let small = folder.path().join("small");
        open(&path).unwrap().export(&small, Dtype::BF16, None).unwrap();
        open_all(&small).unwrap();
        let size = |path: &Path| fs::metadata(path.join(WEIGHTS)).unwrap().len();
        assert!(size(&small) < size(&path) * 3 / 4);
        let (a, b) = (open(&path).unwrap().weights().unwrap(), open(&small).unwrap().weights().unwrap());
        for (name, a) in &a {
            let gap = (a - &b[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(gap < 4e-3, "{name}: {gap}");
        }
        assert_eq!(open(&small).unwrap().attribution(), "Ours.");
        let tokenizer = path.join(IMAGE_TOKENIZER);
        assert!(message(&open(&tokenizer).unwrap().generator().err().unwrap()).contains("not a generator"));
    }

    #[test]
    fn missing_truncated_and_foreign_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        for file in [CONFIG, WEIGHTS, VOCAB, "image-tokenizer/config.toml", "image-tokenizer/model.safetensors"] {
            let whole = fs::read(path.join(file)).unwrap();
            fs::remove_file(path.join(file)).unwrap();
            let error = message(&open_all(&path).unwrap_err());
            assert!(error.contains("lacks") && error.contains(file), "{error}");
            // Half a configuration is one with more defaults: nothing can tell.
            if !file.ends_with("toml") {
                fs::write(path.join(file), &whole[..whole.len() / 2]).unwrap();
                let error = message(&open_all(&path).unwrap_err());
                assert!(error.contains(file), "{error}");
            }
            fs::write(path.join(file), b"\x89PNG\r\n\x1a\n and more that is no model").unwrap();
            assert!(message(&open_all(&path).unwrap_err()).contains(file));
            fs::write(path.join(file), whole).unwrap();
        }
        fs::copy(path.join("image-tokenizer/model.safetensors"), path.join(WEIGHTS)).unwrap();
        assert!(message(&open_all(&path).unwrap_err()).contains("does not fit the config.toml"));
        assert!(message(&open(&folder.path().join("nowhere")).unwrap_err()).contains("no model folder"));
    }

    #[test]
    fn the_folder_of_a_run_stands_for_its_model() {
        let folder = tempfile::tempdir().unwrap();
        model(folder.path());
        open_all(folder.path()).unwrap();
        let run = folder.path().join("run");
        fs::create_dir_all(run.join("checkpoints")).unwrap();
        assert!(message(&open(&run).unwrap_err()).contains("has no model yet"));
    }

    #[test]
    fn another_folder_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        let mine = folder.path().join("mine");
        fs::create_dir(&mine).unwrap();
        fs::write(mine.join("letter.txt"), "dear").unwrap();
        assert!(open(&path).unwrap().export(&mine, Dtype::F32, None).is_err());
        assert_eq!(fs::read_to_string(mine.join("letter.txt")).unwrap(), "dear");
    }
}
