//! The stored index of a folder's shards, so that the headers of a shard are read once and not at every start.
//!
//! The file is [`MAGIC`], 8 bytes for each sample (its place in its shard), one JSON entry for each shard, the length of
//! the JSON (8 bytes) and [`MAGIC`] again. All numbers are little-endian. A shard's entry holds while its size and its
//! modification time do.

use super::{
    bad::BadCounts,
    output::{Lock, remove_leftovers, write_whole},
    source_file::open_regular,
    tar::{self, Place},
};
use crate::{
    error::{Context, Result, ensure, failed},
    report::note,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, UNIX_EPOCH},
};

/// Name of the index in the folder of the shards.
pub const INDEX_FILE: &str = ".shards.index";
const LOCK: &str = ".shards.lock";
const MAGIC: &[u8; 8] = b"vilgidx1";
/// Shards whose places are in memory together while an index is written.
const CHUNK: usize = 256;
/// Places that are copied together.
const COPIED: usize = 1 << 16;
const BLOCK: u64 = 512;
/// Bits of a packed place that hold the length in blocks.
const LENGTH_BITS: u32 = 24;
/// Time between two looks for the index that another process writes.
const POLL: Duration = Duration::from_millis(200);

/// Size in bytes and modification time in nanoseconds of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub size: u64,
    /// Of a remote shard, the beginning of its digest instead.
    pub modified: u64,
}

impl Stamp {
    /// # Errors
    /// The file cannot be found.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(Self { size: meta.len(), modified: modified.unwrap_or_default().as_nanos() as u64 })
    }
}

/// One shard of an index.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    pub name: PathBuf,
    /// Size in bytes and modification time in nanoseconds.
    pub size: u64,
    pub modified: u64,
    /// Number of samples.
    pub samples: u64,
    /// Number of samples of all shards before this one.
    pub first: u64,
    /// Damage of the shard.
    #[serde(default, skip_serializing_if = "BadCounts::is_empty")]
    pub bad: BadCounts,
}

impl Entry {
    pub fn stamp(&self) -> Stamp {
        Stamp { size: self.size, modified: self.modified }
    }
}

/// An index that is open for reading. Places are read from the file when they are needed.
#[derive(Debug)]
pub struct Index {
    file: File,
    entries: BTreeMap<PathBuf, Entry>,
}

impl Index {
    /// Opens the index of a folder; `None` if there is none or it is damaged.
    pub fn open(folder: &Path) -> Option<Self> {
        Self::open_file(&folder.join(INDEX_FILE))
    }

    /// Opens an index; `None` if there is none or it is damaged.
    pub fn open_file(path: &Path) -> Option<Self> {
        let file = open_regular(path).ok()?;
        let size = file.metadata().ok()?.len();
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, 0).ok()?;
        let mut tail = [0; 16];
        file.read_exact_at(&mut tail, size.checked_sub(16)?).ok()?;
        let (length, end) = tail.split_at(8);
        let length = u64::from_le_bytes(length.try_into().ok()?);
        let places = size.checked_sub(24)?.checked_sub(length)?;
        if magic != *MAGIC || end != MAGIC || !places.is_multiple_of(8) {
            return None;
        }
        let mut json = vec![0; usize::try_from(length).ok()?];
        file.read_exact_at(&mut json, 8 + places).ok()?;
        let list: Vec<Entry> = serde_json::from_slice(&json).ok()?;
        let fits = |entry: &Entry| entry.first.checked_add(entry.samples).is_some_and(|end| end <= places / 8);
        if !list.iter().all(fits) {
            return None;
        }
        Some(Self { file, entries: list.into_iter().map(|entry| (entry.name.clone(), entry)).collect() })
    }

    /// The entry of a shard, if the shard still has this stamp.
    pub fn entry(&self, shard: &Path, stamp: Stamp) -> Option<&Entry> {
        self.entries.get(Path::new(shard.file_name()?)).filter(|entry| entry.stamp() == stamp)
    }

    /// The entry of this name.
    pub fn named(&self, name: &Path) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The packed places of an entry.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn packed(&self, entry: &Entry) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; 8 * entry.samples as usize];
        self.file.read_exact_at(&mut bytes, 8 + 8 * entry.first)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    }

    /// The places of `count` samples, from number `first` of the index on, in a shard of `size` bytes.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn places(&self, first: u64, count: usize, size: u64) -> io::Result<Vec<Place>> {
        let mut bytes = vec![0; 8 * count];
        self.file.read_exact_at(&mut bytes, 8 + 8 * first)?;
        let packed = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        Ok(packed.map(|packed| unpack(packed, size)).collect())
    }
}

/// A place in 8 bytes: start and length in blocks. `None` if the numbers are too large.
fn pack(place: Place, size: u64) -> Option<u64> {
    let (start, length) = (place.start / BLOCK, place.length.div_ceil(BLOCK));
    let packed = length < 1 << LENGTH_BITS && start < 1 << (u64::BITS - LENGTH_BITS);
    let packed = packed.then_some(start << LENGTH_BITS | length)?;
    (unpack(packed, size) == place).then_some(packed)
}

/// Only the last sample of a shard can end within a block.
fn unpack(packed: u64, size: u64) -> Place {
    let start = (packed >> LENGTH_BITS) * BLOCK;
    let length = (packed & ((1 << LENGTH_BITS) - 1)) * BLOCK;
    Place { start, length: length.min(size.saturating_sub(start)) }
}

