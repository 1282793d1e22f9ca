//! The second pass: copies the rows that are kept.

use super::{Settings, input::Input, rule::Rule};
use crate::{
    data::{
        clean::clean,
        members::Members,
        output::{append, write_whole},
        record::{IMAGE_EXTENSIONS, Kind, Record, TEXT_FILE},
        shard::Shard,
        table::Table,
    },
    error::{Result, anyhow, ensure, failed},
};
use serde_json::Value;
use std::{fs::File, io::BufWriter, path::Path};
use tar::Builder;

/// Writes the kept rows of a table unchanged.
///
/// # Errors
/// The table changed since the first pass, or a file cannot be read or written.
pub fn write_table(input: &Input, broken: &[Option<Rule>], path: &Path) -> Result<()> {
    write_whole(path, |file| {
        let mut table = Table::open(&input.path)?;
        let mut writer = table.writer(file)?;
        let mut rest = broken;
        let changed = || failed(format_args!("{} changed", input.path.display()), "run the command again");
        while let Some(rows) = table.next_batch()? {
            let (of_rows, after) = rest.split_at_checked(rows.len()).ok_or_else(changed)?;
            writer.write(&rows, &of_rows.iter().map(Option::is_none).collect::<Vec<_>>())?;
            rest = after;
        }
        ensure!(rest.is_empty(), changed());
        writer.finish()?;
        Ok(true)
    })
}

/// Writes the kept samples of a shard. A sample all of whose captions are good is copied byte by byte; from others the
/// captions that break a rule are removed.
///
/// # Errors
/// The shard changed since the first pass, or a file cannot be read or written.
pub fn write_shard(shard: &Shard, broken: &[Option<Rule>], settings: &Settings, path: &Path) -> Result<()> {
    let changed = || failed(format_args!("{} changed", shard.path.display()), "run the command again");
    ensure!(shard.len() == broken.len() as u64, changed());
    let _held = shard.hold_before(None)?;
    write_whole(path, |file| {
        let mut tar = Builder::new(file);
        for (index, _) in broken.iter().enumerate().filter(|(_, broken)| broken.is_none()) {
            write_sample(shard, index, settings, &mut tar).map_err(|e| e.context(shard.path.display().to_string()))?;
        }
        tar.finish()?;
        Ok(true)
    })
}

fn write_sample(
    shard: &Shard,
    index: usize,
    settings: &Settings,
    tar: &mut Builder<&mut BufWriter<File>>,
) -> Result<()> {
    let bad = |bad: crate::data::Bad| anyhow!("{}: {}", bad.cause, bad.place);
    let (key, mut members) = shard.members(index, Some(Kind::Captions)).map_err(bad)?;
    let captions = Record::parse(&key, &members, Kind::Captions, None, &settings.caption_keys);
    let captions = captions.map_err(bad)?.captions;
    let all_good = captions.len() == 1 || captions.iter().all(|caption| is_good(caption, settings));
    if all_good && shard.copy(index, tar.get_mut())? {
        return Ok(());
    }
    (_, members) = shard.members(index, None).map_err(bad)?;
    let name = |extension| format!("{key}.{extension}");
    for extension in IMAGE_EXTENSIONS.into_iter().chain(["npy", TEXT_FILE, "json"]) {
        let Some(content) = members.get(extension) else { continue };
        match extension {
            "json" if !all_good => append(tar, &name(extension), &good_json(content, settings)?)?,
            TEXT_FILE if !all_good && settings.reads_texts() => {
                append(tar, &name(extension), good_lines(&members, settings).as_bytes())?;
            }
            _ => append(tar, &name(extension), content)?,
        }
    }
    Ok(())
}

fn is_good(caption: &str, settings: &Settings) -> bool {
    settings.text.check(caption).0.is_none()
}

/// JSON with those captions that break no rule.
fn good_json(content: &[u8], settings: &Settings) -> Result<Vec<u8>> {
    let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
    // Damaged JSON beside a good text is ignored; it stays as it is.
    let Ok(mut json) = serde_json::from_slice::<Value>(content) else { return Ok(content.to_vec()) };
    let is_good = |value: &Value| value.as_str().is_some_and(|text| is_good(&clean(text), settings));
    for key in &settings.caption_keys {
        match json.get_mut(key) {
            Some(Value::Array(captions)) => captions.retain(is_good),
            Some(caption) if !is_good(caption) => *caption = Value::Null,
            _ => {}
        }
    }
    if !settings.caption_keys.is_empty() {
        return Ok(serde_json::to_vec(&json)?);
    }
    if let Some(Value::Array(captions)) = json.get_mut("captions") {
        captions.retain(is_good);
        let first = captions.first().cloned();
        if let (Some(first), Some(caption)) = (first, json.get_mut("caption"))
            && !is_good(caption)
        {
            *caption = first;
        }
    }
    Ok(serde_json::to_vec(&json)?)
}

/// The lines that break no rule, each a caption.
fn good_lines(members: &Members, settings: &Settings) -> String {
    let text = String::from_utf8_lossy(members.get(TEXT_FILE).unwrap_or_default());
    let lines = text.split(['\n', '\r']).map(clean).filter(|line| !line.is_empty());
    lines.filter(|line| is_good(line, settings)).collect::<Vec<_>>().join("\n")
}
