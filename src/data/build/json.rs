//! Reads large JSON files list by list, without holding their text in memory.

use crate::{
    data::source_file::open_regular,
    error::{Context, Error, Result, ensure, failed},
};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Read, Seek},
    path::Path,
};

/// Maximum size of a JSON file in bytes.
const MAX_JSON: u64 = 1 << 30;
const BOM: &[u8] = b"\xef\xbb\xbf";
pub const ICONV: &str = "convert it with `iconv -f GB18030 -t UTF-8 FILE > NEW_FILE`";

/// The top level of a JSON file: its lists, each with its first element. A file that is one list has the name "".
pub type Outline = Vec<(String, Option<Value>)>;

/// Reads a whole file for its [`Outline`], so that damage is found before anything is written.
///
/// # Errors
/// The file cannot be read, is larger than 1 GiB, or is not JSON in UTF-8.
pub fn outline(path: &Path) -> Result<Outline> {
    let mut outline = Outline::new();
    parse(path, None, &mut |list, element| {
        if outline.last().is_none_or(|(name, _)| name != list) {
            outline.push((list.to_owned(), None));
        }
        if let (Some((_, first @ None)), Some(element)) = (outline.last_mut(), element) {
            *first = Some(element);
        }
        Ok(())
    })?;
    // The parser does not look at the text of elements that it skips.
    let mut file = open_regular(path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(is_utf8(&mut file).unwrap_or(true), not_utf8(path));
    Ok(outline)
}

/// Calls `each` with the elements of the list `name` ("": the file is the list).
///
/// # Errors
/// As [`outline`]; `each` fails.
pub fn for_each(path: &Path, name: &str, mut each: impl FnMut(Value) -> Result<()>) -> Result<()> {
    parse(path, Some(name), &mut |_, element| element.map_or(Ok(()), &mut each))
}

/// Calls `each` with the name and each element of the wanted list (`None`: the first element of each list), and once
/// without element at the start of a list.
fn parse(path: &Path, wanted: Option<&str>, each: &mut dyn FnMut(&str, Option<Value>) -> Result<()>) -> Result<()> {
    let shown = path.display();
    let mut file = open_regular(path).with_context(|| format!("cannot open {shown}"))?;
    let size = file.metadata()?.len();
    let hint = "split it into several files, or make a table of it (JSON lines)";
    ensure!(size <= MAX_JSON, failed(format_args!("{shown} has {size} bytes, more than 1 GiB"), hint));
    let mut failure = None;
    let mut reader = BufReader::new(&mut file);
    if reader.fill_buf()?.starts_with(BOM) {
        reader.consume(BOM.len());
    }
    let mut json = serde_json::Deserializer::from_reader(reader);
    let visitor = TopLevel { wanted, each, failure: &mut failure };
    let parsed = json.deserialize_any(visitor).and_then(|()| json.end());
    match (failure, parsed) {
        (Some(failure), _) => Err(failure),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => Err(explain(path, &mut file, &error)),
    }
}

fn explain(path: &Path, file: &mut File, error: &serde_json::Error) -> Error {
    let shown = path.display();
    if !is_utf8(file).unwrap_or(true) {
        return not_utf8(path);
    }
    let hint = if error.is_eof() { "the file is truncated: download or unpack it again" } else { "repair the file" };
    failed(format_args!("{shown} is not complete JSON: {error}"), hint)
}

fn not_utf8(path: &Path) -> Error {
    failed(format_args!("{} is not UTF-8 text (GBK?)", path.display()), ICONV)
}

/// Whether a file is UTF-8.
fn is_utf8(file: &mut File) -> std::io::Result<bool> {
    file.rewind()?;
    let mut rest = Vec::new();
    loop {
        if Read::by_ref(file).take(1 << 20).read_to_end(&mut rest)? == 0 {
            // What remains is the beginning of a character: the file was cut there.
            return Ok(true);
        }
        match std::str::from_utf8(&rest) {
            Ok(_) => rest.clear(),
            // A character may continue in the next block.
            Err(e) if e.error_len().is_none() => drop(rest.drain(..e.valid_up_to())),
            Err(_) => return Ok(false),
        }
    }
}

struct TopLevel<'a> {
    wanted: Option<&'a str>,
    each: &'a mut dyn FnMut(&str, Option<Value>) -> Result<()>,
    failure: &'a mut Option<Error>,
}

impl TopLevel<'_> {
    /// Reads the list `name`, or skips it.
    fn list<'de, A: SeqAccess<'de>>(&mut self, name: &str, mut list: A) -> Result<(), A::Error> {
        let fail = |this: &mut Self, error| {
            *this.failure = Some(error);
            serde::de::Error::custom("stopped")
        };
        if self.wanted.is_none_or(|wanted| wanted == name) {
            (self.each)(name, None).map_err(|e| fail(self, e))?;
            let only_first = self.wanted.is_none();
            while let Some(element) = list.next_element::<Value>()? {
                (self.each)(name, Some(element)).map_err(|e| fail(self, e))?;
                if only_first {
                    break;
                }
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

impl<'de> Visitor<'de> for TopLevel<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list or an object of lists")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, list: A) -> Result<(), A::Error> {
        self.list("", list)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            map.next_value_seed(Member { top: &mut self, name: &name })?;
        }
        Ok(())
    }
}

/// The value of one name of the top level; only lists are read.
struct Member<'a, 'b> {
    top: &'a mut TopLevel<'b>,
    name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Member<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Member<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        self.top.list(self.name, list)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// An id as text: data sets write the same id as a number or as text.
pub fn id_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) if !text.trim().is_empty() => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
