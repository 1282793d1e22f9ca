//! COCO captions: `{"images": [{"id", "file_name", ..}], "annotations": [{"image_id", "caption"}]}`.

use super::{emit::Emit, groups::Groups, images::Images, json, reader::Reader, row::Row, seen::Seen};
use crate::{
    data::bad::{Bad, Cause},
    error::Result,
};
use serde_json::{Map, Value};
use std::path::PathBuf;

pub struct Coco {
    pub annotations: PathBuf,
    pub images: Images,
}

impl Coco {
    fn row(&self, image: Value, captions: &mut Groups<String>) -> Result<Row, Bad> {
        let bad = |what: &str| Bad::new(Cause::BadRow, format_args!("{}: an image {what}", self.annotations.display()));
        let Value::Object(mut fields) = image else { return Err(bad("that is not an object")) };
        let id = json::id_text(fields.get("id")).ok_or_else(|| bad("without id"))?;
        let name = fields.get("file_name").and_then(Value::as_str).ok_or_else(|| bad("without file_name"))?.to_owned();
        fields.remove("id");
        fields.insert("image_id".into(), id.as_str().into());
        // A second image with this id is a duplicate, whose captions are gone.
        let captions = captions.take(&id).unwrap_or_default();
        Ok(Row { image: self.images.file(&name)?, id: Some(id), captions, fields })
    }
}

impl Reader for Coco {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        let shown = self.annotations.display();
        let (mut captions, mut seen) = (Groups::default(), Seen::default());
        json::for_each(&self.annotations, "annotations", |annotation| {
            let id = json::id_text(annotation.get("image_id"));
            let number = json::id_text(annotation.get("id"));
            if let (Some(id), Some(number)) = (&id, number)
                && !seen.is_new(&format!("{number} {id}"))
            {
                return rows
                    .damage(Bad::new(Cause::Duplicate, format_args!("{shown}: annotation {number} of image {id}")));
            }
            match (id, annotation.get("caption").and_then(Value::as_str)) {
                (Some(id), Some(caption)) => {
                    captions.add(&id, caption.to_owned());
                    Ok(())
                }
                _ => rows.damage(Bad::new(
                    Cause::BadRow,
                    format_args!("{shown}: an annotation without image_id or caption"),
                )),
            }
        })?;
        json::for_each(&self.annotations, "images", |image| rows.row(self.row(image, &mut captions)))?;
        for (id, _) in captions.rest() {
            rows.damage(Bad::new(Cause::NoImage, format_args!("{shown}: image_id {id}")))?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.annotations.clone()]
    }
}

/// Captions of the AI Challenger: `[{"image_id": "FILE_NAME", "caption": ["..", ..], "url"}]`.
pub struct AicIcc {
    pub annotations: PathBuf,
    pub images: Images,
}

impl AicIcc {
    fn row(&self, image: Value) -> Result<Row, Bad> {
        let bad = |what: &str| Bad::new(Cause::BadRow, format_args!("{}: an image {what}", self.annotations.display()));
        let Value::Object(mut fields) = image else { return Err(bad("that is not an object")) };
        let id = json::id_text(fields.get("image_id")).ok_or_else(|| bad("without image_id"))?;
        let captions = texts(&mut fields, "caption").ok_or_else(|| bad("without a list of captions"))?;
        Ok(Row { image: self.images.file(&id)?, id: Some(id), captions, fields })
    }
}

/// Takes a text or a list of texts out of `fields`.
fn texts(fields: &mut Map<String, Value>, name: &str) -> Option<Vec<String>> {
    match fields.remove(name)? {
        Value::String(text) => Some(vec![text]),
        Value::Array(list) => list.into_iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

impl Reader for AicIcc {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        json::for_each(&self.annotations, "", |image| rows.row(self.row(image)))
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.annotations.clone()]
    }
}
