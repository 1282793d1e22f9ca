//! The samples of a configuration: indexed once, then read one by one.

use super::{
    bad::{Bad, BadCounts, Cause},
    blocks::{BLOCK_BYTES, BlockCache},
    codes::{CODES_FILE, CodesInfo},
    index::{self, Index, Stamp},
    paths,
    record::{Kind, Record},
    remote::{Cache, Cached, is_remote, shown},
    remote_source,
    shard::Shard,
};
use crate::{
    config,
    error::{Hint, Result, ensure, failed, usage},
    report,
};
use rayon::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

/// Number of shards without a stored index from which a folder gets one.
const INDEX_FROM: usize = 100;
/// Estimated size of an image of unknown size in memory, in bytes: one megapixel.
const WHOLE_IMAGE: usize = 3 << 20;

/// All sources of a configuration.
#[derive(Debug)]
pub struct Dataset {
    pub sources: Vec<Source>,
    /// Damage of the shards and folders themselves.
    pub bad: BadCounts,
    kind: Kind,
    codes: Option<CodesInfo>,
    caption_keys: Vec<String>,
}

/// One source: a sequence of shards.
#[derive(Debug)]
pub struct Source {
    /// The path or pattern as given by the user; of a URL, without secrets.
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

impl Dataset {
    /// Finds and indexes the samples of all sources.
    ///
    /// # Errors
    /// A source does not exist or has no samples, or code shards belong to different tokenizers.
    pub fn open(config: &config::Data, kind: Kind) -> Result<Self> {
        let none = || usage("there is no data", "set data.sources, e.g. [{ path = \"data/emoji/train\" }]");
        ensure!(!config.sources.is_empty(), none());
        let cache = cache_for(config.sources.iter().map(|source| source.path.as_str()), config)?;
        let sources = config.sources.iter().map(|source| Source::of(&source.path, source.weight, cache.as_ref()));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let mut bad = BadCounts::default();
        sources.iter().for_each(|source| bad.merge(source.damage()));
        if let Some(source) = sources.iter().find(|source| source.is_empty()) {
            let message = format!("no samples in `{}`", source.path);
            let message = if bad.total() == 0 { message } else { format!("{message}: {bad}") };
            return Err(failed(message, "`vilg data inspect PATH` shows what it contains"));
        }
        let codes = if kind.has_codes() { Some(common_codes(&sources)?) } else { None };
        Ok(Self { sources, bad, kind, codes, caption_keys: config.caption_keys.clone() })
    }

    /// The `codes.json` of the code shards, for the kinds with codes.
    pub fn codes(&self) -> Option<&CodesInfo> {
        self.codes.as_ref()
    }

    /// Number of samples of the shards of each source.
    pub fn shard_lengths(&self) -> Vec<Vec<u64>> {
        self.sources.iter().map(|source| source.shards.iter().map(Shard::len).collect()).collect()
    }

    /// Number of bytes of a cache that holds the blocks of `streams` streams with a shuffle buffer of `buffer` samples.
    pub(super) fn cache_bytes(&self, streams: usize, buffer: usize) -> usize {
        let shards = self.sources.iter().flat_map(|source| &source.shards);
        let fewest = shards.filter_map(|shard| shard.samples_per_block(BLOCK_BYTES)).min().unwrap_or(usize::MAX);
        // The blocks of a buffer, the next one, and one that other threads still read from.
        let blocks = buffer.div_ceil(fewest) + 2;
        streams.saturating_mul(blocks).saturating_mul(BLOCK_BYTES as usize)
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
            Kind::Images(size)
            | Kind::Pairs(size)
            | Kind::Resized(size)
            | Kind::ResizedImages(size)
            | Kind::CodesAndImages(size) => 3 * (size as usize).pow(2),
            Kind::WholeImages => WHOLE_IMAGE,
            Kind::Codes | Kind::Captions => 0,
        };
        let codes = self.codes.as_ref().map_or(0, |info| 2 * info.grid[0] * info.grid[1]);
        content + codes + (4 << 10)
    }

    /// Reads one sample.
    ///
    /// # Errors
    /// The sample is bad; the error names its shard, key and cause.
    pub fn read(&self, source: usize, sample: u64) -> Result<Record, Bad> {
        self.read_with(None, source, sample)
    }

    /// Reads one sample, together with its neighbours if there is a cache for blocks.
    ///
    /// # Errors
    /// The sample is bad; the error names its shard, key and cause.
    pub(super) fn read_with(&self, cache: Option<&BlockCache>, source: usize, sample: u64) -> Result<Record, Bad> {
        let missing = || Bad::new(Cause::Unreadable, format_args!("sample {sample} of source {source}"));
        let found = self.sources.get(source).and_then(|s| s.place(sample));
        let (number, shard, index) = found.ok_or_else(missing)?;
        let (key, members) = match cache {
            Some(cache) => cache.members((source, number), shard, index, self.kind)?,
            None => shard.members(index, Some(self.kind))?,
        };
        let record = shard.parse(&key, &members, self.kind, self.codes.as_ref(), &self.caption_keys)?;
        Ok(Record { source, ..record })
    }

    /// Source and shard of a sample, as numbers.
    pub(super) fn shard_of(&self, source: usize, sample: u64) -> Option<(usize, usize)> {
        Some((source, self.sources.get(source)?.place(sample)?.0))
    }

    /// The cache of the remote shards, if there are any.
    pub fn cache(&self) -> Option<&Cache> {
        let mut shards = self.sources.iter().flat_map(|source| &source.shards);
        shards.find_map(|shard| Some(shard.remote_file()?.cache()))
    }

