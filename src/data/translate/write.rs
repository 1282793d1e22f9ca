//! Writes a sample of a shard with other captions.

use super::Settings;
use crate::{
    data::{output::append, record::IMAGE_EXTENSIONS, shard::Shard},
    error::{Result, anyhow, ensure, failed},
};
use serde_json::{Map, Value};
use std::{fs::File, io::BufWriter};
use tar::Builder;

/// The captions of a sample that is written.
pub struct Captions<'a> {
    pub original: &'a [String],
    /// At least one.
    pub translated: &'a [String],
}

/// Writes sample `index` with its image or codes, its text if it has one, and its JSON, in which `caption` and, if there are
/// several, `captions` are replaced, and the captions before are added.
///
/// # Errors
/// The shard cannot be read or already has the new field, or the file cannot be written.
pub fn write_sample(
    shard: &Shard,
    index: usize,
    captions: &Captions<'_>,
    settings: &Settings,
    tar: &mut Builder<&mut BufWriter<File>>,
) -> Result<()> {
    let unreadable = |bad: crate::data::Bad| anyhow!("{}: {}", bad.cause, bad.place);
    let (key, members) = shard.members(index, None).map_err(unreadable)?;
    let name = |extension| format!("{key}.{extension}");
    for extension in IMAGE_EXTENSIONS.into_iter().chain(["npy"]) {
        if let Some(content) = members.get(extension) {
            append(tar, &name(extension), content)?;
        }
    }
    if members.get("txt").is_some() {
        append(tar, &name("txt"), captions.translated.join("\n").as_bytes())?;
    }
    let json = members.get("json").unwrap_or_default();
    // Damaged JSON beside a good text is ignored.
    let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
    let mut object = serde_json::from_slice::<Map<String, Value>>(json).unwrap_or_default();
    ensure!(
        !object.contains_key(&settings.original_column),
        failed(
            format_args!("sample {key} already has the field `{}`", settings.original_column),
            "choose another name for the caption before its translation with --original-column"
        )
    );
    object.insert("caption".into(), captions.translated.first().cloned().into());
    if captions.translated.len() > 1 || object.contains_key("captions") {
        object.insert("captions".into(), captions.translated.into());
    }
    let original = match captions.original {
        [only] => only.clone().into(),
        several => several.into(),
    };
    object.insert(settings.original_column.clone(), original);
    append(tar, &name("json"), &serde_json::to_vec(&object)?)
}
