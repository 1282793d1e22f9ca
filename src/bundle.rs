//! A model is a folder: config.toml, model.safetensors, vocab.txt, ATTRIBUTION.md and, for a
//! generator, the folder of its image tokenizer. The demo model is such a folder inside the program.

use crate::{
    config::{Config, ImageTokenizer, Task},
    error::{Context, Hint, Result, ensure, usage},
    model::Generator,
    nn::{
        params::Scope,
        weights::{self, Values},
    },
    runtime,
    text::WordPiece,
    tokenizer,
};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "model.safetensors";
const VOCAB: &str = "vocab.txt";
const ATTRIBUTION: &str = "ATTRIBUTION.md";
const IMAGE_TOKENIZER: &str = "image-tokenizer";

macro_rules! demo {
    ($($path:literal),* $(,)?) => { &[$(($path, include_bytes!(concat!("demo/", $path)))),*] };
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
    /// Opens the model folder `model`, or the demo model by its name.
    ///
    /// # Errors
    /// There is no such folder, or it is not a model folder.
    pub fn open(model: &str) -> Result<Self> {
        if model != DEMO_NAME {
            return Self::at(Place::Folder(model.into()));
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
        weights::parse(&self.place.read(WEIGHTS)?, &self.place.file(WEIGHTS))
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
        let mut hasher = blake3::Hasher::new();
        hasher.update(toml::to_string(&settings)?.as_bytes());
        hasher.update(&folder.place.read(WEIGHTS)?);
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Writes a copy of this model folder with its weights stored as `dtype`.
    pub fn export(&self, folder: &Path, dtype: Dtype) -> Result<()> {
        let generator = self.config.task == Task::Generator;
        let parts = Parts {
            config: &self.config,
            weights: self.weights()?,
            vocab: if generator { Some(self.vocab()?) } else { None },
            attribution: self.attribution(),
            image_tokenizer: if generator { Some(self.image_tokenizer_folder()?) } else { None },
        };
        write(folder, &parts, dtype)
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
        let missing = || format!("the model folder lacks {}", self.file(file));
        let hint = "copy the whole folder again; a model folder is what `vilg train` writes to runs/NAME/model";
        match self {
            Place::Folder(folder) => {
                let path = folder.join(file);
                path.exists().then_some(()).hint(missing(), hint)?;
                let bytes = if file == WEIGHTS { weights::read(&path)? } else { read_small(&path)? };
                Ok(Cow::Owned(bytes))
            }
            Place::Demo(prefix) => {
                let name = format!("{prefix}{file}");
                let found = DEMO.iter().find(|(path, _)| *path == name);
                Ok(Cow::Borrowed(found.hint(missing(), hint)?.1))
            }
        }
    }
}

/// Reads a text file of a model folder; none is anywhere near this large.
fn read_small(path: &Path) -> Result<Vec<u8>> {
    const LIMIT: u64 = 64 << 20;
    let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(meta.is_file() && meta.len() <= LIMIT, "{} is not a file of at most 64 MB", path.display());
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What a model folder is made of.
pub struct Parts<'a> {
    pub config: &'a Config,
    pub weights: HashMap<String, Tensor>,
    pub vocab: Option<String>,
    pub attribution: String,
    pub image_tokenizer: Option<Bundle>,
}

/// Writes a model folder; an older one in its place is replaced when the new one is complete.
pub fn write(folder: &Path, parts: &Parts, dtype: Dtype) -> Result<()> {
    let ours = !folder.exists() || folder.join(WEIGHTS).exists() || fs::read_dir(folder)?.next().is_none();
    let hint = "name a new folder";
    ensure!(ours, usage(format_args!("{} exists and is not a model folder", folder.display()), hint));
    let (new, old) = (sibling(folder, ".new"), sibling(folder, ".old"));
    for stale in [&new, &old] {
        if stale.exists() {
            fs::remove_dir_all(stale)?;
        }
    }
    write_parts(&new, parts, dtype).with_context(|| format!("cannot write the model folder {}", folder.display()))?;
    if folder.exists() {
        fs::rename(folder, &old)?;
    }
    fs::rename(&new, folder)?;
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    Ok(())
}

fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn write_parts(folder: &Path, parts: &Parts, dtype: Dtype) -> Result<()> {
    fs::create_dir_all(folder)?;
    // Paths of the training machine mean nothing elsewhere.
    let mut config = parts.config.clone();
    config.data.sources.clear();
    config.train.init_from.clear();
    config.text.vocab = parts.vocab.as_ref().map_or(String::new(), |_| VOCAB.into());
    config.image_tokenizer.path = parts.image_tokenizer.as_ref().map_or(String::new(), |_| IMAGE_TOKENIZER.into());
    fs::write(folder.join(CONFIG), config.to_toml()?)?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &parts.weights {
        let values = Cow::Owned(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        tensors.insert(name.clone(), Values { shape: tensor.dims().to_vec(), values, dtype });
    }
    fs::write(folder.join(WEIGHTS), weights::encode(&tensors)?)?;
    if let Some(vocab) = &parts.vocab {
        fs::write(folder.join(VOCAB), vocab)?;
    }
    if !parts.attribution.is_empty() {
        fs::write(folder.join(ATTRIBUTION), &parts.attribution)?;
    }
    if let Some(tokenizer) = &parts.image_tokenizer {
        tokenizer.export(&folder.join(IMAGE_TOKENIZER), dtype)?;
    }
    Ok(())
}

/// The `ATTRIBUTION.md` files that lie in the folders of `sources` or up to two above, joined.
pub fn attribution_of(sources: &[crate::config::Source]) -> String {
    let mut texts = Vec::new();
    for source in sources {
        let mut folders = Path::new(&source.path).ancestors().filter(|folder| folder.is_dir()).take(3);
        let text = folders.find_map(|folder| fs::read_to_string(folder.join(ATTRIBUTION)).ok());
        texts.extend(text.filter(|text| !texts.contains(text)));
    }
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::task_tests::generator_config;

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
        let weights = scope.params().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
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
        open(&path).unwrap().export(&small, Dtype::BF16).unwrap();
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
    fn another_folder_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        let mine = folder.path().join("mine");
        fs::create_dir(&mine).unwrap();
        fs::write(mine.join("letter.txt"), "dear").unwrap();
        assert!(open(&path).unwrap().export(&mine, Dtype::F32).is_err());
        assert_eq!(fs::read_to_string(mine.join("letter.txt")).unwrap(), "dear");
    }
}
