//! One row of a source, and the sample that is made of it.

use crate::data::{
    bad::{Bad, Cause},
    clean::clean,
    dataset::Source,
    image,
    record::{Kind, MAX_TEXT, image_member, texts},
    source_file,
};
use ::image::ImageFormat;
use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};
use std::{path::PathBuf, sync::Arc};

/// One row before its image is read.
#[derive(Debug, Default)]
pub struct Row {
    /// The source's name for the row; unique if it is given.
    pub id: Option<String>,
    pub image: Image,
    pub captions: Vec<String>,
    /// The other fields of the row, for the sample's JSON.
    pub fields: Map<String, Value>,
}

/// Where the image of a row is stored.
#[derive(Debug, Default)]
pub enum Image {
    #[default]
    Missing,
    /// An image file, with its name below the folder of images.
    File {
        path: PathBuf,
        name: String,
    },
    Bytes(Vec<u8>),
    Base64(String),
    /// A sample of a folder or a tar shard, with its own text and JSON.
    Stored {
        source: Arc<Source>,
        shard: usize,
        sample: usize,
    },
}

impl Image {
    /// Number of bytes that the image occupies in memory once it is read; 0 if that is unknown.
    pub fn size(&self) -> u64 {
        match self {
            Self::Missing => 0,
            Self::File { path, .. } => path.metadata().map_or(0, |meta| meta.len()),
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Base64(text) => text.len() as u64,
            Self::Stored { source, shard, sample } => {
                source.shards.get(*shard).map_or(0, |shard| shard.sample_bytes(*sample))
            }
        }
    }
}

/// A complete sample.
#[derive(Debug)]
pub struct Sample {
    /// The source's name for the sample.
    pub id: Option<String>,
    pub image: Vec<u8>,
    /// Extension of the image, by its content.
    pub extension: &'static str,
    /// At least one, or `fields` has questions.
    pub captions: Vec<String>,
    pub fields: Map<String, Value>,
    /// Why a damaged JSON was ignored.
    pub ignored: Option<Bad>,
}

/// Reads the image of a row and checks that it can be decoded.
///
/// # Errors
/// The image is missing or bad, or the row has neither captions nor questions.
pub fn load(row: Row) -> Result<Sample, Bad> {
    let place = row.id.clone().unwrap_or_default();
    let mut sample = Sample {
        id: row.id,
        image: Vec::new(),
        extension: "",
        captions: row.captions,
        fields: row.fields,
        ignored: None,
    };
    match row.image {
        Image::Missing => return Err(Bad::new(Cause::NoImage, place)),
        Image::File { path, .. } => sample.image = source_file::read(&path)?,
        Image::Bytes(bytes) => sample.image = bytes,
        Image::Base64(text) => sample.image = decode_base64(&text, &place)?,
        Image::Stored { source, shard, sample: index } => read_stored(&source, shard, index, &mut sample)?,
    }
    let place = sample.id.clone().unwrap_or(place);
    let at = |bad: Bad| Bad::new(bad.cause, format_args!("{place}: {}", bad.place));
    sample.extension = verify(&sample.image).map_err(at)?;
    sample.captions = sample.captions.iter().map(|text| clean(text)).filter(|text| !text.is_empty()).collect();
    if sample.captions.is_empty() && !sample.fields.contains_key("questions") {
        return Err(Bad::new(Cause::NoCaption, place));
    }
    Ok(sample)
}

fn read_stored(source: &Source, shard: usize, index: usize, sample: &mut Sample) -> Result<(), Bad> {
    let missing = || Bad::new(Cause::Unreadable, format_args!("{}: sample {index}", source.path));
    let shard = source.shards.get(shard).ok_or_else(missing)?;
    let (key, members) = shard.members(index, Some(Kind::Pairs(1)))?;
    let locate = |bad| shard.locate(&key, bad);
    let stored = texts(&members, &[]).map_err(locate)?;
    sample.image = image_member(&members).map_err(locate)?.to_vec();
    if !stored.captions.is_empty() {
        sample.captions = stored.captions;
    }
    if let Value::Object(fields) = stored.meta {
        sample.fields.extend(fields);
    }
    sample.ignored = stored.ignored.map(locate);
    sample.id = Some(key);
    Ok(())
}

/// The extension of an image by its content, once it has been decoded.
fn verify(bytes: &[u8]) -> Result<&'static str, Bad> {
    let extension = match ::image::guess_format(bytes) {
        Ok(ImageFormat::Png) => "png",
        Ok(ImageFormat::Jpeg) => "jpg",
        Ok(ImageFormat::WebP) => "webp",
        Ok(ImageFormat::Gif) => "gif",
        Ok(ImageFormat::Bmp) => "bmp",
        Ok(ImageFormat::Tiff) => "tiff",
        Ok(other) => return Err(Bad::new(Cause::UnsupportedImage, format_args!("{other:?}"))),
        Err(_) => return Err(Bad::new(Cause::BadImage, "not an image")),
    };
    image::decode(bytes)?;
    Ok(extension)
}

/// Decodes base64 of either alphabet, with or without padding; the prefix of a data URL is skipped.
fn decode_base64(text: &str, place: &str) -> Result<Vec<u8>, Bad> {
    let text = text.trim();
    let text = text.strip_prefix("data:").and_then(|url| Some(url.split_once(";base64,")?.1)).unwrap_or(text);
    let alphabet = if text.contains(['-', '_']) { alphabet::URL_SAFE } else { alphabet::STANDARD };
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bad = |e| Bad::new(Cause::BadBase64, format_args!("{place}: {e}"));
    GeneralPurpose::new(&alphabet, config).decode(text).map_err(bad)
}

/// The sample's JSON: the fields of the row, its key and its captions.
///
/// # Errors
/// The JSON is larger than a reader accepts.
pub fn json(mut fields: Map<String, Value>, key: &str, captions: &[String]) -> Result<Vec<u8>, Bad> {
    fields.insert("key".into(), key.into());
    if let Some(first) = captions.first() {
        fields.insert("caption".into(), first.as_str().into());
    }
    fields.insert("captions".into(), captions.into());
    let text = Value::Object(fields).to_string().into_bytes();
    if text.len() > MAX_TEXT {
        return Err(Bad::new(Cause::TooLarge, format_args!("{key}: {} bytes of JSON", text.len())));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_both_alphabets_is_decoded() {
        let bytes = [0xfb, 0xff, 0xfe, 0x01];
        for text in ["-__-AQ==", "+//+AQ==", "-__-AQ", "+//+AQ", " -__-AQ== ", "data:image/png;base64,+//+AQ=="] {
            assert_eq!(decode_base64(text, "").unwrap(), bytes, "{text}");
        }
        for text in ["-_/+", "a", "月亮", "a b c d"] {
            assert_eq!(decode_base64(text, "7").unwrap_err().cause, Cause::BadBase64, "{text}");
        }
    }
}