/// Indexes those of `shards` that the index of their folder lacks, and stores them in it. One process does it while others
/// wait. Entries of shards that no longer exist are removed. Returns the number of shards
/// whose headers were read.
///
/// # Errors
/// The index cannot be written, or a foreign file has its name.
pub fn update(folder: &Path, shards: &[PathBuf]) -> Result<usize> {
    let path = folder.join(INDEX_FILE);
    let _lock = loop {
        if missing(folder, shards).is_empty() {
            return Ok(0);
        }
        match Lock::try_take(folder, LOCK)? {
            Some(lock) => break lock,
            None => thread::sleep(POLL),
        }
    };
    // Another process may have written it before this one got the lock.
    let missing = missing(folder, shards);
    if missing.is_empty() {
        return Ok(0);
    }
    let old = Index::open(folder);
    let foreign = old.is_none() && path.exists() && !begins_with_magic(&path);
    ensure!(!foreign, failed(format_args!("{} is no index of shards", path.display()), "rename it"));
    if missing.len() >= CHUNK {
        note(format_args!("indexing {} shards of {}, once", missing.len(), folder.display()));
    }
    remove_leftovers(&path);
    write_whole(&path, |file| write(folder, old.as_ref(), &missing, file).map(|()| true))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(missing.len())
}

/// Whether a file is an index, perhaps a damaged one.
pub fn begins_with_magic(path: &Path) -> bool {
    let mut magic = [0; 8];
    open_regular(path).is_ok_and(|file| file.read_exact_at(&mut magic, 0).is_ok() && magic == *MAGIC)
}

/// Those of `shards` that exist and have no valid entry.
fn missing(folder: &Path, shards: &[PathBuf]) -> Vec<PathBuf> {
    let index = Index::open(folder);
    let is_missing = |path: &PathBuf| {
        let Ok(stamp) = Stamp::of(path) else { return false };
        index.as_ref().is_none_or(|index| index.entry(path, stamp).is_none())
    };
    shards.par_iter().filter(|path| is_missing(path)).cloned().collect()
}

fn write(folder: &Path, old: Option<&Index>, shards: &[PathBuf], file: &mut BufWriter<File>) -> Result<()> {
    let is_valid = |entry: &Entry| Stamp::of(&folder.join(&entry.name)).is_ok_and(|stamp| stamp == entry.stamp());
    let new = shards.chunks(CHUNK).flat_map(|chunk| {
        let indexed: Vec<_> = chunk.par_iter().map(|path| read_headers(path)).collect();
        indexed.into_iter().flatten()
    });
    write_entries(old, is_valid, new, file)
}

/// A shard's entry, whose `first` is not yet known, and its packed places.
pub type Indexed = (Entry, Vec<u64>);

/// Writes an index: the entries of an older one that `is_valid` accepts, and new ones.
///
/// # Errors
/// The old index cannot be read, or the file cannot be written.
pub fn write_entries(
    old: Option<&Index>,
    is_valid: impl Fn(&Entry) -> bool,
    new: impl Iterator<Item = Indexed>,
    file: &mut BufWriter<File>,
) -> Result<()> {
    file.write_all(MAGIC)?;
    let (mut entries, mut first) = (Vec::new(), 0);
    for (index, entry) in old.iter().flat_map(|index| index.entries.values().map(move |entry| (index, entry))) {
        if !is_valid(entry) {
            continue;
        }
        copy(&index.file, entry, file)?;
        entries.push(Entry { first, ..entry.clone() });
        first += entry.samples;
    }
    for (entry, places) in new {
        places.iter().try_for_each(|packed| file.write_all(&packed.to_le_bytes()))?;
        first += entry.samples;
        entries.push(Entry { first: first - entry.samples, ..entry });
    }
    let json = serde_json::to_vec(&entries)?;
    file.write_all(&json)?;
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    Ok(file.write_all(MAGIC)?)
}

/// Copies the places of a shard from an older index.
fn copy(from: &File, entry: &Entry, to: &mut impl Write) -> io::Result<()> {
    let mut at = entry.first;
    let end = entry.first + entry.samples;
    while at < end {
        let mut bytes = vec![0; 8 * (end - at).min(COPIED as u64) as usize];
        from.read_exact_at(&mut bytes, 8 + 8 * at)?;
        to.write_all(&bytes)?;
        at += bytes.len() as u64 / 8;
    }
    Ok(())
}

/// Indexes a shard. `None` if it changes meanwhile or has samples that an entry cannot hold; such a shard is indexed in
/// memory when it is read.
fn read_headers(path: &Path) -> Option<Indexed> {
    let stamp = Stamp::of(path).ok()?;
    let indexed = index_file(path, path, path.file_name()?.into(), stamp)?;
    Stamp::of(path).is_ok_and(|after| after == stamp).then_some(indexed)
}

/// Indexes the shard in a file, which messages call `shown`, under a name. `None` if it has samples that an entry cannot
/// hold.
pub fn index_file(path: &Path, shown: &Path, name: PathBuf, stamp: Stamp) -> Option<Indexed> {
    let tar::Index { places, bad } = tar::index(path, shown);
    let packed = places.iter().map(|place| pack(*place, stamp.size)).collect::<Option<Vec<u64>>>()?;
    let Stamp { size, modified } = stamp;
    Some((Entry { name, size, modified, samples: packed.len() as u64, first: 0, bad }, packed))
}
