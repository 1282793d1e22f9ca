//! A shard: a tar, or the images of a folder.

use super::{
    bad::{Bad, BadCounts, Cause},
    codes::CodesInfo,
    index::{Entry, Index, Stamp},
    keys::keys,
    members::Members,
    record::{Kind, Record, wants},
    remote::{Cached, RemoteFile},
    source_file,
    tar::{self, Place},
};
use crate::error::{Context, Result, anyhow};
use std::{
    fs,
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::UNIX_EPOCH,
};

/// A tar shard, or the images of a folder.
#[derive(Debug)]
pub struct Shard {
    /// Path, or URL without secrets.
    pub path: PathBuf,
    /// Path below the source's folder. Derived shards are written under this name.
    pub name: PathBuf,
    samples: Samples,
    /// Damage of the shard itself.
    pub bad: BadCounts,
    remote: Option<Arc<RemoteFile>>,
}

/// The file of a shard on this machine.
enum Local<'a> {
    Path(&'a Path),
    /// It stays in the cache while this exists.
    Cached(Arc<Cached>),
}

impl Local<'_> {
    fn path(&self) -> &Path {
        match self {
            Self::Path(path) => path,
            Self::Cached(cached) => cached.path(),
        }
    }
}

#[derive(Debug)]
enum Samples {
    Tar(Vec<Place>),
    /// A tar whose places are in a stored index.
    Indexed {
        index: Arc<Index>,
        first: u64,
        count: u64,
        /// Size of the tar in bytes.
        size: u64,
    },
    Files(Vec<ImageFile>),
}

/// An image file in a folder.
#[derive(Debug)]
struct ImageFile {
    path: PathBuf,
    /// Unique among the images of its source; contains no dots.
    key: String,
}

impl Shard {
    /// Indexes a tar shard by reading its headers. Damage is counted in `bad`.
    pub(super) fn tar(path: PathBuf, name: PathBuf) -> Self {
        let tar::Index { places, bad } = tar::index(&path, &path);
        Self { path, name, samples: Samples::Tar(places), bad, remote: None }
    }

    /// A remote tar shard from the index of its source.
    pub(super) fn remote(file: RemoteFile, name: PathBuf, index: &Arc<Index>, entry: &Entry) -> Self {
        let (path, bad) = (file.url().into(), entry.bad.clone());
        let (index, first, count, size) = (index.clone(), entry.first, entry.samples, file.size());
        Self { path, name, samples: Samples::Indexed { index, first, count, size }, bad, remote: Some(Arc::new(file)) }
    }

    /// The remote file; `None` of a shard on this machine.
    pub fn remote_file(&self) -> Option<&Arc<RemoteFile>> {
        self.remote.as_ref()
    }

    /// Downloads a remote shard that is not in the cache. It is kept there while the result exists. `stop` ends the download
    /// early.
    ///
    /// # Errors
    /// The download fails, or the shard has changed.
    pub fn hold(&self, stop: &AtomicBool) -> Result<Option<Arc<Cached>>> {
        self.remote.as_ref().map(|file| file.get(stop)).transpose()
    }

    /// As [`Shard::hold`], before all samples of the shard are read; also downloads the next shard in the background.
    ///
    /// # Errors
    /// As [`Shard::hold`].
    pub fn hold_before(&self, next: Option<&Self>) -> Result<Option<Arc<Cached>>> {
        let held = self.hold(&AtomicBool::new(false))?;
        if let Some(file) = next.and_then(|next| next.remote.clone()) {
            // The error appears when it is wanted.
            file.cache().clone().in_background(move |stop| drop(file.get(stop)));
        }
        Ok(held)
    }

