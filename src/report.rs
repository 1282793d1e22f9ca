//! All output of the program: results go to stdout; notes, warnings, errors and progress go to stderr. No colors.
//!
//! Text may come from a file (a caption, a file name, a vocabulary). Control characters in it could move the cursor or
//! change a terminal's settings: everything printed here goes through [`escape_controls`].

mod version;

pub use version::{Version, version};

use crate::error::{Error, Exit, hint_of};
use indicatif::{ProgressBar, ProgressStyle, WeakProgressBar};
use serde::Serialize;
use std::{
    borrow::Cow,
    fmt::Display,
    io::ErrorKind,
    io::Write,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

/// How much is printed to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verbosity {
    /// `-q`: warnings and errors.
    Quiet,
    /// Also notes and progress.
    Normal,
    /// `-v`: also details.
    Verbose,
}

static VERBOSITY: AtomicU8 = AtomicU8::new(Verbosity::Normal as u8);

/// The visible progress bar; lines are printed above it.
static BAR: Mutex<Option<WeakProgressBar>> = Mutex::new(None);

/// Sets how much is printed to stderr, for the whole process.
pub fn set_verbosity(verbosity: Verbosity) {
    VERBOSITY.store(verbosity as u8, Ordering::Relaxed);
}

fn prints(wanted: Verbosity) -> bool {
    VERBOSITY.load(Ordering::Relaxed) >= wanted as u8
}

/// Escapes control characters other than newline and tab: `\x1b` (escape) becomes `\u{1b}`. Characters that reverse the
/// direction of text are escaped too, because a file name could use them to look like another one.
pub fn escape_controls(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| match is_unsafe(c) {
        true => c.escape_unicode().to_string(),
        false => c.to_string(),
    };
    Cow::Owned(text.chars().map(escape).collect())
}

fn is_unsafe(c: char) -> bool {
    let turns_direction = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns_direction || (c.is_control() && c != '\n' && c != '\t')
}

/// A path as a JSON string. Bytes that are not UTF-8 become U+FFFD (�).
pub fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Prints a line of the result to stdout.
pub fn result(line: impl Display) {
    bytes(format!("{}\n", escape_controls(&line.to_string())).as_bytes());
}

/// Writes raw bytes of the result to stdout. A closed pipe (`vilg … | head`) ends the program silently.
pub fn bytes(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            say(format_args!("error: cannot write to stdout: {e}"));
            std::process::exit(1);
        }
    }
}

/// Whether stdout is a terminal, which cannot show binary data.
pub fn stdout_is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stdout())
}

/// Prints a JSON object on one line of stdout.
pub fn json(value: &impl Serialize) {
    let text =
        serde_json::to_string(value).unwrap_or_else(|e| serde_json::json!({ "error": e.to_string() }).to_string());
    bytes(format!("{}\n", escape_json(&text)).as_bytes());
}

/// Escapes all control characters in JSON; JSON itself only requires it for those below U+0020.
fn escape_json(text: &str) -> String {
    let escape = |c: char| match is_unsafe(c) {
        true => format!("\\u{:04x}", c as u32),
        false => c.to_string(),
    };
    text.chars().map(escape).collect()
}

/// Prints a table to stdout with columns as wide as their widest cell; without a header line if `header` is empty.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let escaped = |row: &Vec<String>| row.iter().map(|cell| escape_controls(cell).into_owned()).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(escaped).collect();
    let lines = || std::iter::once(&header).filter(|h| !h.is_empty()).chain(&rows);
    let columns = lines().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        (0..columns).map(|c| lines().filter_map(|l| l.get(c)).map(|cell| width(cell)).max().unwrap_or(0)).collect();
    for line in lines() {
        let cells = line.iter().zip(&widths).map(|(cell, w)| format!("{cell}{}", " ".repeat(w - width(cell))));
        result(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// Characters that are two terminal columns wide: CJK, full-width forms, emoji.
const WIDE: [std::ops::RangeInclusive<char>; 7] = [
    '\u{1100}'..='\u{115f}',
    '\u{2e80}'..='\u{a4cf}',
    '\u{ac00}'..='\u{d7a3}',
    '\u{f900}'..='\u{faff}',
    '\u{fe30}'..='\u{fe6f}',
    '\u{ff00}'..='\u{ff60}',
    '\u{1f300}'..='\u{1faff}',
];

/// Width of `text` in terminal columns.
fn width(text: &str) -> usize {
    text.chars().map(|c| if WIDE.iter().any(|range| range.contains(&c)) { 2 } else { 1 }).sum()
}

/// Prints a note about progress to stderr; not with `-q`.
pub fn note(line: impl Display) {
    if prints(Verbosity::Normal) {
        say(line);
    }
}

/// Prints a detail to stderr; only with `-v`.
pub fn detail(line: impl Display) {
    if prints(Verbosity::Verbose) {
        say(line);
    }
}

/// Prints a warning to stderr.
pub fn warn(line: impl Display) {
    say(format_args!("warning: {line}"));
}

/// Prints an error with its causes and its hint to stderr.
pub fn error(error: &Error) {
    say(format_args!("error: {error:#}"));
    if let Some(hint) = hint_of(error) {
        say(format_args!("hint: {hint}"));
    }
}

/// Prints a line to stderr, above the progress bar if there is one.
fn say(line: impl Display) {
    let line = format!("{}\n", escape_controls(&line.to_string()));
    // If stderr is closed, the failure cannot be reported anywhere.
    let write = || drop(std::io::stderr().lock().write_all(line.as_bytes()));
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(WeakProgressBar::upgrade);
    match bar {
        Some(bar) if !bar.is_finished() => bar.suspend(write),
        _ => write(),
    }
}

/// Ends the process without returning: for when a thread hangs, or another process has already reported the error.
pub fn leave(exit: Exit) -> ! {
    std::process::exit(exit as i32)
}

/// A progress bar on one line of stderr. Hidden with `-q` or if stderr is not a terminal.
pub fn bar(length: u64, label: &str) -> ProgressBar {
    if !prints(Verbosity::Normal) {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {elapsed} elapsed, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(label.to_owned());
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.downgrade());
    bar
}

/// A count of finished rows and their speed on one line of stderr, where the total is unknown. Hidden like [`bar`].
pub fn counter(label: &str) -> ProgressBar {
    let bar = bar(0, label);
    let style = ProgressStyle::with_template("{pos} {msg}, {per_sec}, {elapsed} elapsed");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chinese_characters_take_two_columns() {
        assert_eq!((width("moon"), width("一轮弯月，a"), width("")), (4, 11, 0));
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape_controls("一轮弯月\tmoon\n🌙"), "一轮弯月\tmoon\n🌙");
        assert_eq!(escape_controls("a\x1b[2Jb\r\u{9b}c\x7f\0"), "a\\u{1b}[2Jb\\u{d}\\u{9b}c\\u{7f}\\u{0}");
        assert_eq!(escape_controls("gnp.\u{202e}exe"), "gnp.\\u{202e}exe");
    }

    #[test]
    fn json_without_control_characters_is_the_same_json() {
        let value = serde_json::json!({ "caption": "月\u{9b}2J\u{1b}\u{7f}\u{202e}\n" });
        let text = escape_json(&value.to_string());
        assert!(!text.contains(is_unsafe) && !text.contains('\n'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_is_not_utf_8_is_text_in_json() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(path(Path::new(std::ffi::OsStr::from_bytes(b"a\xff/\xe6\x9c\x88.png"))), "a\u{fffd}/月.png");
    }
}
