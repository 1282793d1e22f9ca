//! The samples of a configuration: indexed once, then read one by one.

use super::{
    bad::{Bad, BadCounts, Cause},
    codes::CodesInfo,
    keys::keys,
    members::Members,
    paths,
    record::{Kind, Record, wants},
    source_file,
    tar::{self, Place},
};
use crate::{
    config,
    error::{Context, Hint, Result, ensure, failed, usage},
};
use rayon::prelude::*;
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// All sources of a configuration.
#[derive(Debug)]
pub struct Dataset {
    pub sources: Vec<Source>,
    /// Damage of the shards and folders themselves.
    pub bad: BadCounts,
    kind: Kind,
    codes: Option<CodesInfo>,
}

/// One source: a sequence of shards.
#[derive(Debug)]
pub struct Source {
    /// The path or pattern as given by the user.
    pub path: String,
    /// Passes over this source per epoch.
    pub weight: f64,
    pub shards: Vec<Shard>,
    /// Images and shards of its folders that cannot be used.
    pub bad: BadCounts,
    /// Files of its folders that belong to no sample.
    pub ignored: BadCounts,
    /// Number of samples up to and including each shard.
    ends: Vec<u64>,
}

/// A tar shard, or the images of a folder.
#[derive(Debug)]
pub struct Shard {
    pub path: PathBuf,
    /// Path below the source's folder. Derived shards are written under this name.
    pub name: PathBuf,
    samples: Samples,
    /// Damage of the shard itself.
    pub bad: BadCounts,
}

#[derive(Debug)]
enum Samples {
    Tar(Vec<Place>),
    Files(Vec<ImageFile>),
}

/// An image file in a folder.
#[derive(Debug)]
struct ImageFile {
    path: PathBuf,
    /// Unique among the images of its source; contains no dots.
    key: String,
}

impl Dataset {
    /// Finds and indexes the samples of all sources.
    ///
    /// # Errors
    /// A source does not exist or has no samples, or code shards belong to different tokenizers.
    pub fn open(config: &config::Data, kind: Kind) -> Result<Self> {
        let none = || usage("there is no data", "set data.sources, e.g. [{ path = \"data/emoji/train\" }]");
        ensure!(!config.sources.is_empty(), none());
        let sources = config.sources.iter().map(|source| Source::open(&source.path, source.weight));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let mut bad = BadCounts::default();
        sources.iter().for_each(|source| bad.merge(source.damage()));
        if let Some(source) = sources.iter().find(|source| source.is_empty()) {
            let message = format!("no samples in `{}`", source.path);
            let message = if bad.total() == 0 { message } else { format!("{message}: {bad}") };
            return Err(failed(message, "`vilg data inspect PATH` shows what it contains"));
        }
        let codes = if kind == Kind::Codes { Some(common_codes(&sources)?) } else { None };
        Ok(Self { sources, bad, kind, codes })
    }

    /// The `codes.json` of the code shards ([`Kind::Codes`] only).
    pub fn codes(&self) -> Option<&CodesInfo> {
        self.codes.as_ref()
    }

    /// Number of samples and weight of each source.
    pub fn shares(&self) -> Vec<(u64, f64)> {
        self.sources.iter().map(|source| (source.len(), source.weight)).collect()
    }

