//! Opens a source in the format that the user names, or that its content shows.

use super::{
    chinese_clip::{self, ChineseClip, IMAGES, TEXTS},
    coco::{AicIcc, Coco},
    coco_cn::{self, CocoCn},
    fmiqa::Fmiqa,
    images::Images,
    json,
    lines::Lines,
    reader::Reader,
    settings::{Columns, Format},
    stored::Stored,
    tables::Rows,
};
use crate::{
    config,
    data::{bad::Cause, paths, remote::is_remote, source_file::foreign_format},
    error::{Result, ensure, failed, usage},
};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What to build from.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The annotations, table or folder.
    pub source: String,
    /// The folder of images; without it, that of the source.
    pub images: Option<PathBuf>,
    /// The split of a file or folder that has several.
    pub split: Option<String>,
    pub columns: Columns,
    /// The cache of remote shards: `cache_dir` and `cache_gb`.
    pub cache: config::Data,
}

impl Request {
    fn path(&self) -> &Path {
        Path::new(&self.source)
    }

    fn images(&self) -> Result<Images> {
        let beside = self.path().parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Images::open(self.images.as_deref().unwrap_or(beside))
    }

    /// The split to read, one of `splits`.
    fn split(&self, splits: &[String]) -> Result<String> {
        let shown = &self.source;
        let list = splits.join(", ");
        let hint = "choose one with --split; build each into a folder of its own";
        match (&self.split, splits) {
            (Some(split), _) if splits.contains(split) => Ok(split.clone()),
            (Some(split), _) => {
                Err(usage(format_args!("{shown} has no split `{split}`"), format_args!("it has {list}")))
            }
            (None, [only]) => Ok(only.clone()),
            (None, _) => Err(usage(format_args!("{shown} has the splits {list}"), hint)),
        }
    }
}

/// The format of a source by its content.
///
/// # Errors
/// It is not clear, or the source cannot be read.
pub fn guess(request: &Request) -> Result<Format> {
    let path = request.path();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if is_remote(&request.source) {
        return Ok(Format::Folder);
    }
    let missing = usage(format_args!("there is no source `{}`", request.source), "name a file or a folder");
    ensure!(paths::is_there(&request.source)?, missing);
    if !path.is_file() || extension == "tar" {
        return guess_folder(request);
    }
    let found = match extension.as_str() {
        _ if name.ends_with(IMAGES) || name.ends_with(TEXTS) => Some(Format::ChineseClip),
        "csv" | "tsv" | "jsonl" | "ndjson" | "parquet" => Some(Format::Table),
        "json" => guess_json(&json::outline(path)?),
        "txt" => guess_text(path)?,
        _ => None,
    };
    found.ok_or_else(|| unclear(request))
}

fn guess_folder(request: &Request) -> Result<Format> {
    if request.path().is_dir() && !chinese_clip::splits(request.path())?.is_empty() {
        return Ok(Format::ChineseClip);
    }
    let found = paths::find(&request.source)?;
    let with_table = found.tars.iter().any(|(tar, _)| tar.with_extension("parquet").is_file());
    Ok(if with_table { Format::Img2dataset } else { Format::Folder })
}

fn guess_json(outline: &json::Outline) -> Option<Format> {
    let first_has = |list: &str, names: &[&str]| {
        let found = outline.iter().find(|(name, _)| name == list).and_then(|(_, first)| first.as_ref());
        found.is_some_and(|first| names.iter().all(|name| first.get(*name).is_some()))
    };
    if first_has("images", &["id", "file_name"]) && outline.iter().any(|(name, _)| name == "annotations") {
        Some(Format::Coco)
    } else if first_has("", &["image_id", "caption"]) {
        Some(Format::AicIcc)
    } else {
        let questions = |first: &Value| first.get("Question").is_some() && first.get("image_id").is_some();
        outline.iter().any(|(_, first)| first.as_ref().is_some_and(questions)).then_some(Format::Fmiqa)
    }
}

/// Whether the first lines are a caption list.
fn guess_text(path: &Path) -> Result<Option<Format>> {
    let mut lines = Lines::open(path)?;
    let fits = match lines.next()? {
        Some(Ok(line)) => coco_cn::split(&line).is_some(),
        // The line is GBK, perhaps; the format is the only one in text files.
        Some(Err(bad)) => bad.cause == Cause::NotUtf8,
        None => false,
    };
    Ok(fits.then_some(Format::CocoCn))
}

fn unclear(request: &Request) -> crate::error::Error {
    let shown = &request.source;
    let head = std::fs::File::open(request.path()).and_then(|mut file| {
        let mut head = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(&mut file, 512), &mut head).map(|_| head)
    });
    let what = head.ok().and_then(|head| foreign_format(&head)).unwrap_or("of an unknown kind");
    usage(format_args!("the format of {shown} is not clear: it is {what}"), "name the format with --format")
}

/// Opens a source.
///
/// # Errors
/// The source does not exist, has another format, or misses an option.
pub fn open(request: &Request, format: Format) -> Result<Box<dyn Reader>> {
    let path = request.path();
    Ok(match format {
        Format::Folder | Format::Img2dataset => Box::new(Stored::open(&request.source, &request.cache)?),
        Format::ChineseClip => Box::new(ChineseClip::open(path, request.split.as_deref())?),
        Format::CocoCn => {
            ensure!(guess_text(path)?.is_some(), not_this(request, format, "its lines are not `ID#N CAPTION`"));
            Box::new(CocoCn { captions: path.to_owned(), images: request.images()? })
        }
        Format::Coco | Format::AicIcc | Format::Fmiqa => open_json(request, format)?,
        Format::Table => Box::new(Rows::open(path.to_owned(), request.images()?, &request.columns)?),
    })
}

fn open_json(request: &Request, format: Format) -> Result<Box<dyn Reader>> {
    let path = request.path().to_owned();
    // The whole file is read once, so that a truncated one is refused before anything is written.
    let outline = json::outline(&path)?;
    let found = guess_json(&outline);
    if found != Some(format) {
        let what = found.map_or("it has none of the known forms".into(), |found| format!("it looks like {found}"));
        return Err(not_this(request, format, &what));
    }
    let images = request.images()?;
    Ok(match format {
        Format::Coco => Box::new(Coco { annotations: path, images }),
        Format::AicIcc => Box::new(AicIcc { annotations: path, images }),
        _ => {
            let splits: Vec<String> = outline.into_iter().map(|(name, _)| name).collect();
            Box::new(Fmiqa { split: request.split(&splits)?, questions: path, images })
        }
    })
}

fn not_this(request: &Request, format: Format, what: &str) -> crate::error::Error {
    let hint = "leave out --format, or see the formats in docs/data.md";
    failed(format_args!("{} does not have the format {format}: {what}", request.source), hint)
}
