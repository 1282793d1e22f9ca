//! Translations that are already known: JSON lines in a file, so that no text is translated twice.

use super::protocol::MAX_LINE;
use crate::{
    error::{Context, Hint, Result, ensure, failed},
    report, runtime,
};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Seek},
    os::unix::fs::FileExt,
    path::Path,
};

/// The cache. In memory are a hash and a place for each text, about 60 bytes; the texts stay in the file.
pub struct Cache {
    file: File,
    /// Start and length of the line of a text in bytes, by the text's hash.
    places: HashMap<[u8; 16], (u64, u32)>,
    end: u64,
}

#[derive(Serialize, Deserialize)]
struct Line<'a> {
    text: Cow<'a, str>,
    translation: Cow<'a, str>,
}

/// What every line begins with.
const START: &[u8] = b"{\"text\":";

impl Cache {
    /// Opens or creates a cache. A last line that was cut by a killed process is removed.
    ///
    /// # Errors
    /// The file is something else than a cache, another process uses it, or it cannot be read or written.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let hint = "choose another file with --cache";
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.map_or(Ok(()), fs::create_dir_all).hint(format_args!("cannot create the folder of {shown}"), hint)?;
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = opened.hint(format_args!("cannot write {shown}"), hint)?;
        match runtime::lock(&file).with_context(|| format!("cannot lock {shown}"))? {
            runtime::Lock::Held => {}
            runtime::Lock::Busy => {
                let message = format!("another process uses the cache {shown}");
                return Err(failed(message, "wait until it is done, or choose another file with --cache"));
            }
            runtime::Lock::Unsupported(error) => {
                report::warn(format_args!(
                    "cannot lock {shown} ({error}): make sure that no other process writes to it"
                ));
            }
        }
        let mut cache = Self { file, places: HashMap::new(), end: 0 };
        cache.read_places(path)?;
        Ok(cache)
    }

    fn read_places(&mut self, path: &Path) -> Result<()> {
        let shown = path.display();
        let cannot = || format!("cannot read the cache {shown}");
        self.file.rewind().with_context(cannot)?;
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let (mut line, mut end, mut skipped) = (Vec::new(), 0, 0_u64);
        loop {
            line.clear();
            // A line holds a text and its translation.
            let read = reader.by_ref().take(4 * MAX_LINE).read_until(b'\n', &mut line).with_context(cannot)?;
            if read == 0 {
                break;
            }
            let ours = line.starts_with(START) || START.starts_with(&line);
            let foreign =
                || failed(format_args!("{shown} is not a cache of translations"), "choose another file with --cache");
            ensure!(ours || end > 0, foreign());
            if !line.ends_with(b"\n") && read < 4 * MAX_LINE as usize {
                self.file.set_len(end).with_context(|| format!("cannot write the cache {shown}"))?;
                break;
            }
            match (serde_json::from_slice::<Line<'_>>(&line), u32::try_from(read)) {
                (Ok(known), Ok(length)) => drop(self.places.insert(key(&known.text), (end, length))),
                _ => skipped += 1,
            }
            end += read as u64;
        }
        self.end = end;
        if skipped > 0 {
            report::warn(format_args!("{skipped} lines of the cache {shown} are damaged and not used"));
        }
        Ok(())
    }

    /// The translation of a text, if it is known.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn get(&self, text: &str) -> Result<Option<String>> {
        let Some((start, length)) = self.places.get(&key(text)) else { return Ok(None) };
        let mut line = vec![0; *length as usize];
        self.file.read_exact_at(&mut line, *start).context("cannot read the cache of translations")?;
        let known = serde_json::from_slice::<Line<'_>>(&line).ok().filter(|line| line.text == text);
        Ok(known.map(|line| line.translation.into_owned()))
    }

    /// Appends translations of texts.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add<'a>(&mut self, pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
        let (mut bytes, mut places) = (Vec::new(), Vec::new());
        for (text, translation) in pairs {
            let start = bytes.len();
            let line = Line { text: text.into(), translation: translation.into() };
            serde_json::to_writer(&mut bytes, &line)?;
            bytes.push(b'\n');
            let length = bytes.len() - start;
            if length < 4 * MAX_LINE as usize {
                places.push((key(text), (self.end + start as u64, length as u32)));
            } else {
                bytes.truncate(start);
            }
        }
        self.file.write_all_at(&bytes, self.end).hint("cannot write the cache of translations", "is the disk full?")?;
        self.end += bytes.len() as u64;
        self.places.extend(places);
        Ok(())
    }
}

/// The first 128 bits of a text's hash.
fn key(text: &str) -> [u8; 16] {
    let hash = blake3::hash(text.as_bytes());
    let mut key = [0; 16];
    key.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translations_are_found_again_and_a_cut_line_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("below/cache.jsonl");
        let odd = "say \"hi\"\tto 🐱\nnow";
        let mut cache = Cache::open(&path).unwrap();
        cache.add([("a cat", "一只猫"), (odd, "说\"嗨\"")]).unwrap();
        assert_eq!(cache.get(odd).unwrap().as_deref(), Some("说\"嗨\""));
        assert!(format!("{:#}", Cache::open(&path).err().unwrap()).contains("another process"));
        drop(cache);
        let whole = fs::read(&path).unwrap();
        for cut in [whole.len() - 1, whole.len() - 9, 60, 5, 0] {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut cache = Cache::open(&path).unwrap();
            assert_eq!(cache.get("a cat").unwrap().is_some(), cut > 20);
            assert_eq!(cache.get(odd).unwrap(), None, "{cut}");
            cache.add([(odd, "说\"嗨\"")]).unwrap();
            drop(cache);
            let cache = Cache::open(&path).unwrap();
            assert_eq!(cache.get(odd).unwrap().as_deref(), Some("说\"嗨\""), "{cut}");
        }
    }

    #[test]
    fn other_files_are_not_touched_and_damaged_lines_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("letter.txt");
        for content in ["dear", "{\"id\":1}\n", "\n"] {
            fs::write(&path, content).unwrap();
            assert!(Cache::open(&path).err().unwrap().to_string().contains("not a cache"), "{content}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        fs::write(
            &path,
            "{\"text\":\"a\",\"translation\":\"甲\"}\n{\"tex\u{0}\n{\"text\":\"b\",\"translation\":\"乙\"}\n",
        )
        .unwrap();
        let cache = Cache::open(&path).unwrap();
        let get = |text| cache.get(text).unwrap().unwrap();
        assert_eq!((get("a"), get("b")), ("甲".into(), "乙".into()));
    }
}
