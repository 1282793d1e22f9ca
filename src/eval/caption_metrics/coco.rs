//! References and results in the formats of COCO's caption evaluation.

use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed, plain},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

/// Maximum size of a file in bytes; the references of COCO's training images have 66 MB.
const MAX_FILE: u64 = 1 << 30;
const REFERENCES: &str =
    r#"references look like {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "一只猫"}]}"#;
const RESULTS: &str = r#"results look like [{"image_id": 1, "caption": "一只猫"}]"#;

/// An image's id: a number in COCO, a file name in AIC-ICC.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged, expecting = "an image id must be a whole number or a text")]
pub enum ImageId {
    Number(i64),
    Text(String),
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => write!(f, "`{text}`"),
        }
    }
}

/// An image's caption and references.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub id: ImageId,
    pub caption: String,
    pub references: Vec<String>,
}

#[derive(Deserialize)]
struct References {
    /// May be missing, as for pycocotools.
    images: Option<Vec<Image>>,
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Image {
    id: ImageId,
}

#[derive(Deserialize)]
struct Annotation {
    image_id: ImageId,
    caption: String,
}

/// Reads the references and results of the same images; the samples are in the order of their ids, not in that of the
/// files.
///
/// # Errors
/// A file cannot be read; an image has no result, several results or no references; or a result or reference belongs to no
/// image.
pub fn read(references: &Path, results: &Path) -> Result<Vec<Sample>> {
    let known = references_of(references)?;
    let mut captions = BTreeMap::new();
    let hint = "give one caption for each image of the references, and none of other images";
    for Annotation { image_id, caption } in parse::<Vec<Annotation>>(results, RESULTS)? {
        let message =
            format!("image {image_id} in {} has no references in {}", results.display(), references.display());
        ensure!(known.contains_key(&image_id), failed(message, hint));
        let message = format!("two results for image {image_id} in {}", results.display());
        ensure!(captions.insert(image_id, caption).is_none(), failed(message, hint));
    }
    let missing = known.keys().filter(|id| !captions.contains_key(id));
    let count = missing.clone().count();
    if let Some(first) = missing.clone().next() {
        let others = if count > 1 { format!(" and {} others", count - 1) } else { String::new() };
        return Err(failed(format_args!("no result for image {first}{others} in {}", results.display()), hint));
    }
    let sample = |(id, references): (ImageId, Vec<String>)| {
        let caption = captions.remove(&id).unwrap_or_default();
        Sample { id, caption, references }
    };
    Ok(known.into_iter().map(sample).collect())
}

/// All captions of a file of references, in its order.
///
/// # Errors
/// The file cannot be read, or has no captions.
pub fn captions(path: &Path) -> Result<Vec<String>> {
    let References { annotations, .. } = parse(path, REFERENCES)?;
    let captions: Vec<String> = annotations.into_iter().map(|annotation| annotation.caption).collect();
    ensure!(!captions.is_empty(), failed(format_args!("there are no captions in {}", path.display()), REFERENCES));
    Ok(captions)
}

/// The references of each image.
fn references_of(path: &Path) -> Result<BTreeMap<ImageId, Vec<String>>> {
    let References { images, annotations } = parse(path, REFERENCES)?;
    let listed: Option<BTreeSet<ImageId>> = images.map(|images| images.into_iter().map(|image| image.id).collect());
    let mut found: BTreeMap<ImageId, Vec<String>> = BTreeMap::new();
    for Annotation { image_id, caption } in annotations {
        let message = format!("an annotation in {} is of image {image_id}, which is not in `images`", path.display());
        ensure!(listed.as_ref().is_none_or(|listed| listed.contains(&image_id)), failed(message, REFERENCES));
        found.entry(image_id).or_default().push(caption);
    }
    let without = listed.iter().flatten().find(|id| !found.contains_key(id));
    if let Some(id) = without {
        let hint = "remove the image from `images`, or add its captions to `annotations`";
        return Err(failed(format_args!("image {id} in {} has no references", path.display()), hint));
    }
    ensure!(!found.is_empty(), failed(format_args!("there are no references in {}", path.display()), REFERENCES));
    Ok(found)
}

fn parse<T: DeserializeOwned>(path: &Path, format: &str) -> Result<T> {
    let bytes = bounded_read::read(path, MAX_FILE).hint(format_args!("cannot read {}", path.display()), format)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(bytes).map_err(plain).hint(format_args!("bad {}", path.display()), format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;
    use std::fs;

    fn read_texts(references: &str, results: &str) -> Result<Vec<Sample>> {
        let folder = tempfile::tempdir().unwrap();
        let [r, c] = [("r.json", references), ("c.json", results)].map(|(name, text)| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        });
        read(&r, &c)
    }

    #[test]
    fn samples_are_in_the_order_of_their_ids() {
        let references = r#"{"info": {}, "images": [{"id": "b.jpg"}, {"id": 7}, {"id": 12}], "annotations": [
            {"image_id": 12, "caption": "甲"}, {"image_id": 7, "caption": "乙"}, {"image_id": "b.jpg", "caption": "丁"},
            {"image_id": 12, "caption": "丙"}]}"#;
        let results = r#"[{"image_id": "b.jpg", "caption": ""}, {"image_id": 12, "caption": "x"}, {"image_id": 7, "caption": "y"}]"#;
        let samples = read_texts(references, results).unwrap();
        let ids: Vec<String> = samples.iter().map(|sample| sample.id.to_string()).collect();
        assert_eq!(ids, ["7", "12", "`b.jpg`"]);
        assert_eq!(
            (samples[1].caption.as_str(), &samples[1].references[..]),
            ("x", &["甲".to_owned(), "丙".to_owned()][..])
        );
        let plain = &references[references.find("\"annotations\"").unwrap()..];
        assert_eq!(read_texts(&format!("\u{feff}{{{plain}"), results).unwrap(), samples, "`images` may be missing");
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let two = r#"{"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}]}"#;
        let one = r#"[{"image_id": 1, "caption": "a"}]"#;
        for (references, results, what) in [
            (two, one, "no result for image 2 in "),
            (two, "[]", "no result for image 1 and 1 others"),
            (two, r#"[{"image_id": 3, "caption": "a"}]"#, "image 3 in "),
            (two, r#"[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]"#, "two results for image 1"),
            (two, two, "expected a list in [ ]"),
            (two, r#"[{"image_id": 1.5, "caption": "a"}]"#, "whole number or a text"),
            (two, r#"[{"image_id": 1, "caption": null}]"#, "expected text in quotes"),
            (two, r#"[{"image_id": 1}]"#, "missing field `caption`"),
            (two, "[{", "bad "),
            (one, one, "bad "),
            ("{}", one, "missing field `annotations`"),
            (r#"{"annotations": []}"#, "[]", "no references"),
            (r#"{"images": [{"id": 1}], "annotations": []}"#, one, "image 1 in "),
            (r#"{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}"#, one, "which is not in `images`"),
        ] {
            let error = read_texts(references, results).unwrap_err();
            assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
            assert!(hint_of(&error).is_some(), "{error:#}");
        }
        assert!(read(Path::new("nowhere.json"), Path::new("nowhere.json")).is_err());
    }
}
