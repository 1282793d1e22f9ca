//! One sample: its picture or codes, its captions, and what else its JSON says.

use super::{
    bad::{Bad, Cause},
    codes::CodesInfo,
    image::decode_square,
    tar::Members,
};
use image::RgbImage;
use serde_json::Value;

/// Extensions of picture members, in the order in which they are looked for.
pub const IMAGE_EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tiff", "tif"];

/// Largest text or JSON member that is read.
const MAX_TEXT: usize = 1 << 20;
/// Characters of a caption that are kept.
const MAX_CAPTION: usize = 4096;

/// What a sample must have, and what is read of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A picture, cut and resized to this side; a caption is welcome.
    Pictures(u32),
    /// A picture, cut and resized to this side, and a caption.
    Pairs(u32),
    /// Image codes and a caption.
    Codes,
    /// A caption.
    Captions,
}

/// One sample.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Its name in its shard.
    pub key: String,
    /// Index of its source in the configuration.
    pub source: usize,
    /// Square picture ([`Kind::Pictures`], [`Kind::Pairs`]).
    pub image: Option<RgbImage>,
    /// Codes in raster order ([`Kind::Codes`]).
    pub codes: Option<Vec<u16>>,
    /// The caption of this turn, one of `captions`; empty where there is none.
    pub caption: String,
    /// All caption variants.
    pub captions: Vec<String>,
    /// The sample's JSON; `Null` where there is none.
    pub meta: Value,
}

impl Record {
    /// Reads what `kind` asks for from the members of a sample.
    pub(super) fn parse(key: &str, members: &Members, kind: Kind, codes: Option<&CodesInfo>) -> Result<Self, Bad> {
        let meta = json(members)?;
        let captions = captions(members, &meta)?;
        let mut record = Self { key: key.to_owned(), meta, ..Self::default() };
        if captions.is_empty() && !matches!(kind, Kind::Pictures(_)) {
            return Err(Bad::new(Cause::NoCaption, ""));
        }
        match kind {
            Kind::Pictures(size) | Kind::Pairs(size) => {
                let bytes = IMAGE_EXTENSIONS.iter().find_map(|extension| members.get(extension));
                let bytes = bytes.ok_or_else(|| Bad::new(Cause::NoImage, ""))?;
                record.image = Some(decode_square(bytes, size)?);
            }
            Kind::Codes => {
                let npy = members.get("npy").ok_or_else(|| Bad::new(Cause::NoCodes, ""))?;
                record.codes = codes.map(|info| info.parse(npy)).transpose()?;
            }
            Kind::Captions => {}
        }
        record.caption = captions.first().cloned().unwrap_or_default();
        record.captions = captions;
        Ok(record)
    }
}

fn json(members: &Members) -> Result<Value, Bad> {
    let Some(bytes) = text_member(members, "json")? else { return Ok(Value::Null) };
    serde_json::from_slice(bytes).map_err(|e| Bad::new(Cause::BadJson, e))
}

fn text_member<'a>(members: &'a Members, extension: &str) -> Result<Option<&'a [u8]>, Bad> {
    match members.get(extension) {
        Some(bytes) if bytes.len() > MAX_TEXT => {
            Err(Bad::new(Cause::TooLarge, format_args!("{} bytes of {extension}", bytes.len())))
        }
        found => Ok(found),
    }
}

/// The captions of a sample: `captions` of its JSON, else `caption`, else its text.
fn captions(members: &Members, meta: &Value) -> Result<Vec<String>, Bad> {
    let variants = meta.get("captions").and_then(Value::as_array);
    let variants = variants.into_iter().flatten().filter_map(Value::as_str);
    let cleaned: Vec<String> = variants.map(clean).filter(|caption| !caption.is_empty()).collect();
    if !cleaned.is_empty() {
        return Ok(cleaned);
    }
    let caption = meta.get("caption").and_then(Value::as_str).map(clean).unwrap_or_default();
    if !caption.is_empty() {
        return Ok(vec![caption]);
    }
    let Some(bytes) = text_member(members, "txt")? else { return Ok(Vec::new()) };
    let text = std::str::from_utf8(bytes).map_err(|e| Bad::new(Cause::NotUtf8, e))?;
    let caption = clean(text);
    Ok(if caption.is_empty() { Vec::new() } else { vec![caption] })
}

/// A caption on one line: control characters and runs of spaces become one space; overlong ones are cut.
fn clean(text: &str) -> String {
    let text = text.trim_start_matches('\u{feff}');
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_CAPTION) {
        Some((end, _)) => line[..end].to_owned(),
        None => line,
    }
}
