//! The JSON lines that are exchanged with a translator: `{"id":7,"text":"a cat"}` to it, `{"id":7,"text":"一只猫"}` or
//! `{"id":7,"error":"why"}` back, in any order.

use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Maximum size of an answer in bytes.
pub const MAX_LINE: u64 = 1 << 20;

/// One text to translate; `id` is unique in a run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Question<'a> {
    pub id: u64,
    pub text: &'a str,
}

/// The translation of a text, or why there is none.
pub type Answer = std::result::Result<String, String>;

#[derive(Deserialize)]
struct Line {
    id: u64,
    text: Option<String>,
    error: Option<String>,
}

/// The lines to send.
///
/// # Errors
/// None that can occur: texts can always be written as JSON.
pub fn lines(questions: &[Question<'_>]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for question in questions {
        serde_json::to_writer(&mut bytes, question)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// The id and the answer of a line; `None` if the line is no answer.
pub fn parse(line: &[u8]) -> Option<(u64, Answer)> {
    let Line { id, text, error } = serde_json::from_slice(line).ok()?;
    match (text, error) {
        (_, Some(error)) => Some((id, Err(error))),
        (Some(text), None) => Some((id, Ok(text))),
        (None, None) => None,
    }
}

/// The start of a line, for messages.
pub fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("`{}…`", text.get(..end).unwrap_or_default()),
        None => format!("`{text}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_one_line_and_an_answer_is_a_text_or_an_error() {
        let text = "say \"hi\"\tto 🐱\nnow";
        let sent = lines(&[Question { id: 3, text }, Question { id: 4, text: "" }]).unwrap();
        assert_eq!(sent.iter().filter(|byte| **byte == b'\n').count(), 2);
        let first = sent.split(|byte| *byte == b'\n').next().unwrap();
        assert_eq!(parse(first), Some((3, Ok(text.into()))));
        assert_eq!(parse("{\"text\":\"猫\",\"id\":1,\"score\":0.5}".as_bytes()), Some((1, Ok("猫".into()))));
        assert_eq!(parse(b"{\"id\":1,\"error\":\"too long\",\"text\":null}"), Some((1, Err("too long".into()))));
        for bad in ["", "loading", "{}", "{\"id\":1}", "{\"id\":-1,\"text\":\"a\"}", "{\"id\":1,\"text\":2}", "[1]"] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse(b"{\"id\":1,\"text\":\"\xff\"}"), None);
    }
}
