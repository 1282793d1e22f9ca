//! The index of a tar shard. Only headers are read, and nothing is unpacked to disk.
//!
//! A sample is a run of adjacent members `KEY.ext` (the WebDataset convention). Its [`Place`] is the byte range from
//! its first header to the end of its last member.

use super::{
    bad::{Bad, BadCounts, Cause},
    members::Members,
    source_file::{foreign_format, open_regular},
};
use crate::error::{Result, ensure};
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, BufReader, Cursor, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::Path,
};
use tar::{EntryType, Header};

/// Maximum size of the members read of one sample, in bytes, without headers.
const MAX_SAMPLE: u64 = 128 << 20;
/// Buffer size for reading a sample, in bytes.
const READ_AHEAD: u64 = 64 << 10;
/// Maximum size of an extended header (PAX or GNU long name), in bytes.
const MAX_EXTENSION: u64 = 64 << 10;
const BLOCK: u64 = 512;
/// GNU tar and Python pad archives to a multiple of this many bytes.
const RECORD: u64 = 20 * BLOCK;

/// The byte range of a sample in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub(super) start: u64,
    pub(super) length: u64,
}

/// The samples of one shard, and its damage.
#[derive(Debug, Default)]
pub struct Index {
    pub places: Vec<Place>,
    pub bad: BadCounts,
}

/// A member's name, split at the first dot after the last slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub key: String,
    pub extension: String,
}

/// Lists the samples of a shard, which messages call `shown`. Damage is counted; the rest of the shard stays usable.
pub fn index(path: &Path, shown: &Path) -> Index {
    let mut index = Index::default();
    let shown = shown.display().to_string();
    if let Err(bad) = open_and_list(path, &shown, &mut index) {
        index.bad.add(Bad::new(bad.cause, format_args!("{shown}: {}", bad.place)));
    }
    index
}