    /// Digest of the data set: shard names, keys or member positions, and file sizes. It depends neither on where the
    /// sources are stored nor on modification times.
    ///
    /// # Errors
    /// A file can no longer be read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for source in &self.sources {
            hasher.update(&(source.shards.len() as u64).to_le_bytes());
            for shard in &source.shards {
                hasher.update(shard.digest(false)?.as_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Estimated size of one sample in memory, in bytes; captions count as 4 KiB.
    pub(super) fn sample_bytes(&self) -> usize {
        let content = match self.kind {
            Kind::Images(size) | Kind::Pairs(size) => 3 * (size as usize).pow(2),
            Kind::Codes => self.codes.as_ref().map_or(0, |info| 2 * info.grid[0] * info.grid[1]),
            Kind::Captions => 0,
        };
        content + (4 << 10)
    }

    /// Reads one sample.
    ///
    /// # Errors
    /// The sample is bad; the error names its shard, key and cause.
    pub fn read(&self, source: usize, sample: u64) -> Result<Record, Bad> {
        let missing = || Bad::new(Cause::Unreadable, format_args!("sample {sample} of source {source}"));
        let found = self.sources.get(source).and_then(|s| s.place(sample));
        let (shard, index) = found.ok_or_else(missing)?;
        let record = shard.read(index, self.kind, self.codes.as_ref())?;
        Ok(Record { source, ..record })
    }

    /// Reads every `step`-th sample in storage order.
    pub fn records(&self, step: u64) -> impl Iterator<Item = Result<Record, Bad>> {
        let places = self.sources.iter().enumerate().flat_map(|(i, source)| (0..source.len()).map(move |n| (i, n)));
        places.step_by(step.max(1) as usize).map(|(source, sample)| self.read(source, sample))
    }
}

/// The `codes.json` shared by all code shards.
fn common_codes(sources: &[Source]) -> Result<CodesInfo> {
    let mut common: Option<(CodesInfo, &Path)> = None;
    let mut last = None;
    for shard in sources.iter().flat_map(|source| &source.shards) {
        let folder = shard.path.parent().unwrap_or(Path::new("."));
        if last.replace(folder) == Some(folder) {
            continue;
        }
        let info = CodesInfo::read(folder)?;
        let (first, first_folder) = common.get_or_insert_with(|| (info.clone(), folder));
        ensure!(
            *first == info,
            failed(
                format_args!("{} and {} hold codes of different tokenizers", first_folder.display(), folder.display()),
                "encode both with the same model: `vilg data encode --model DIR SOURCE -o FOLDER`"
            )
        );
    }
    common.map(|(info, _)| info).hint("no code shards", "make them with `vilg data encode`")
}

impl Source {
    /// Finds and indexes the samples of one source.
    pub fn open(path: &str, weight: f64) -> Result<Self> {
        let found = paths::find(path)?;
        let mut shards: Vec<Shard> = found.tars.into_par_iter().map(|(path, name)| Shard::tar(path, name)).collect();
        if !found.images.is_empty() {
            let (folder, name) = (PathBuf::from(path), PathBuf::from("00000.tar"));
            let keys = keys(found.images.iter().map(|(_, below)| below.as_path()));
            let images = found.images.into_iter().zip(keys).map(|((path, _), key)| ImageFile { path, key });
            let samples = Samples::Files(images.collect());
            shards.push(Shard { path: folder, name, samples, bad: BadCounts::default() });
        }
        let mut end = 0;
        let ends = shards.iter().map(|shard| {
            end += shard.len();
            end
        });
        let ends = ends.collect();
        let (bad, ignored) = (found.bad, found.ignored);
        Ok(Self { path: path.to_owned(), weight, shards, bad, ignored, ends })
    }

    /// Damage of the folders and of all shards.
    pub fn damage(&self) -> BadCounts {
        let mut bad = self.bad.clone();
        self.shards.iter().for_each(|shard| bad.merge(shard.bad.clone()));
        bad
    }

    /// Number of samples.
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn place(&self, sample: u64) -> Option<(&Shard, usize)> {
        let shard = self.ends.partition_point(|end| *end <= sample);
        let start = if shard == 0 { 0 } else { *self.ends.get(shard - 1)? };
        Some((self.shards.get(shard)?, usize::try_from(sample - start).ok()?))
    }
}

impl Shard {
    /// Indexes a tar shard. Damage is counted in `bad`.
    pub(super) fn tar(path: PathBuf, name: PathBuf) -> Self {
        let tar::Index { places, bad } = tar::index(&path);
        Self { path, name, samples: Samples::Tar(places), bad }
    }

    /// Number of samples.
    pub fn len(&self) -> u64 {
        match &self.samples {
            Samples::Tar(places) => places.len() as u64,
            Samples::Files(images) => images.len() as u64,
        }
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Digest of the shard's name, its samples and file sizes; with `times` also of the modification times.
    ///
    /// # Errors
    /// A file can no longer be read.
    pub fn digest(&self, times: bool) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let file = |hasher: &mut blake3::Hasher, path: &Path| -> io::Result<()> {
            let meta = fs::metadata(path)?;
            let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            hasher.update(&meta.len().to_le_bytes());
            if times {
                hasher.update(&modified.unwrap_or_default().as_nanos().to_le_bytes());
            }
            Ok(())
        };
        hasher.update(self.name.as_os_str().as_encoded_bytes()).update(&[0]).update(&self.len().to_le_bytes());
        match &self.samples {
            Samples::Tar(places) => {
                file(&mut hasher, &self.path)
                    .with_context(|| format!("cannot read the metadata of {}", self.path.display()))?;
                for Place { start, length } in places {
                    hasher.update(&start.to_le_bytes()).update(&length.to_le_bytes());
                }
            }
            Samples::Files(images) => {
                for ImageFile { path, key } in images {
                    hasher.update(key.as_bytes()).update(&[0]);
                    file(&mut hasher, path)
                        .with_context(|| format!("cannot read the metadata of {}", path.display()))?;
                    for extension in ["txt", "json"] {
                        if let Some(beside) = beside(path, extension) {
                            hasher.update(extension.as_bytes());
                            file(&mut hasher, &beside)
                                .with_context(|| format!("cannot read the metadata of {}", beside.display()))?;
                        }
                    }
                }
            }
        }
        Ok(hasher.finalize())
    }

    /// Size of sample `index` in bytes; 0 if it is unknown.
    pub(super) fn sample_bytes(&self, index: usize) -> u64 {
        match &self.samples {
            Samples::Tar(places) => places.get(index).map_or(0, |place| place.length),
            Samples::Files(images) => {
                images.get(index).and_then(|image| fs::metadata(&image.path).ok()).map_or(0, |meta| meta.len())
            }
        }
    }

    /// The key of sample `index`, and those of its members that are read for `kind` (`None`: for any kind).
    ///
    /// # Errors
    /// The sample is bad.
    pub fn members(&self, index: usize, kind: Option<Kind>) -> Result<(String, Members), Bad> {
        let missing = || Bad::new(Cause::Unreadable, format_args!("{}: sample {index}", self.path.display()));
        match &self.samples {
            Samples::Tar(places) => {
                tar::read(&self.path, *places.get(index).ok_or_else(missing)?, |extension| wants(kind, extension))
            }
            Samples::Files(images) => read_files(images.get(index).ok_or_else(missing)?, kind),
        }
    }

    /// Copies all members of sample `index` byte by byte; false, without writing, if the shard is not a tar.
    ///
    /// # Errors
    /// The shard cannot be read, or the output cannot be written.
    pub fn copy(&self, index: usize, output: &mut impl Write) -> Result<bool> {
        match &self.samples {
            Samples::Tar(places) => {
                let place = places.get(index).with_context(|| format!("no sample {index}"))?;
                tar::copy(&self.path, *place, output).map(|()| true)
            }
            Samples::Files(_) => Ok(false),
        }
    }

    /// Reads sample `index`.
    pub fn read(&self, index: usize, kind: Kind, codes: Option<&CodesInfo>) -> Result<Record, Bad> {
        let (key, members) = self.members(index, Some(kind))?;
        self.parse(&key, &members, kind, codes)
    }

    /// Parses the members of a sample of this shard; errors and warnings name shard and key.
    pub(super) fn parse(
        &self,
        key: &str,
        members: &Members,
        kind: Kind,
        codes: Option<&CodesInfo>,
    ) -> Result<Record, Bad> {
        let record = Record::parse(key, members, kind, codes).map_err(|bad| self.locate(key, bad))?;
        let ignored = record.ignored.clone().map(|bad| self.locate(key, bad));
        Ok(Record { ignored, ..record })
    }

    /// Adds shard and key to the location of a bad sample.
    pub fn locate(&self, key: &str, bad: Bad) -> Bad {
        let separator = if bad.place.is_empty() { "" } else { ": " };
        Bad::new(bad.cause, format_args!("{}: {key}{separator}{}", self.path.display(), bad.place))
    }
}

/// The members of an image file: the image, and the `.txt` and `.json` of the same name (extension in lower or upper
/// case).
fn read_files(image: &ImageFile, kind: Option<Kind>) -> Result<(String, Members), Bad> {
    let mut members = Members::default();
    let extension = image.path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let itself = wants(kind, &extension).then(|| (extension.as_str(), image.path.clone()));
    let others = ["txt", "json"].into_iter().filter_map(|e| Some((e, beside(&image.path, e)?)));
    for (extension, path) in itself.into_iter().chain(others) {
        members.push(extension, &source_file::read(&path)?);
    }
    Ok((image.key.clone(), members))
}

/// The file with the image's name and another extension, in lower or upper case.
fn beside(image: &Path, extension: &str) -> Option<PathBuf> {
    let spellings = [extension.to_owned(), extension.to_ascii_uppercase()];
    spellings.iter().map(|extension| image.with_extension(extension)).find(|path| path.exists())
}
