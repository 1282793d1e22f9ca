//! A remote source: its shards, read through the cache, with an index of their samples in the folder of the cache.

use super::{
    codes::{CODES_FILE, CodesInfo},
    index::{self, Entry, INDEX_FILE, Index, Indexed, Stamp, begins_with_magic},
    output::{Lock, remove_leftovers, write_whole},
    remote::{Cache, RemoteFile, RemoteShard, list},
    shard::Shard,
};
use crate::{
    error::{Context, Error, Hint, Result, ensure, failed},
    report,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, iter,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Time between two looks for the index that another process writes.
const POLL: Duration = Duration::from_millis(200);
/// Time after which an index in progress is stored; doubled each time.
const STORE_AFTER: Duration = Duration::from_secs(60);
/// Maximum number of shards that are downloaded ahead while an index is made.
const AHEAD: u64 = 4;

/// Lists and indexes the shards of a remote source. A shard without an entry in the index is downloaded once, unless the
/// `.shards.index` beside it has one.
///
/// # Errors
/// The source cannot be listed, a shard cannot be downloaded, or the folder of the cache cannot be written.
pub fn open(source: &str, cache: &Cache) -> Result<Vec<Shard>> {
    let shards = list(source)?;
    let index = Arc::new(open_index(source, &shards, cache)?);
    let open = |shard: RemoteShard| {
        let entry = find(&index, &shard).context("a shard without an index")?;
        let Stamp { size, modified } = entry.stamp();
        let name = shard.name.clone();
        let file = RemoteFile::new(cache.clone(), shard, size, Some(modified).filter(|digest| *digest != 0));
        Ok(Shard::remote(file, name, &index, entry))
    };
    shards.into_iter().map(open).collect()
}

/// The `codes.json` beside the first shard of a source.
///
/// # Errors
/// The source cannot be listed, or there is no such file.
pub fn codes(source: &str, cache: &Cache) -> Result<CodesInfo> {
    let first = list(source)?.into_iter().next().context("no shards")?;
    codes_beside(&first, cache)
}

/// The `codes.json` in the folder of a shard.
///
/// # Errors
/// There is no such file, or it cannot be downloaded.
pub fn codes_of(shard: &Shard) -> Result<CodesInfo> {
    match shard.remote_file() {
        Some(file) => codes_beside(file.shard(), file.cache()),
        None => CodesInfo::read(shard.path.parent().unwrap_or(Path::new("."))),
    }
}

fn codes_beside(shard: &RemoteShard, cache: &Cache) -> Result<CodesInfo> {
    let cached = cache.renew(&shard.beside(CODES_FILE))?;
    CodesInfo::read_file(cached.path())
}

/// The valid entry of a shard.
fn find<'a>(index: &'a Index, shard: &RemoteShard) -> Option<&'a Entry> {
    let entry = index.named(Path::new(&shard.key()))?;
    shard.size.is_none_or(|size| size == entry.size).then_some(entry)
}

/// Opens the index of a source. One process makes it while others wait.
fn open_index(source: &str, shards: &[RemoteShard], cache: &Cache) -> Result<Index> {
    let folder = cache.folder();
    let hint = "set data.cache_dir (--cache-dir) to another folder";
    fs::create_dir_all(folder).hint(format_args!("cannot create {}", folder.display()), hint)?;
    let name = format!("{:.32}.index", blake3::hash(source.as_bytes()).to_hex());
    let path = folder.join(&name);
    let _lock = loop {
        if let Some(index) = Index::open_file(&path)
            && missing(Some(&index), shards).is_empty()
        {
            return Ok(index);
        }
        match Lock::try_take(folder, &format!("{name}.lock"))? {
            Some(lock) => break lock,
            None => thread::sleep(POLL),
        }
    };
    ensure!(!path.exists() || begins_with_magic(&path), failed(format_args!("{} is no index", path.display()), hint));
    remove_leftovers(&path);
    make_index(&path, shards, cache).with_context(|| format!("cannot index {}", shards_of(shards)))
}

fn shards_of(shards: &[RemoteShard]) -> String {
    match shards {
        [first, .., last] => format!("{} .. {}", first.url(), last.url()),
        _ => shards.first().map(RemoteShard::url).unwrap_or_default(),
    }
}

/// The shards that the index lacks.
fn missing<'s>(index: Option<&Index>, shards: &'s [RemoteShard]) -> Vec<&'s RemoteShard> {
    shards.iter().filter(|shard| index.is_none_or(|index| find(index, shard).is_none())).collect()
}

