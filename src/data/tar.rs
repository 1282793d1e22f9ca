//! Where the samples lie in a tar shard. Headers only are read, nothing is ever unpacked.
//!
//! A sample is a run of neighbouring members `KEY.ext` (the WebDataset convention); its [`Place`] is the
//! byte range from its first header to the end of its last member, so one read fetches all of it.

use super::bad::{Bad, BadCounts, Cause};
use std::{
    collections::HashSet,
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    io::{BufReader, Cursor, Read, Seek, SeekFrom},
    ops::Range,
    path::Path,
};
use tar::{EntryType, Header};

/// Largest sample that is read, headers included.
const MAX_SAMPLE: u64 = 128 << 20;
/// Largest extended header (PAX or GNU long name) that is read.
const MAX_EXTENSION: u64 = 64 << 10;
const BLOCK: u64 = 512;

/// Where a sample lies in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    start: u64,
    length: u32,
}

/// The samples of one shard, and what was wrong with it.
#[derive(Debug, Default)]
pub struct Index {
    pub places: Vec<Place>,
    pub bad: BadCounts,
}

/// A member's name, cut at the first dot behind the last slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub key: String,
    pub extension: String,
}

/// Lists the samples of a shard. What is wrong is counted; the rest of the shard stays usable.
pub fn index(path: &Path) -> Index {
    let mut index = Index::default();
    let shown = path.display();
    match File::open(path).and_then(|file| Ok((file.metadata()?.len(), file))) {
        Ok((length, file)) => list(&mut Walker::new(BufReader::new(file), length), &mut index, &shown.to_string()),
        Err(e) => index.bad.add(Bad::new(Cause::Unreadable, format_args!("{shown}: {e}"))),
    }
    index
}

fn list<R: Read + Seek>(walker: &mut Walker<R>, index: &mut Index, shown: &str) {
    let mut seen = HashSet::new();
    let mut open: Option<(String, Range<u64>)> = None;
    loop {
        let member = walker.next();
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
                    index.bad.add(Bad::new(Cause::BrokenTar, format_args!("{shown}: the last block is cut")));
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
    let length = range.end - range.start;
    let cause = if length > MAX_SAMPLE {
        Cause::TooLarge
    } else if !seen.insert(hasher.finish()) {
        Cause::Duplicate
    } else {
        return index.places.push(Place { start: range.start, length: length as u32 });
    };
    index.bad.add(Bad::new(cause, format_args!("{shown}: {key}")));
}

/// Reads a sample: its key and its members by extension.
pub fn read(path: &Path, place: Place) -> Result<(String, Members), Bad> {
    let mut bytes = vec![0; place.length as usize];
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(place.start))?;
        file.read_exact(&mut bytes)
    });
    read.map_err(|e| Bad::new(Cause::Unreadable, format_args!("{}: {e}", path.display())))?;
    let mut sample_key = String::new();
    let mut members: Vec<(String, Range<usize>)> = Vec::new();
    let mut walker = Walker::new(Cursor::new(&bytes), u64::from(place.length));
    while let Some(member) = walker.next()? {
        // Refused members were counted when the shard was indexed.
        let Ok(Some(Name { key, extension })) = member.name else { continue };
        if members.iter().any(|(other, _)| *other == extension) {
            return Err(Bad::new(Cause::Duplicate, format_args!("{}: {key}.{extension}", path.display())));
        }
        members.push((extension, member.data.start as usize..member.data.end as usize));
        sample_key = key;
    }
    Ok((sample_key, Members { bytes, members }))
}

/// The members of one sample.
#[derive(Debug, Default)]
pub struct Members {
    bytes: Vec<u8>,
    members: Vec<(String, Range<usize>)>,
}

impl Members {
    /// The content of the member with this extension.
    pub fn get(&self, extension: &str) -> Option<&[u8]> {
        let (_, range) = self.members.iter().find(|(other, _)| other == extension)?;
        self.bytes.get(range.clone())
    }

    /// Adds a member read from a file of its own.
    pub fn push(&mut self, extension: &str, content: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(content);
        self.members.push((extension.to_owned(), start..self.bytes.len()));
    }
}

/// One member; `name` is `None` for what is no part of a sample (folders, files without extension).
struct Member {
    name: Result<Option<Name>, Bad>,
    header: u64,
    data: Range<u64>,
    end: u64,
}

