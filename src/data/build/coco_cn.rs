//! Caption lists of COCO-CN and Flickr8k-CN: lines `ID#0<tab>CAPTION` or `ID#zhb#0 CAPTION`.

use super::{
    emit::Emit,
    groups::Groups,
    images::{ById, Images},
    lines::Lines,
    reader::Reader,
    row::Row,
    seen::Seen,
};
use crate::{
    data::bad::{Bad, Cause},
    error::{Result, ensure, failed},
};
use serde_json::Map;
use std::path::PathBuf;

/// Maximum size of a caption list in bytes; it is held in memory.
pub const MAX_LIST: u64 = 1 << 30;

pub struct CocoCn {
    pub captions: PathBuf,
    pub images: Images,
}

/// The image id and the caption of a line.
pub fn split(line: &str) -> Option<(&str, &str)> {
    let (name, caption) = line.split_once([' ', '\t'])?;
    let (id, number) = name.split_once('#')?;
    (!id.is_empty() && !number.is_empty()).then_some((id, caption.trim()))
}

fn row(id: String, captions: Vec<String>, images: &ById) -> Result<Row, Bad> {
    let fields = Map::from_iter([("image_id".to_owned(), id.as_str().into())]);
    Ok(Row { image: images.find(&id)?, id: Some(id), captions, fields })
}

impl Reader for CocoCn {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        let size = self.captions.metadata().map_or(0, |meta| meta.len());
        let message = format!("{} has {size} bytes, more than 1 GiB", self.captions.display());
        ensure!(size <= MAX_LIST, failed(message, "split it into several files"));
        let images = self.images.by_id()?;
        let (mut captions, mut seen) = (Groups::default(), Seen::default());
        let mut lines = Lines::open(&self.captions)?;
        while let Some(line) = lines.next()? {
            let line = match line {
                Ok(line) => line,
                Err(bad) => {
                    rows.damage(bad)?;
                    continue;
                }
            };
            // With its number, the id of a caption is unique.
            let name = line.split([' ', '\t']).next().unwrap_or_default();
            match split(&line) {
                Some((id, caption)) if seen.is_new(name) => captions.add(id, caption.to_owned()),
                Some(_) => rows.damage(lines.bad(Cause::Duplicate, name))?,
                None => rows.damage(lines.bad(Cause::BadRow, "not `ID#N CAPTION`"))?,
            }
        }
        captions.rest().try_for_each(|(id, captions)| rows.row(row(id, captions, &images)))
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.captions.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_data_sets_are_split() {
        assert_eq!(split("COCO_val2014_000000550529#0\t一只 猫"), Some(("COCO_val2014_000000550529", "一只 猫")));
        assert_eq!(split("COCO_val2014_000000550529#zhb#0 一只猫"), Some(("COCO_val2014_000000550529", "一只猫")));
        assert_eq!(split("10_ab.jpg#zhb#1 猫\r"), Some(("10_ab.jpg", "猫")));
        assert_eq!((split("no number 猫"), split("#0 猫"), split("a#0")), (None, None, None));
    }
}
