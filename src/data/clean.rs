//! What becomes of the text of a caption, a question or an answer when it is read.

/// Maximum length of a caption in characters; longer captions are truncated.
const MAX_CAPTION: usize = 4096;

/// Cleans a caption: control characters and runs of spaces become one space, and it is truncated to 4096 characters.
pub(super) fn clean(text: &str) -> String {
    let text = text.trim_start_matches('\u{feff}');
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_CAPTION) {
        Some((end, _)) => line[..end].to_owned(),
        None => line,
    }
}
