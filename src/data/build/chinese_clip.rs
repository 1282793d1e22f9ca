//! Chinese-CLIP's pairs of files: `X_imgs.tsv` (id, tab, base64) and `X_texts.jsonl` (`text_id`, `text`, `image_ids`).

use super::{
    coco_cn::MAX_LIST,
    emit::Emit,
    groups::Groups,
    json,
    lines::Lines,
    reader::Reader,
    row::{Image, Row},
    seen::Seen,
};
use crate::{
    data::bad::{Bad, Cause},
    error::{Hint, Result, ensure, failed, usage},
};
use serde_json::{Map, Value};
use std::{
    fs,
    path::{Path, PathBuf},
};

pub const IMAGES: &str = "_imgs.tsv";
pub const TEXTS: &str = "_texts.jsonl";

pub struct ChineseClip {
    images: PathBuf,
    texts: PathBuf,
    split: String,
}

/// A text with its id.
type Text = (Value, String);

impl ChineseClip {
    /// Opens the pair of files that `source` names: one of them, or their folder.
    ///
    /// # Errors
    /// A file is missing, or the folder has several pairs and `split` chooses none.
    pub fn open(source: &Path, split: Option<&str>) -> Result<Self> {
        let (folder, split) = if source.is_dir() {
            (source.to_owned(), choose(source, split)?)
        } else {
            let name = source.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let found = name.strip_suffix(IMAGES).or_else(|| name.strip_suffix(TEXTS));
            let message = format!("{} is not a file of Chinese-CLIP", source.display());
            let found = found.ok_or_else(|| usage(message, "name X_imgs.tsv, X_texts.jsonl or their folder"))?;
            (source.parent().map(Path::to_owned).unwrap_or_default(), found.to_owned())
        };
        let (images, texts) = (folder.join(format!("{split}{IMAGES}")), folder.join(format!("{split}{TEXTS}")));
        for path in [&images, &texts] {
            let message = format!("there is no file {}", path.display());
            ensure!(path.is_file(), usage(message, "images and texts are two files beside each other"));
        }
        let size = fs::metadata(&texts)?.len();
        let message = format!("{} has {size} bytes, more than 1 GiB", texts.display());
        ensure!(size <= MAX_LIST, failed(message, "split images and texts into several pairs of files"));
        Ok(Self { images, texts, split })
    }

    fn texts(&self, rows: &mut Emit) -> Result<Groups<Text>> {
        let (mut texts, mut seen) = (Groups::default(), Seen::default());
        let mut lines = Lines::open(&self.texts)?;
        while let Some(line) = lines.next()? {
            let line = match line {
                Ok(line) => line,
                Err(bad) => {
                    rows.damage(bad)?;
                    continue;
                }
            };
            let parsed = serde_json::from_str::<Value>(&line).map_err(|e| lines.bad(Cause::BadJson, e));
            let added = parsed.and_then(|value| {
                add(&value, &mut texts, &mut seen)
                    .ok_or_else(|| lines.bad(Cause::BadRow, "without text_id, text or image_ids"))
            });
            match added {
                Ok(again) => again.into_iter().try_for_each(|pair| rows.damage(lines.bad(Cause::Duplicate, pair)))?,
                Err(bad) => rows.damage(bad)?,
            }
        }
        Ok(texts)
    }

    fn row(&self, line: &str, texts: &mut Groups<Text>, lines: &Lines) -> Result<Row, Bad> {
        let (id, image) = line.split_once('\t').ok_or_else(|| lines.bad(Cause::BadRow, "not `ID<tab>BASE64`"))?;
        let id = id.trim();
        let (ids, captions): (Vec<Value>, Vec<String>) = texts.take(id).unwrap_or_default().into_iter().unzip();
        let fields = [
            ("image_id".to_owned(), id.into()),
            ("split".to_owned(), self.split.as_str().into()),
            ("text_ids".to_owned(), ids.into()),
        ];
        let image = Image::Base64(image.to_owned());
        Ok(Row { id: Some(id.to_owned()), image, captions, fields: Map::from_iter(fields) })
    }
}

/// The split of the only pair of files in a folder, or the one that the user chose.
fn choose(folder: &Path, split: Option<&str>) -> Result<String> {
    if let Some(split) = split {
        return Ok(split.to_owned());
    }
    let splits = splits(folder)?;
    let shown = folder.display();
    match &splits[..] {
        [only] => Ok(only.clone()),
        [] => Err(usage(format_args!("{shown} has no file that ends in {IMAGES}"), "name X_imgs.tsv itself")),
        _ => Err(usage(
            format_args!("{shown} has the splits {}", splits.join(", ")),
            "choose one with --split; build each into a folder of its own",
        )),
    }
}

/// The names of the pairs of files in a folder.
pub fn splits(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).hint(format_args!("cannot list {}", folder.display()), "name another folder")?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut splits: Vec<String> = names.filter_map(|name| Some(name.strip_suffix(IMAGES)?.to_owned())).collect();
    splits.sort();
    Ok(splits)
}

/// Adds the text of a line to each of its images. Returns the pairs of text and image that occurred before.
fn add(value: &Value, texts: &mut Groups<Text>, seen: &mut Seen) -> Option<Vec<String>> {
    let text = value.get("text")?.as_str()?;
    let images = value.get("image_ids")?.as_array().filter(|images| !images.is_empty())?;
    let id = value.get("text_id")?;
    let images = images.iter().map(|image| json::id_text(Some(image))).collect::<Option<Vec<_>>>()?;
    let mut again = Vec::new();
    for image in images {
        let pair = format!("text_id {id} of image {image}");
        match seen.is_new(&pair) {
            true => texts.add(&image, (id.clone(), text.to_owned())),
            false => again.push(pair),
        }
    }
    Some(again)
}

impl Reader for ChineseClip {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        let mut texts = self.texts(rows)?;
        let mut lines = Lines::open(&self.images)?;
        while let Some(line) = lines.next()? {
            rows.row(line.and_then(|line| self.row(&line, &mut texts, &lines)))?;
        }
        for (id, _) in texts.rest() {
            rows.damage(Bad::new(Cause::NoImage, format_args!("{}: image_id {id}", self.texts.display())))?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.images.clone(), self.texts.clone()]
    }

    fn embedded(&self) -> bool {
        true
    }
}