fn make_index(path: &Path, shards: &[RemoteShard], cache: &Cache) -> Result<Index> {
    let names: BTreeSet<PathBuf> = shards.iter().map(|shard| shard.key().into()).collect();
    let stored = stored_indexes(&missing(Index::open_file(path).as_ref(), shards), cache);
    let mut store_after = STORE_AFTER;
    loop {
        let old = Index::open_file(path);
        let missing = missing(old.as_ref(), shards);
        if store_after == STORE_AFTER {
            let unknown = missing.iter().filter(|shard| stored.entry(shard).is_none()).count();
            report::note(format_args!("indexing {} remote shards, once; {unknown} are downloaded", missing.len()));
        }
        let mut maker = Maker { cache, stored: &stored, missing: &missing, at: 0, ahead: 0, largest: 0, error: None };
        let end = Instant::now() + store_after;
        // At least one, however long it takes.
        let new = iter::from_fn(|| (maker.at == 0 || Instant::now() < end).then(|| maker.next())?);
        let is_valid = |entry: &Entry| names.contains(&entry.name);
        write_whole(path, |file| index::write_entries(old.as_ref(), is_valid, new, file).map(|()| true))
            .with_context(|| format!("cannot write {}", path.display()))?;
        if let Some(error) = maker.error {
            return Err(error);
        }
        if maker.at == missing.len() {
            return Index::open_file(path).with_context(|| format!("cannot read {}", path.display()));
        }
        store_after *= 2;
    }
}

/// The indexes that `vilg data build` and `vilg data encode` wrote beside the shards.
struct Stored(BTreeMap<String, Index>);

fn stored_indexes(shards: &[&RemoteShard], cache: &Cache) -> Stored {
    let files: BTreeMap<String, RemoteShard> =
        shards.iter().map(|shard| shard.beside(INDEX_FILE)).map(|file| (file.key(), file)).collect();
    let open = |(key, file): (String, RemoteShard)| match cache.renew(&file) {
        Ok(cached) => Some((key, Index::open_file(cached.path())?)),
        Err(error) => {
            report::detail(format_args!("{error:#}"));
            None
        }
    };
    // The output of a command cannot be asked whether it exists.
    let files = files.into_iter().filter(|(_, file)| !file.url().starts_with("pipe:"));
    Stored(files.filter_map(open).collect())
}

impl Stored {
    /// The entry of a shard, with the index that has it.
    fn entry(&self, shard: &RemoteShard) -> Option<(&Index, &Entry)> {
        let index = self.0.get(&shard.beside(INDEX_FILE).key())?;
        let entry = index.named(Path::new(shard.name.file_name()?))?;
        shard.size.is_none_or(|size| size == entry.size).then_some((index, entry))
    }
}

/// Makes the entries of shards.
struct Maker<'a> {
    cache: &'a Cache,
    stored: &'a Stored,
    missing: &'a [&'a RemoteShard],
    /// Number of the next shard.
    at: usize,
    /// Number of the next shard to download ahead.
    ahead: usize,
    /// Size of the largest shard so far, in bytes.
    largest: u64,
    /// Why it ended early.
    error: Option<Error>,
}

impl Maker<'_> {
    fn next(&mut self) -> Option<Indexed> {
        let shard = self.missing.get(self.at)?;
        match self.index(shard) {
            Ok(indexed) => {
                self.at += 1;
                Some(indexed)
            }
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }

    fn index(&mut self, shard: &RemoteShard) -> Result<Indexed> {
        let name = PathBuf::from(shard.key());
        if let Some((index, entry)) = self.stored.entry(shard) {
            // Its time is that of the file where it was made.
            return Ok((Entry { name, modified: 0, ..entry.clone() }, index.packed(entry)?));
        }
        let cached = self.cache.get(shard)?;
        self.largest = self.largest.max(cached.size());
        self.download_ahead();
        let stamp = Stamp { size: cached.size(), modified: cached.short_digest() };
        let indexed = index::index_file(cached.path(), Path::new(&shard.url()), name, stamp);
        indexed.hint(format_args!("{} has a sample of more than 8 GB", shard.url()), "write smaller samples")
    }

    /// Leaves most of the cache to the shards that are used now.
    fn download_ahead(&mut self) {
        let count = (self.cache.max_bytes() / 4 / self.largest.max(1)).min(AHEAD) as usize;
        let end = (self.at + 1 + count).min(self.missing.len());
        for shard in self.missing.get(self.ahead.max(self.at + 1)..end).unwrap_or_default() {
            if self.stored.entry(shard).is_none() {
                self.cache.prefetch([(*shard).clone()]);
            }
        }
        self.ahead = end.max(self.ahead);
    }
}