    /// The file on this machine, for reading.
    ///
    /// # Errors
    /// It is remote and cannot be downloaded.
    fn local(&self) -> Result<Local<'_>, Bad> {
        match self.hold(&AtomicBool::new(false)) {
            Ok(Some(cached)) => Ok(Local::Cached(cached)),
            Ok(None) => Ok(Local::Path(&self.path)),
            Err(error) => Err(Bad::new(Cause::NotFetched, format_args!("{error:#}"))),
        }
    }

    /// Reads bytes of a tar.
    ///
    /// # Errors
    /// The file cannot be read, or it is remote and cannot be downloaded.
    pub(super) fn read_at(&self, bytes: &mut [u8], start: u64) -> Result<(), Bad> {
        let read = source_file::open_regular(self.local()?.path()).and_then(|file| file.read_exact_at(bytes, start));
        read.map_err(|e| Bad::new(Cause::Unreadable, format_args!("{}: {e}", self.path.display())))
    }

    /// The absolute path, or the URL.
    ///
    /// # Errors
    /// The file no longer exists.
    pub fn origin(&self) -> Result<PathBuf> {
        match self.remote {
            Some(_) => Ok(self.path.clone()),
            None => fs::canonicalize(&self.path).with_context(|| format!("cannot find {}", self.path.display())),
        }
    }

    /// A tar shard from the index of its folder, if that has it; otherwise as [`Shard::tar`].
    pub(super) fn indexed(path: PathBuf, name: PathBuf, stamp: Option<Stamp>, index: Option<&Arc<Index>>) -> Self {
        let found = index.and_then(|index| {
            let stamp = stamp?;
            let entry = index.entry(&path, stamp)?;
            let (first, count, size) = (entry.first, entry.samples, stamp.size);
            Some((Samples::Indexed { index: index.clone(), first, count, size }, entry.bad.clone()))
        });
        match found {
            Some((samples, bad)) => Self { path, name, samples, bad, remote: None },
            None => Self::tar(path, name),
        }
    }

    /// The images of a folder, given with their paths below it.
    pub(super) fn folder(folder: &str, images: Vec<(PathBuf, PathBuf)>) -> Self {
        let keys = keys(images.iter().map(|(_, below)| below.as_path()));
        let images = images.into_iter().zip(keys).map(|((path, _), key)| ImageFile { path, key });
        let samples = Samples::Files(images.collect());
        Self { path: folder.into(), name: "00000.tar".into(), samples, bad: BadCounts::default(), remote: None }
    }

    /// Number of samples.
    pub fn len(&self) -> u64 {
        match &self.samples {
            Samples::Tar(places) => places.len() as u64,
            Samples::Indexed { count, .. } => *count,
            Samples::Files(images) => images.len() as u64,
        }
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Digest of the shard's name, its samples and file sizes; with `times` also of the modification times, or the version
    /// of a remote shard.
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
            Samples::Tar(_) | Samples::Indexed { .. } => {
                if let Some(remote) = &self.remote {
                    hasher.update(&remote.size().to_le_bytes());
                    hasher.update(if times { remote.version() } else { String::new() }.as_bytes());
                } else {
                    file(&mut hasher, &self.path)
                        .with_context(|| format!("cannot read the metadata of {}", self.path.display()))?;
                }
                let places = self.places(0..self.len() as usize);
                for Place { start, length } in places.map_err(|bad| anyhow!("{}: {}", bad.cause, bad.place))? {
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
            Samples::Tar(_) | Samples::Indexed { .. } => self.place(index).map_or(0, |place| place.length),
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
        match &self.samples {
            Samples::Tar(_) | Samples::Indexed { .. } => {
                let (local, place) = (self.local()?, self.place(index)?);
                tar::read(local.path(), &self.path, place, |extension| wants(kind, extension))
            }
            Samples::Files(images) => read_files(images.get(index).ok_or_else(|| self.missing(index))?, kind),
        }
    }

    /// The key of sample `index`.
    ///
    /// # Errors
    /// The shard cannot be read.
    pub fn key(&self, index: usize) -> Result<String, Bad> {
        if let Samples::Files(images) = &self.samples {
            return images.get(index).map(|image| image.key.clone()).ok_or_else(|| self.missing(index));
        }
        let (local, place) = (self.local()?, self.place(index)?);
        tar::read(local.path(), &self.path, place, |_| false).map(|(key, _)| key)
    }

    /// The places of consecutive samples of a tar.
    ///
    /// # Errors
    /// There are no such samples, or the stored index cannot be read.
    pub(super) fn places(&self, range: Range<usize>) -> Result<Vec<Place>, Bad> {
        let missing = || self.missing(range.start);
        match &self.samples {
            Samples::Tar(places) => places.get(range.clone()).map(<[Place]>::to_vec).ok_or_else(missing),
            Samples::Indexed { index, first, count, size } => {
                if range.end as u64 > *count {
                    return Err(missing());
                }
                let read = index.places(first + range.start as u64, range.len(), *size);
                read.map_err(|e| Bad::new(Cause::Unreadable, format_args!("index of {}: {e}", self.path.display())))
            }
            Samples::Files(_) => Err(missing()),
        }
    }

    /// Number of samples that fill a block of about `bytes` bytes of a tar; `None` for a folder.
    pub(super) fn samples_per_block(&self, bytes: u64) -> Option<usize> {
        let (size, count) = match &self.samples {
            Samples::Tar(places) => (places.last()?.start, places.len() as u64),
            Samples::Indexed { size, count, .. } => (*size, *count),
            Samples::Files(_) => return None,
        };
        Some((bytes / (size / count.max(1)).max(1)).max(1) as usize)
    }

    fn place(&self, index: usize) -> Result<Place, Bad> {
        let place = self.places(index..index + 1)?.first().copied();
        place.ok_or_else(|| self.missing(index))
    }

    fn missing(&self, index: usize) -> Bad {
        Bad::new(Cause::Unreadable, format_args!("{}: sample {index}", self.path.display()))
    }

    /// Copies all members of sample `index` byte by byte; false, without writing, if the shard is not a tar.
    ///
    /// # Errors
    /// The shard cannot be read, or the output cannot be written.
    pub fn copy(&self, index: usize, output: &mut impl Write) -> Result<bool> {
        match &self.samples {
            Samples::Tar(_) | Samples::Indexed { .. } => {
                let error = |bad: Bad| anyhow!("{}: {}", bad.cause, bad.place);
                let (local, place) = (self.local().map_err(error)?, self.place(index).map_err(error)?);
                tar::copy(local.path(), place, output).map(|()| true)
            }
            Samples::Files(_) => Ok(false),
        }
    }

    /// Reads sample `index`.
    ///
    /// # Errors
    /// The sample is bad.
    pub fn read(&self, index: usize, kind: Kind, codes: Option<&CodesInfo>) -> Result<Record, Bad> {
        let (key, members) = self.members(index, Some(kind))?;
        self.parse(&key, &members, kind, codes, &[])
    }

    /// Parses the members of a sample of this shard; errors and warnings name shard and key.
    pub(super) fn parse(
        &self,
        key: &str,
        members: &Members,
        kind: Kind,
        codes: Option<&CodesInfo>,
        caption_keys: &[String],
    ) -> Result<Record, Bad> {
        let record = Record::parse(key, members, kind, codes, caption_keys).map_err(|bad| self.locate(key, bad))?;
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
