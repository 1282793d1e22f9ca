//! One sample: its image or codes, its captions, and the other fields of its JSON.

use super::{
    bad::{Bad, Cause},
    clean::clean,
    codes::CodesInfo,
    image::{decode, decode_square},
    members::Members,
    questions::questions,
    resample::resize_bicubic,
};
use image::RgbImage;
use serde_json::Value;

/// Extensions of image members, in order of preference.
pub const IMAGE_EXTENSIONS: [&str; 9] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tiff", "tif", "jfif"];

/// Maximum size of a text or JSON member in bytes.
pub(super) const MAX_TEXT: usize = 1 << 20;
/// Extension of the text member, and the caption key that stands for it.
pub(super) const TEXT_FILE: &str = "txt";

/// What a sample must contain. It also decides which of its members are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An image, cropped and resized to this side; a caption is optional.
    Images(u32),
    /// An image, cropped and resized to this side, and a caption.
    Pairs(u32),
    /// An image, resized to this side without cropping as CLIP does, and a caption.
    Resized(u32),
    /// The same; a caption is optional.
    ResizedImages(u32),
    /// An image of any size; a caption is optional.
    WholeImages,
    /// Image codes and a caption.
    Codes,
    /// Image codes, their image, cropped and resized to this side, and a caption.
    CodesAndImages(u32),
    /// A caption.
    Captions,
}

impl Kind {
    /// Whether its samples have image codes.
    pub fn has_codes(self) -> bool {
        matches!(self, Self::Codes | Self::CodesAndImages(_))
    }
}

/// Whether a member with this extension (lower case) is read for `kind`; `None` stands for all kinds.
pub(super) fn wants(kind: Option<Kind>, extension: &str) -> bool {
    let image = || IMAGE_EXTENSIONS.contains(&extension);
    matches!(extension, "txt" | "json")
        || match kind {
            Some(Kind::Images(_) | Kind::Pairs(_) | Kind::Resized(_) | Kind::ResizedImages(_) | Kind::WholeImages) => {
                image()
            }
            Some(Kind::Codes) => extension == "npy",
            Some(Kind::Captions) => false,
            Some(Kind::CodesAndImages(_)) | None => image() || extension == "npy",
        }
}

/// One sample.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// The sample's key in its shard.
    pub key: String,
    /// Index of its source in the configuration.
    pub source: usize,
    /// The image, for the kinds with an image.
    pub image: Option<RgbImage>,
    /// Codes in raster order, for the kinds with codes.
    pub codes: Option<Vec<u16>>,
    /// The caption chosen for this visit, one of `captions`; empty if there is none.
    pub caption: String,
    /// All captions of the sample.
    pub captions: Vec<String>,
    /// The sample's JSON; `Null` if there is none or it was ignored.
    pub meta: Value,
    /// Why a damaged JSON member was ignored. The sample itself is good.
    pub ignored: Option<Bad>,
}

impl Record {
    /// Parses what `kind` needs from the members of a sample.
    pub(super) fn parse(
        key: &str,
        members: &Members,
        kind: Kind,
        codes: Option<&CodesInfo>,
        caption_keys: &[String],
    ) -> Result<Self, Bad> {
        let Texts { meta, captions, ignored } = texts(members, caption_keys)?;
        let images_alone = matches!(kind, Kind::Images(_) | Kind::ResizedImages(_) | Kind::WholeImages);
        // A generator learns from questions too.
        let optional = || images_alone || kind.has_codes() && !questions(&meta).is_empty();
        if captions.is_empty() && !optional() {
            return Err(ignored.unwrap_or_else(|| Bad::new(Cause::NoCaption, "")));
        }
        let mut record = Self { key: key.to_owned(), meta, ignored, ..Self::default() };
        if kind.has_codes() {
            let npy = members.get("npy").ok_or_else(|| Bad::new(Cause::NoCodes, ""))?;
            record.codes = codes.map(|info| info.parse(npy)).transpose()?;
        }
        match kind {
            Kind::Images(size) | Kind::Pairs(size) | Kind::CodesAndImages(size) => {
                record.image = Some(decode_square(image_member(members)?, size)?);
            }
            Kind::Resized(size) | Kind::ResizedImages(size) => {
                record.image = Some(resize_bicubic(&decode(image_member(members)?)?, size, size));
            }
            Kind::WholeImages => record.image = Some(decode(image_member(members)?)?),
            Kind::Codes | Kind::Captions => {}
        }
        record.caption = captions.first().cloned().unwrap_or_default();
        record.captions = captions;
        Ok(record)
    }
}

/// The JSON of a sample (`Null` if there is none or it was ignored), its captions, and why its JSON was ignored.
pub(super) struct Texts {
    pub meta: Value,
    pub captions: Vec<String>,
    pub ignored: Option<Bad>,
}

/// Reads the text members of a sample. `caption_keys` are the fields of its captions; if there are none, the usual ones.
pub(super) fn texts(members: &Members, caption_keys: &[String]) -> Result<Texts, Bad> {
    let (meta, ignored) = match json(members) {
        Ok(meta) => (meta, None),
        Err(bad) => (Value::Null, Some(bad)),
    };
    Ok(Texts { captions: captions(members, &meta, caption_keys)?, meta, ignored })
}

/// The content of a sample's image.
pub(super) fn image_member(members: &Members) -> Result<&[u8], Bad> {
    let found = image_and_extension(members).map(|(_, content)| content);
    found.ok_or_else(|| match members.unsupported() {
        Some(extension) => Bad::new(Cause::UnsupportedImage, extension),
        None => Bad::new(Cause::NoImage, ""),
    })
}

/// The extension and the content of a sample's image.
pub(super) fn image_and_extension(members: &Members) -> Option<(&'static str, &[u8])> {
    IMAGE_EXTENSIONS.iter().find_map(|extension| Some((*extension, members.get(extension)?)))
}

fn json(members: &Members) -> Result<Value, Bad> {
    let Some(bytes) = text_member(members, "json")? else { return Ok(Value::Null) };
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
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

/// The captions of a sample: those of all `keys`. Without keys, `captions` of its JSON, else `caption`, else the lines of its
/// text file, one caption per line (as in DALLE-pytorch).
fn captions(members: &Members, meta: &Value, keys: &[String]) -> Result<Vec<String>, Bad> {
    let usual = ["captions", "caption", TEXT_FILE].into_iter().map(|key| captions_of(members, meta, key));
    if keys.is_empty() {
        return usual
            .into_iter()
            .find(|found| found.as_ref().map_or(true, |found| !found.is_empty()))
            .unwrap_or(Ok(Vec::new()));
    }
    let all: Result<Vec<_>, Bad> = keys.iter().map(|key| captions_of(members, meta, key)).collect();
    Ok(all?.into_iter().flatten().collect())
}

/// The captions in a field of the JSON, a text or a list of texts; or the lines of the text file.
fn captions_of(members: &Members, meta: &Value, key: &str) -> Result<Vec<String>, Bad> {
    let texts: Vec<&str> = match meta.get(key) {
        _ if key == TEXT_FILE => {
            let bytes = text_member(members, TEXT_FILE)?.unwrap_or_default();
            let text = std::str::from_utf8(bytes).map_err(|e| Bad::new(Cause::NotUtf8, e))?;
            text.split(['\n', '\r']).collect()
        }
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    Ok(texts.into_iter().map(clean).filter(|caption| !caption.is_empty()).collect())
}
