//! Results of `vilg eval … --json`: files are read, and told apart by the keys that each command writes.

use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed},
};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::{Deserializer, Map, Value};
use std::path::Path;

/// Maximum size of a file in bytes: captions of 100,000 images, with the scores of each.
const LARGEST: u64 = 32 << 20;
/// Maximum number of results in a file: `vilg eval recon` writes one for each model.
const RESULTS: usize = 100;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    TextToImage,
    Fid,
    Caption,
    Naming,
    Vqa,
    Retrieval,
    Matcher,
    Classification,
    Calibration,
    Reconstruction,
    Ablation,
    /// Any other JSON object.
    Other,
}

/// One result.
#[derive(Debug, PartialEq)]
pub struct Evaluation {
    /// The file, as the user named it.
    pub file: String,
    pub kind: Kind,
    pub values: Value,
}

/// A result without the scores of each image, which no table shows.
#[derive(Deserialize)]
struct Stored {
    #[serde(default, rename = "per_image")]
    _per_image: Option<IgnoredAny>,
    #[serde(flatten)]
    values: Map<String, Value>,
}

/// Reads all results of a file: one JSON object, or several one after the other.
///
/// # Errors
/// The file cannot be read, is too large, or holds something else.
pub fn read(path: &Path) -> Result<Vec<Evaluation>> {
    let (file, hint) = (path.display().to_string(), "give files that `vilg eval ... --json` wrote, or run folders");
    let bytes = bounded_read::read(path, LARGEST).hint(format_args!("cannot read {file}"), hint)?;
    let mut found = Vec::new();
    for stored in Deserializer::from_slice(&bytes).into_iter::<Stored>() {
        let stored = stored.hint(format_args!("{file} does not hold JSON objects"), hint)?;
        ensure!(found.len() < RESULTS, failed(format_args!("{file} holds more than {RESULTS} results"), hint));
        let values = Value::Object(stored.values);
        found.push(Evaluation { file: file.clone(), kind: kind(&values), values });
    }
    ensure!(!found.is_empty(), failed(format_args!("{file} is empty"), hint));
    Ok(found)
}

fn kind(values: &Value) -> Kind {
    let has = |pointer| values.pointer(pointer).is_some_and(|value| !value.is_null());
    let kinds = [
        (has("/scores/clip_score"), Kind::TextToImage),
        (has("/protocol") && values.get("fid").is_some(), Kind::Fid),
        (has("/metrics") && has("/tokens"), Kind::Caption),
        (has("/accuracy/all"), Kind::Vqa),
        (has("/accuracy/rate"), Kind::Naming),
        (has("/result/top1"), Kind::Retrieval),
        (has("/retrieval/image_to_text"), Kind::Matcher),
        (has("/classification"), Kind::Classification),
        (has("/result/calibration"), Kind::Calibration),
        (has("/result/psnr"), Kind::Reconstruction),
        (has("/settings/features") && has("/rows"), Kind::Ablation),
    ];
    kinds.into_iter().find(|(is, _)| *is).map_or(Kind::Other, |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Evaluation>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        read(file.path())
    }

    #[test]
    fn several_results_of_a_file_are_read_without_the_scores_of_images() {
        let text = "{\"model\":\"a\",\"result\":{\"psnr\":20.5}}\n{\"tokens\":\"characters\",\"metrics\":{\"CIDEr\":1},\
                    \"per_image\":[{\"image_id\":1}]}\n{\"mean\":4}\n{\"scores\":{\"clip_score\":{\"mean\":31.0}}}";
        let found = read_text(text).unwrap();
        assert_eq!(
            found.iter().map(|e| e.kind).collect::<Vec<_>>(),
            [Kind::Reconstruction, Kind::Caption, Kind::Other, Kind::TextToImage]
        );
        assert!(found[1].values.get("per_image").is_none() && found[0].values["result"]["psnr"] == 20.5);
    }

    #[test]
    fn other_files_are_refused_with_a_hint() {
        let nested = "[".repeat(100_000);
        for text in ["", "not json", "[1, 2]", "{\"a\":", "{\"a\":1}{\"b\"", "\u{89}PNG", &nested] {
            let error = read_text(text).unwrap_err();
            assert!(crate::error::hint_of(&error).is_some_and(|hint| hint.contains("vilg eval")), "{text}: {error:#}");
        }
        assert!(read_text(&"{}".repeat(101)).unwrap_err().to_string().contains("more than 100"));
    }
}