fn open_and_list(path: &Path, shown: &str, index: &mut Index) -> Result<(), Bad> {
    let unreadable = |e| Bad::new(Cause::Unreadable, e);
    let mut file = open_regular(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    if length == 0 {
        return Err(Bad::new(Cause::BrokenTar, "the file is empty"));
    }
    let mut head = Vec::new();
    Read::by_ref(&mut file).take(BLOCK).read_to_end(&mut head).map_err(unreadable)?;
    if !is_header(&head)
        && let Some(format) = foreign_format(&head)
    {
        return Err(Bad::new(Cause::NotATar, format));
    }
    file.rewind().map_err(unreadable)?;
    list(&mut Walker::new(BufReader::new(file), length), index, shown);
    Ok(())
}

fn list<R: Read + Seek>(walker: &mut Walker<R>, index: &mut Index, shown: &str) {
    let mut seen = HashSet::new();
    let mut open: Option<(String, Range<u64>)> = None;
    loop {
        let member = walker.next();
        if let Ok(Some(Member { begins_archive: true, .. })) = member
            && let Some((key, range)) = open.take()
        {
            close(&key, range, &mut seen, index, shown);
        }
        if let Some(bad) = walker.gap.take() {
            index.bad.add(Bad::new(bad.cause, format_args!("{shown}: {}", bad.place)));
        }
        let next = match member {
            Ok(Some(member)) => match member.name {
                Ok(Some(name)) => Some((name.key, member.header..member.end)),
                Ok(None) => continue,
                Err(bad) => {
                    index.bad.add(Bad::new(bad.cause, format_args!("{shown}: {}", bad.place)));
                    continue;
                }
            },
            Ok(None) => {
                if walker.at == walker.length && !walker.length.is_multiple_of(BLOCK) {
                    index.bad.add(Bad::new(Cause::BrokenTar, format_args!("{shown}: the last block is truncated")));
                }
                None
            }
            Err(bad) => {
                index.bad.add(Bad::new(bad.cause, format_args!("{shown}: {}", bad.place)));
                None
            }
        };
        match (&mut open, &next) {
            (Some((key, range)), Some((next_key, next_range))) if key == next_key => range.end = next_range.end,
            _ => {
                if let Some((key, range)) = open.take() {
                    close(&key, range, &mut seen, index, shown);
                }
                if next.is_none() {
                    return;
                }
                open = next;
            }
        }
    }
}

/// Adds a finished sample to the index.
fn close(key: &str, range: Range<u64>, seen: &mut HashSet<u64>, index: &mut Index, shown: &str) {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    if seen.insert(hasher.finish()) {
        index.places.push(Place { start: range.start, length: range.end - range.start });
    } else {
        index.bad.add(Bad::new(Cause::Duplicate, format_args!("{shown}: {key}")));
    }
}

/// Reads a sample of a shard, which messages call `shown`: its key, and those of its members whose extension `wants`
/// accepts. Other members are skipped.
///
/// # Errors
/// The shard cannot be read, a wanted member occurs twice, or the wanted members exceed 128 MiB.
pub fn read(path: &Path, shown: &Path, place: Place, wants: impl Fn(&str) -> bool) -> Result<(String, Members), Bad> {
    let in_shard = |bad: Bad| Bad::new(bad.cause, format_args!("{}: {}", shown.display(), bad.place));
    let opened = open_regular(path).and_then(|mut file| file.seek(SeekFrom::Start(place.start)).map(|_| file));
    let file = opened.map_err(|e| in_shard(Bad::new(Cause::Unreadable, e)))?;
    let buffer = place.length.clamp(BLOCK, READ_AHEAD) as usize;
    let mut walker = Walker::new(BufReader::with_capacity(buffer, file), place.length);
    read_members(&mut walker, wants).map_err(in_shard)
}

/// Copies the members of a sample, headers included.
///
/// # Errors
/// The shard cannot be read, or the output cannot be written.
pub fn copy(path: &Path, place: Place, output: &mut impl Write) -> Result<()> {
    let mut file = open_regular(path)?;
    file.seek(SeekFrom::Start(place.start))?;
    let copied = io::copy(&mut file.take(place.length), output)?;
    ensure!(copied == place.length, "{} is shorter than before", path.display());
    // Only the last member of an archive can lack its padding.
    let padding = copied.next_multiple_of(BLOCK) - copied;
    Ok(output.write_all(&vec![0; padding as usize])?)
}

/// Reads a sample, as [`read`], from its bytes.
///
/// # Errors
/// As [`read`].
pub fn parse(shown: &Path, sample: &[u8], wants: impl Fn(&str) -> bool) -> Result<(String, Members), Bad> {
    let mut walker = Walker::new(Cursor::new(sample), sample.len() as u64);
    read_members(&mut walker, wants)
        .map_err(|bad| Bad::new(bad.cause, format_args!("{}: {}", shown.display(), bad.place)))
}

fn read_members<R: Read + Seek>(
    walker: &mut Walker<R>,
    wants: impl Fn(&str) -> bool,
) -> Result<(String, Members), Bad> {
    let (mut sample_key, mut members) = (String::new(), Members::default());
    while let Some(member) = walker.next()? {
        // Refused members were already counted when the shard was indexed.
        let Ok(Some(Name { key, extension })) = &member.name else { continue };
        if wants(extension) {
            if members.get(extension).is_some() {
                return Err(Bad::new(Cause::Duplicate, format_args!("{key}.{extension}")));
            }
            let size = member.data.end - member.data.start;
            if members.bytes().len() as u64 + size > MAX_SAMPLE {
                return Err(Bad::new(Cause::TooLarge, format_args!("{key}.{extension}")));
            }
            walker.content(size, members.bytes())?;
            members.end_member(extension);
        } else {
            members.skip(extension);
        }
        if sample_key.is_empty() {
            sample_key.clone_from(key);
        }
    }
    Ok((sample_key, members))
}

/// One member; `name` is `None` if it belongs to no sample (folders, files without extension).
struct Member {
    name: Result<Option<Name>, Bad>,
    header: u64,
    data: Range<u64>,
    end: u64,
    /// Whether zero blocks precede it: one archive ended and another one starts here.
    begins_archive: bool,
}

/// Walks over the headers of a tar.
struct Walker<R> {
    reader: R,
    at: u64,
    length: u64,
    /// The end of the last member.
    next_at: u64,
    /// Start of the current archive in a file of concatenated archives.
    archive: u64,
    /// Zero blocks between members that do not end an archive.
    gap: Option<Bad>,
}

impl<R: Read + Seek> Walker<R> {
    fn new(reader: R, length: u64) -> Self {
        Self { reader, at: 0, length, next_at: 0, archive: 0, gap: None }
    }

    /// The next member.
    ///
    /// # Errors
    /// The tar is damaged so that no further member can be found.
    fn next(&mut self) -> Result<Option<Member>, Bad> {
        self.skip_to(self.next_at)?;
        let archive = self.archive;
        let mut header_at = None;
        let mut long_name: Option<Result<Vec<u8>, Bad>> = None;
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let header_at = *header_at.get_or_insert(self.at - BLOCK);
            let size = header.entry_size().map_err(|_| self.broken("a size field that is not a number"))?;
            let start = self.at;
            let end = start.checked_add(size).filter(|end| *end <= self.length);
            let end = end.ok_or_else(|| {
                self.broken(format_args!("a member of {size} bytes extends beyond the end of the file"))
            })?;
            let padded = end.next_multiple_of(BLOCK).min(self.length);
            let kind = header.entry_type();
            match kind {
                EntryType::XHeader | EntryType::GNULongName => long_name = Some(self.extension(kind, size)?),
                EntryType::XGlobalHeader | EntryType::GNULongLink => {}
                _ => {
                    self.next_at = padded;
                    let name = member_name(&header, kind, long_name);
                    let begins_archive = self.archive != archive;
                    let data = start..end;
                    return Ok(Some(Member { name, header: header_at, data, end: padded, begins_archive }));
                }
            }
            self.skip_to(padded)?;
        }
    }

    /// The next header, also of a concatenated archive; `None` at the end of the file.
    fn header(&mut self) -> Result<Option<Header>, Bad> {
        let first = self.at;
        let mut header = Header::new_old();
        loop {
            let zeros = (self.at - first) / BLOCK;
            if self.at == self.length || (zeros > 0 && self.length - self.at < BLOCK) {
                return Ok(None);
            }
            self.reader.read_exact(header.as_mut_bytes()).map_err(|_| self.broken("a header is truncated"))?;
            if is_header(header.as_bytes()) {
                if zeros > 0 {
                    self.begin_archive(first, zeros);
                }
                self.at += BLOCK;
                return Ok(Some(header));
            }
            if header.as_bytes().iter().any(|byte| *byte != 0) {
                let what = if zeros > 0 { "bytes that are not a tar header" } else { "a header's checksum is wrong" };
                return Err(self.broken(what));
            }
            self.at += BLOCK;
        }
    }

    /// Called when a header follows `zeros` zero blocks. Only complete records reliably end an archive; other zero
    /// blocks may have overwritten members.
    fn begin_archive(&mut self, first: u64, zeros: u64) {
        if zeros < 2 || !(self.at - self.archive).is_multiple_of(RECORD) {
            let what = format_args!("byte {first}: {zeros} zero blocks between members");
            self.gap = Some(Bad::new(Cause::BrokenTar, what));
        }
        self.archive = self.at;
    }

    /// Appends the next `size` bytes, the content of the member that [`Walker::next`] returned.
    fn content(&mut self, size: u64, bytes: &mut Vec<u8>) -> Result<(), Bad> {
        let start = bytes.len();
        bytes.resize(start + size as usize, 0);
        self.reader.read_exact(&mut bytes[start..]).map_err(|e| Bad::new(Cause::Unreadable, e))?;
        self.at += size;
        Ok(())
    }

    /// The name that an extended header gives to the next member.
    fn extension(&mut self, kind: EntryType, size: u64) -> Result<Result<Vec<u8>, Bad>, Bad> {
        if size > MAX_EXTENSION {
            return Ok(Err(Bad::new(Cause::TooLarge, format_args!("an extended header of {size} bytes"))));
        }
        let mut content = vec![0; size as usize];
        self.reader.read_exact(&mut content).map_err(|_| self.broken("an extended header is truncated"))?;
        self.at += size;
        if kind == EntryType::GNULongName {
            while content.last() == Some(&0) {
                content.pop();
            }
            return Ok(Ok(content));
        }
        let mut name = Vec::new();
        for record in tar::PaxExtensions::new(&content) {
            match record {
                Ok(record) if record.key_bytes() == b"path" => name = record.value_bytes().to_vec(),
                // Only members above 8 GiB need a PAX size, and those exceed the limits.
                Ok(record) if record.key_bytes() == b"size" => {
                    return Ok(Err(Bad::new(Cause::TooLarge, "a member with a PAX size")));
                }
                Ok(_) => {}
                Err(_) => return Ok(Err(Bad::new(Cause::BrokenTar, "an extended header that cannot be parsed"))),
            }
        }
        Ok(Ok(name))
    }

    fn skip_to(&mut self, offset: u64) -> Result<(), Bad> {
        let distance = i64::try_from(offset - self.at).map_err(|_| self.broken("a member is too long"))?;
        self.reader.seek_relative(distance).map_err(|e| Bad::new(Cause::Unreadable, e))?;
        self.at = offset;
        Ok(())
    }

    fn broken(&self, what: impl std::fmt::Display) -> Bad {
        Bad::new(Cause::BrokenTar, format_args!("byte {}: {what}", self.at))
    }
}

