//! The samples of a configuration: indexed once, then read one by one.

use super::{
    bad::{Bad, BadCounts, Cause},
    codes::CodesInfo,
    paths,
    record::{Kind, Record},
    tar::{self, Members, Place},
};
use crate::{
    config,
    error::{Hint, Result, ensure, failed, usage},
};
use rayon::prelude::*;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Largest file of a folder of pairs that is read.
const MAX_FILE: u64 = 64 << 20;

/// All sources of a configuration.
#[derive(Debug)]
pub struct Dataset {
    pub sources: Vec<Source>,
    /// What was wrong with the shards themselves.
    pub bad: BadCounts,
    kind: Kind,
    codes: Option<CodesInfo>,
}

/// One source: its shards one behind the other.
#[derive(Debug)]
pub struct Source {
    pub path: String,
    pub weight: f64,
    pub shards: Vec<Shard>,
    /// Number of samples up to and with each shard.
    ends: Vec<u64>,
}

/// A tar shard, or the pictures of a folder.
#[derive(Debug)]
pub struct Shard {
    pub path: PathBuf,
    /// Path below the source's folder, the name under which derived shards are written.
    pub name: PathBuf,
    samples: Samples,
    /// What was wrong with this shard.
    pub bad: BadCounts,
}

#[derive(Debug)]
enum Samples {
    Tar(Vec<Place>),
    Files(Vec<PathBuf>),
}

impl Dataset {
    /// Finds and indexes the samples of all sources.
    pub fn open(config: &config::Data, kind: Kind) -> Result<Self> {
        let none = || usage("there is no data", "set data.sources, e.g. [{ path = \"data/emoji/train\" }]");
        ensure!(!config.sources.is_empty(), none());
        let sources = config.sources.iter().map(|source| Source::open(&source.path, source.weight));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let mut bad = BadCounts::default();
        for shard in sources.iter().flat_map(|source| &source.shards) {
            bad.merge(shard.bad.clone());
        }
        if let Some(source) = sources.iter().find(|source| source.is_empty()) {
            let message = format!("no samples in `{}`", source.path);
            let message = if bad.total() == 0 { message } else { format!("{message}: {bad}") };
            return Err(failed(message, "`vilg data inspect PATH` tells what is there"));
        }
        let codes = if kind == Kind::Codes { Some(common_codes(&sources)?) } else { None };
        Ok(Self { sources, bad, kind, codes })
    }

    /// What the code shards say about their codes ([`Kind::Codes`] only).
    pub fn codes(&self) -> Option<&CodesInfo> {
        self.codes.as_ref()
    }

    /// Number of samples and weight of each source.
    pub fn shares(&self) -> Vec<(u64, f64)> {
        self.sources.iter().map(|source| (source.len(), source.weight)).collect()
    }

    /// Reads one sample.
    pub fn read(&self, source: usize, sample: u64) -> Result<Record, Bad> {
        let missing = || Bad::new(Cause::Unreadable, format_args!("sample {sample} of source {source}"));
        let found = self.sources.get(source).and_then(|s| s.place(sample));
        let (shard, index) = found.ok_or_else(missing)?;
        let record = shard.read(index, self.kind, self.codes.as_ref())?;
        Ok(Record { source, ..record })
    }

    /// Every `step`-th sample in the order in which they are stored.
    pub fn records(&self, step: u64) -> impl Iterator<Item = Result<Record, Bad>> {
        let places = self.sources.iter().enumerate().flat_map(|(i, source)| (0..source.len()).map(move |n| (i, n)));
        places.step_by(step.max(1) as usize).map(|(source, sample)| self.read(source, sample))
    }
}

/// The one description that all code shards share.
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
            shards.push(Shard { path: folder, name, samples: Samples::Files(found.images), bad: BadCounts::default() });
        }
        let mut end = 0;
        let ends = shards.iter().map(|shard| {
            end += shard.len();
            end
        });
        let ends = ends.collect();
        Ok(Self { path: path.to_owned(), weight, shards, ends })
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
    fn tar(path: PathBuf, name: PathBuf) -> Self {
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

    /// The key and the raw members of sample `index`.
    pub fn members(&self, index: usize) -> Result<(String, Members), Bad> {
        let missing = || Bad::new(Cause::Unreadable, format_args!("{}: sample {index}", self.path.display()));
        match &self.samples {
            Samples::Tar(places) => tar::read(&self.path, *places.get(index).ok_or_else(missing)?),
            Samples::Files(images) => read_files(images.get(index).ok_or_else(missing)?),
        }
    }

    /// Reads sample `index`.
    pub fn read(&self, index: usize, kind: Kind, codes: Option<&CodesInfo>) -> Result<Record, Bad> {
        let (key, members) = self.members(index)?;
        Record::parse(&key, &members, kind, codes).map_err(|bad| self.locate(&key, bad))
    }

    /// Adds shard and key to what is known about a bad sample.
    pub fn locate(&self, key: &str, bad: Bad) -> Bad {
        let separator = if bad.place.is_empty() { "" } else { ": " };
        Bad::new(bad.cause, format_args!("{}: {key}{separator}{}", self.path.display(), bad.place))
    }
}

/// A picture file and the `.txt` and `.json` beside it.
fn read_files(image: &Path) -> Result<(String, Members), Bad> {
    let mut members = Members::default();
    let extension = image.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    for (extension, path) in [(extension.as_str(), image.to_path_buf())]
        .into_iter()
        .chain(["txt", "json"].map(|e| (e, image.with_extension(e))))
    {
        match read_limited(&path) {
            Ok(content) => members.push(extension, &content),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path != image => {}
            Err(e) if e.kind() == io::ErrorKind::FileTooLarge => return Err(Bad::new(Cause::TooLarge, path.display())),
            Err(e) => return Err(Bad::new(Cause::Unreadable, format_args!("{}: {e}", path.display()))),
        }
    }
    let key = image.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((key, members))
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    fs::read(path)
}
