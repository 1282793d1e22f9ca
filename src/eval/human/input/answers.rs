//! Answers to questions about images: the lines of `vilg vqa --json`, and those of people.

use super::{Source, json};
use crate::{
    data::{Kind, questions, table},
    error::{Hint, Result, ensure, failed, usage},
    eval::{
        human::draft::{Item, Output},
        open,
    },
    report,
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::{Path, PathBuf},
};

const FORMAT: &str =
    r#"answers look like this, one on each line: {"image": "1.png", "question": "几只羊？", "answer": "三只"}"#;

#[derive(Deserialize)]
struct Answer {
    image: String,
    question: String,
    answer: String,
}

/// An image and a question.
type Key = (String, String);

/// The questions of the first system's file with the answers of each system. Answers of people come from a file of the same
/// format, or from the `questions` in the JSON of samples: the sample of an image is that with its name.
///
/// # Errors
/// A file cannot be read, an image is missing, or a question does not have one answer of each system.
pub fn answers(systems: &[Source]) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::new();
    for (number, system) in systems.iter().enumerate() {
        let name = system.path.display();
        let from_data = system.is_human && !is_list(&system.path);
        let mut found = if from_data { of_samples(&system.path)? } else { of_file(&system.path)? };
        if number == 0 {
            items = found.order.iter().map(item).collect::<Result<_>>()?;
        }
        for item in &mut items {
            let image = item.image.as_deref().unwrap_or(Path::new(""));
            let image = if from_data { image.file_stem() } else { Some(image.as_os_str()) };
            let key = (image.unwrap_or_default().to_string_lossy().into_owned(), item.prompt.clone());
            let Some(answer) = found.answers.remove(&key) else {
                let message = format!("{name} has no answer to “{}” about {}", key.1, key.0);
                return Err(failed(message, "each question needs one answer of each system and of a person"));
            };
            item.outputs.push(Output::Text(answer));
        }
        if let (false, Some((image, question))) = (system.is_human, found.answers.keys().next()) {
            let message =
                format!("{name} answers “{question}” about {image}, and {} does not", systems[0].path.display());
            return Err(failed(message, "all systems must answer the same questions"));
        }
    }
    Ok(items)
}

/// Whether a path is a file of answers and not a data set.
fn is_list(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    extension == "json" || table::EXTENSIONS.contains(&extension.as_str())
}

fn item((image, question): &Key) -> Result<Item> {
    let path = PathBuf::from(image);
    let hint = "run the command in the folder in which the answers were made";
    ensure!(path.is_file(), usage(format_args!("there is no image {image}"), hint));
    let key = format!("{image} {question}");
    Ok(Item { key, aspect: String::new(), prompt: question.clone(), image: Some(path), outputs: Vec::new() })
}

#[derive(Default)]
struct Found {
    answers: BTreeMap<Key, String>,
    /// The questions in the order of the file.
    order: Vec<Key>,
}

fn of_file(path: &Path) -> Result<Found> {
    let mut found = Found::default();
    for Answer { image, question, answer } in json::objects::<Answer>(path, FORMAT)? {
        let key = (image, question.trim().to_owned());
        ensure!(!key.1.is_empty(), failed(format_args!("a question in {} is empty", path.display()), FORMAT));
        match found.answers.entry(key) {
            Entry::Occupied(entry) => {
                let (image, question) = entry.key();
                let message = format!("{} answers “{question}” about {image} twice", path.display());
                return Err(failed(message, "give one answer to each question"));
            }
            Entry::Vacant(entry) => {
                found.order.push(entry.key().clone());
                entry.insert(answer);
            }
        }
    }
    Ok(found)
}

/// The first answer to each question about each sample of a data set.
fn of_samples(path: &Path) -> Result<Found> {
    let name = path.to_str().hint(format_args!("{} is not UTF-8", path.display()), "rename it")?;
    let dataset = open(name, Kind::Captions)?;
    let (mut found, mut bad) = (Found::default(), dataset.bad.clone());
    for record in dataset.records(1) {
        match record {
            Ok(record) => {
                let stem = Path::new(&record.key).file_name().unwrap_or_default().to_string_lossy().into_owned();
                for question in questions(&record.meta) {
                    found.answers.entry((stem.clone(), question.question)).or_insert(question.answer);
                }
            }
            Err(error) => bad.add(error),
        }
    }
    if bad.total() > 0 {
        report::warn(format_args!("skipped in `{name}`: {bad}"));
    }
    let hint = "questions are in the field `questions` of a sample's JSON (docs/data.md)";
    ensure!(!found.answers.is_empty(), failed(format_args!("no sample in `{name}` has questions"), hint));
    Ok(found)
}