/// Whether a block is a tar header, by its checksum.
fn is_header(block: &[u8]) -> bool {
    let Some(block) = block.first_chunk::<{ BLOCK as usize }>() else { return false };
    let mut header = Header::new_old();
    header.as_mut_bytes().copy_from_slice(block);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    let field: u32 = header.as_old().cksum.iter().map(|byte| u32::from(*byte)).sum();
    let sum = sum - field + 8 * u32::from(b' ');
    header.cksum().is_ok_and(|expected| expected == sum)
}

fn member_name(header: &Header, kind: EntryType, long: Option<Result<Vec<u8>, Bad>>) -> Result<Option<Name>, Bad> {
    let bytes = match long.transpose()? {
        Some(name) if !name.is_empty() => name,
        _ => header.path_bytes().into_owned(),
    };
    let name = safe_name(&bytes)?;
    match kind {
        EntryType::Regular => Ok(split_name(&name)),
        EntryType::Directory => Ok(None),
        _ => Err(Bad::new(Cause::NotAFile, name)),
    }
}

/// A member's name without empty and `.` components. Nothing is unpacked under these names, but codes are stored under
/// them, and other tools would refuse absolute names and `..`.
fn safe_name(bytes: &[u8]) -> Result<String, Bad> {
    let refuse = || Bad::new(Cause::UnsafeName, String::from_utf8_lossy(bytes).escape_debug());
    let name = std::str::from_utf8(bytes).map_err(|_| refuse())?;
    let absolute = name.trim_start_matches("./").starts_with('/') || name.starts_with('/');
    let unsafe_part = absolute || name.split('/').any(|part| part == "..");
    if unsafe_part || name.chars().any(char::is_control) {
        return Err(refuse());
    }
    Ok(name.split('/').filter(|part| !["", "."].contains(part)).collect::<Vec<_>>().join("/"))
}

/// `dir/000000012.png` is (`dir/000000012`, `png`).
fn split_name(name: &str) -> Option<Name> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name.get(base..)?.find('.')?;
    let (key, extension) = (name.get(..dot)?, name.get(dot + 1..)?);
    let complete = dot > base && !extension.is_empty();
    complete.then(|| Name { key: key.to_owned(), extension: extension.to_ascii_lowercase() })
}
