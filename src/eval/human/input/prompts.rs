//! Files of prompts: a table with the column `prompt` and, where known, `aspect` and `id`; or one prompt on each line.

use crate::{
    bounded_read,
    data::table::{EXTENSIONS, Row, Table},
    error::{Context, Result, ensure, failed},
};
use std::{borrow::Cow, path::Path};

/// Maximum size of a text file in bytes.
const MAX_FILE: u64 = 64 << 20;

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The column `id`, else the prompt's number in the file, from 1 on.
    pub id: String,
    /// Empty if the file does not say.
    pub aspect: String,
    pub prompt: String,
}

/// Reads prompts; whether they have ids of their own is the second result.
///
/// # Errors
/// The file cannot be read, or a prompt is missing or empty.
pub fn read(path: &Path) -> Result<(Vec<Prompt>, bool)> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let prompts = if EXTENSIONS.contains(&extension.as_str()) { table(path)? } else { lines(path)? };
    let message = format!("there is no prompt in {}", path.display());
    ensure!(!prompts.is_empty(), failed(message, "write one prompt on each line"));
    let have_ids = prompts.iter().any(|(id, _)| id.is_some());
    let all = prompts.iter().all(|(id, _)| id.is_some());
    let message = format!("some prompts in {} have an `id` and others have none", path.display());
    ensure!(all || !have_ids, failed(message, "give an id to all of them, or to none"));
    let prompt = |(at, (id, prompt)): (usize, (Option<String>, Prompt))| Prompt {
        id: id.unwrap_or_else(|| (at + 1).to_string()),
        ..prompt
    };
    Ok((prompts.into_iter().enumerate().map(prompt).collect(), have_ids))
}

type Found = (Option<String>, Prompt);

fn lines(path: &Path) -> Result<Vec<Found>> {
    let text = bounded_read::read_text(path, MAX_FILE)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    let prompt = |prompt: &str| Prompt { id: String::new(), aspect: String::new(), prompt: prompt.to_owned() };
    Ok(lines.map(|line| (None, prompt(line))).collect())
}

fn table(path: &Path) -> Result<Vec<Found>> {
    let mut table = Table::open(path)?;
    let (mut prompts, mut number) = (Vec::new(), 0);
    while let Some(rows) = table.next_batch()? {
        for index in 0..rows.len() {
            number += 1;
            let bad = |bad| failed(format_args!("bad {}: {bad}", path.display()), "see vilg eval human prompts");
            let row = rows.get(index).map_err(|found| bad(found.place))?;
            let found = prompt(&row).with_context(|| format!("row {number} of {}", path.display()))?;
            prompts.push(found);
        }
    }
    Ok(prompts)
}

fn prompt(row: &Row) -> Result<Found> {
    let text = |column: &str| -> Result<Option<String>> {
        let cell = row.text(column).map_err(|bad| failed(bad.place, "write the cell as text"))?;
        let cell = cell.map(Cow::into_owned).map(|cell| cell.trim().to_owned());
        Ok(cell.filter(|cell| !cell.is_empty()))
    };
    let hint = "the columns are `prompt` and, where known, `aspect` and `id`: see vilg eval human prompts";
    let Some(prompt) = text("prompt")? else { return Err(failed("there is no `prompt`", hint)) };
    let aspect = text("aspect")?.unwrap_or_default();
    Ok((text("id")?, Prompt { id: String::new(), aspect, prompt }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &str) -> Result<(Vec<Prompt>, bool)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn tables_and_lines_are_read() {
        let prompt = |id: &str, aspect: &str, prompt: &str| Prompt {
            id: id.to_owned(),
            aspect: aspect.to_owned(),
            prompt: prompt.to_owned(),
        };
        let (moon, sun) = (prompt("1", "", "月亮"), prompt("2", "", "太阳"));
        assert_eq!(read_text("a.txt", "\u{feff}月亮\r\n\n 太阳\n").unwrap(), (vec![moon.clone(), sun.clone()], false));
        let found = read_text("a.tsv", "aspect\tprompt\nstyle\t月亮\n\t太阳\n").unwrap();
        assert_eq!(found, (vec![Prompt { aspect: "style".to_owned(), ..moon }, sun], false));
        let found = read_text("a.jsonl", "{\"prompt\": \"月亮\", \"id\": 7}\n{\"prompt\": \"太阳\", \"id\": \"b\"}\n");
        assert_eq!(found.unwrap(), (vec![prompt("7", "", "月亮"), prompt("b", "", "太阳")], true));
    }

    #[test]
    fn missing_prompts_are_refused() {
        for (name, text, what) in [
            ("a.txt", " \n", "there is no prompt in "),
            ("a.tsv", "aspect\tprompt\n", "there is no prompt in "),
            ("a.tsv", "aspect\tprompt\nstyle\t \n", "row 1 of "),
            ("a.tsv", "aspect\ttext\nstyle\t月亮\n", "there is no `prompt`"),
            ("a.tsv", "aspect\tprompt\nstyle\n", "1 fields, but the header names 2"),
            ("a.jsonl", "{\"prompt\": \"月亮\"}\n{\"prompt\": [1]}\n", "row 2 of "),
            ("a.jsonl", "{\"prompt\": \"月亮\"}\n{\n", "bad "),
            ("a.jsonl", "{\"prompt\": \"月亮\", \"id\": 7}\n{\"prompt\": \"太阳\"}\n", "others have none"),
        ] {
            let error = format!("{:#}", read_text(name, text).unwrap_err());
            assert!(error.contains(what), "{what}: {error}");
        }
    }
}