    /// Downloads the shard of a sample if it is remote. It stays in the cache while the result exists.
    ///
    /// # Errors
    /// As [`Shard::hold`].
    pub(super) fn hold(&self, source: usize, sample: u64, stop: &AtomicBool) -> Result<Option<Arc<Cached>>> {
        let shard = self.sources.get(source).and_then(|source| source.place(sample));
        shard.map_or(Ok(None), |(_, shard, _)| shard.hold(stop))
    }

    /// Source and number of each sample in storage order.
    pub fn places(&self) -> impl Iterator<Item = (usize, u64)> {
        self.sources.iter().enumerate().flat_map(|(i, source)| (0..source.len()).map(move |n| (i, n)))
    }

    /// Reads every `step`-th sample in storage order.
    pub fn records(&self, step: u64) -> impl Iterator<Item = Result<Record, Bad>> {
        self.places().step_by(step.max(1) as usize).map(|(source, sample)| self.read(source, sample))
    }
}

/// Opens tar shards with the stored indexes of their folders. A folder with many shards that have no entry gets an index.
fn open_tars(tars: Vec<(PathBuf, PathBuf)>) -> Vec<Shard> {
    let stamped: Vec<_> = tars.into_par_iter().map(|(path, name)| (Stamp::of(&path).ok(), path, name)).collect();
    let folders: BTreeSet<&Path> = stamped.iter().filter_map(|(_, path, _)| path.parent()).collect();
    let mut indexes = BTreeMap::new();
    for folder in folders {
        let index = Index::open(folder);
        let here = stamped.iter().filter(|(_, path, _)| path.parent() == Some(folder));
        let lacks = |stamp: &Stamp, path: &Path| index.as_ref().is_none_or(|index| index.entry(path, *stamp).is_none());
        let missing = here.filter(|(stamp, path, _)| stamp.as_ref().is_some_and(|stamp| lacks(stamp, path)));
        let missing: Vec<PathBuf> = missing.map(|(_, path, _)| path.clone()).collect();
        let index = if missing.len() < INDEX_FROM { index } else { make_index(folder, &missing) };
        indexes.extend(index.map(|index| (folder.to_owned(), Arc::new(index))));
    }
    let open = |(stamp, path, name): (Option<Stamp>, PathBuf, PathBuf)| {
        let index = path.parent().and_then(|folder| indexes.get(folder));
        Shard::indexed(path, name, stamp, index)
    };
    stamped.into_par_iter().map(open).collect()
}

fn make_index(folder: &Path, shards: &[PathBuf]) -> Option<Index> {
    if let Err(error) = index::update(folder, shards) {
        let folder = folder.display();
        report::warn(format_args!("{error:#}: the headers of all shards in {folder} are read at each start"));
    }
    Index::open(folder)
}

/// Whether a data source is a folder of code shards, or shards in one. A remote source that cannot be read has none.
pub fn are_codes(source: &str, config: &config::Data) -> bool {
    if is_remote(source) {
        return Cache::of(config).and_then(|cache| remote_source::codes(source, &cache)).is_ok();
    }
    let path = Path::new(source);
    [Some(path), path.parent()].into_iter().flatten().any(|folder| folder.join(CODES_FILE).is_file())
}

/// The cache of remote shards, if one of the sources is remote.
fn cache_for<'s>(mut sources: impl Iterator<Item = &'s str>, config: &config::Data) -> Result<Option<Cache>> {
    sources.any(is_remote).then(|| Cache::of(config)).transpose()
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
        let info = remote_source::codes_of(shard)?;
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
    /// Finds and indexes the samples of one source; remote shards are read through the default cache.
    ///
    /// # Errors
    /// As [`Source::open_with`].
    pub fn open(path: &str, weight: f64) -> Result<Self> {
        Self::open_with(path, weight, &config::Data::default())
    }

    /// Finds and indexes the samples of one source; remote shards are read through the cache of `config`.
    ///
    /// # Errors
    /// Nothing was found, a folder cannot be listed, or a remote shard cannot be downloaded.
    pub fn open_with(path: &str, weight: f64, config: &config::Data) -> Result<Self> {
        Self::of(path, weight, cache_for(std::iter::once(path), config)?.as_ref())
    }

    fn of(path: &str, weight: f64, cache: Option<&Cache>) -> Result<Self> {
        if let Some(cache) = cache.filter(|_| is_remote(path)) {
            let shards = remote_source::open(path, cache)?;
            return Ok(Self::new(&shown(path), weight, shards, BadCounts::default(), BadCounts::default()));
        }
        let found = paths::find(path)?;
        let mut shards = open_tars(found.tars);
        if !found.images.is_empty() {
            shards.push(Shard::folder(path, found.images));
        }
        Ok(Self::new(path, weight, shards, found.bad, found.ignored))
    }

    fn new(path: &str, weight: f64, shards: Vec<Shard>, bad: BadCounts, ignored: BadCounts) -> Self {
        let mut end = 0;
        let ends = shards.iter().map(|shard| {
            end += shard.len();
            end
        });
        let ends = ends.collect();
        Self { path: path.to_owned(), weight, shards, bad, ignored, ends }
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

    /// The shard of a sample, with its number, and the index of the sample in it.
    fn place(&self, sample: u64) -> Option<(usize, &Shard, usize)> {
        let shard = self.ends.partition_point(|end| *end <= sample);
        let start = if shard == 0 { 0 } else { *self.ends.get(shard - 1)? };
        Some((shard, self.shards.get(shard)?, usize::try_from(sample - start).ok()?))
    }
}