/// Walks over the headers of a tar.
struct Walker<R> {
    reader: R,
    at: u64,
    length: u64,
}

impl<R: Read + Seek> Walker<R> {
    fn new(reader: R, length: u64) -> Self {
        Self { reader, at: 0, length }
    }

    /// The next member; an error where the tar cannot be followed any further.
    fn next(&mut self) -> Result<Option<Member>, Bad> {
        let header_at = self.at;
        let mut long_name: Option<Result<Vec<u8>, Bad>> = None;
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|_| self.broken("a size field that is no number"))?;
            let start = self.at;
            let end = start.checked_add(size).filter(|end| *end <= self.length);
            let end = end.ok_or_else(|| self.broken(format_args!("a member of {size} bytes goes beyond the end")))?;
            let padded = end.next_multiple_of(BLOCK).min(self.length);
            let kind = header.entry_type();
            match kind {
                EntryType::XHeader | EntryType::GNULongName => long_name = Some(self.extension(kind, size)?),
                EntryType::XGlobalHeader | EntryType::GNULongLink => {}
                _ => {
                    self.skip_to(padded)?;
                    let name = member_name(&header, kind, long_name);
                    return Ok(Some(Member { name, header: header_at, data: start..end, end: padded }));
                }
            }
            self.skip_to(padded)?;
        }
    }

    /// The header at this place; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, Bad> {
        if self.at == self.length {
            return Ok(None);
        }
        let mut header = Header::new_old();
        self.reader.read_exact(header.as_mut_bytes()).map_err(|_| self.broken("a header is cut"))?;
        self.at += BLOCK;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = header.as_bytes().iter().map(|byte| u32::from(*byte)).sum();
        let field: u32 = header.as_old().cksum.iter().map(|byte| u32::from(*byte)).sum();
        let sum = sum - field + 8 * u32::from(b' ');
        match header.cksum() {
            Ok(expected) if expected == sum => Ok(Some(header)),
            _ => Err(self.broken("a header's checksum is wrong")),
        }
    }

    /// The name that an extended header gives to the member behind it.
    fn extension(&mut self, kind: EntryType, size: u64) -> Result<Result<Vec<u8>, Bad>, Bad> {
        if size > MAX_EXTENSION {
            return Ok(Err(Bad::new(Cause::TooLarge, format_args!("an extended header of {size} bytes"))));
        }
        let mut content = vec![0; size as usize];
        self.reader.read_exact(&mut content).map_err(|_| self.broken("an extended header is cut"))?;
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
                // Only members above 8 GiB need a size there, and those are beyond our limits.
                Ok(record) if record.key_bytes() == b"size" => {
                    return Ok(Err(Bad::new(Cause::TooLarge, "a member with a PAX size")));
                }
                Ok(_) => {}
                Err(_) => return Ok(Err(Bad::new(Cause::BrokenTar, "an extended header that does not parse"))),
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

fn member_name(header: &Header, kind: EntryType, long: Option<Result<Vec<u8>, Bad>>) -> Result<Option<Name>, Bad> {
    let bytes = match long.transpose()? {
        Some(name) if !name.is_empty() => name,
        _ => header.path_bytes().into_owned(),
    };
    let name = safe_name(&bytes)?;
    match kind {
        EntryType::Regular => Ok(split_name(name)),
        EntryType::Directory => Ok(None),
        _ => Err(Bad::new(Cause::NotAFile, name)),
    }
}

/// Nothing is written under these names, but who sends such a name sends nothing that we want.
fn safe_name(bytes: &[u8]) -> Result<&str, Bad> {
    let refuse = || Bad::new(Cause::UnsafeName, String::from_utf8_lossy(bytes).escape_debug());
    let name = std::str::from_utf8(bytes).map_err(|_| refuse())?;
    let unsafe_part = name.starts_with('/') || name.split('/').any(|part| part == "..");
    if unsafe_part || name.chars().any(char::is_control) { Err(refuse()) } else { Ok(name) }
}

/// `dir/000000012.png` is (`dir/000000012`, `png`).
fn split_name(name: &str) -> Option<Name> {
    let name = name.trim_start_matches("./");
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name.get(base..)?.find('.')?;
    let (key, extension) = (name.get(..dot)?, name.get(dot + 1..)?);
    let complete = dot > base && !extension.is_empty();
    complete.then(|| Name { key: key.to_owned(), extension: extension.to_ascii_lowercase() })
}
