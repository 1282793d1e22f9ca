//! The only place that prints: results go to stdout, talk goes to stderr. No colour anywhere.

mod version;

pub use version::{Version, version};

use crate::error::{Error, Exit, hint_of};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{fmt::Display, io::ErrorKind, io::Write};

/// A line of the result (stdout).
pub fn result(line: impl Display) {
    bytes(format!("{line}\n").as_bytes());
}

/// Raw bytes of the result (stdout). A closed pipe (`vilg … | head`) ends the program quietly.
pub fn bytes(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            note(format_args!("error: cannot write to stdout: {e}"));
            std::process::exit(1);
        }
    }
}

/// One JSON object on one line of stdout.
pub fn json(value: &impl Serialize) {
    result(serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}")));
}

/// A table on stdout: columns as wide as their widest cell; no header line where `header` is empty.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let lines = || std::iter::once(&header).filter(|h| !h.is_empty()).chain(rows);
    let columns = lines().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        (0..columns).map(|c| lines().filter_map(|l| l.get(c)).map(|cell| width(cell)).max().unwrap_or(0)).collect();
    for line in lines() {
        let cells = line.iter().zip(&widths).map(|(cell, w)| format!("{cell}{}", " ".repeat(w - width(cell))));
        result(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// Characters that take two columns of a terminal: CJK, full-width forms, emoji.
const WIDE: [std::ops::RangeInclusive<char>; 7] = [
    '\u{1100}'..='\u{115f}',
    '\u{2e80}'..='\u{a4cf}',
    '\u{ac00}'..='\u{d7a3}',
    '\u{f900}'..='\u{faff}',
    '\u{fe30}'..='\u{fe6f}',
    '\u{ff00}'..='\u{ff60}',
    '\u{1f300}'..='\u{1faff}',
];

/// Columns of a terminal that `text` takes.
fn width(text: &str) -> usize {
    text.chars().map(|c| if WIDE.iter().any(|range| range.contains(&c)) { 2 } else { 1 }).sum()
}

/// A line of talk (stderr).
pub fn note(line: impl Display) {
    // Nobody is left to tell when stderr is closed.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// A warning (stderr).
pub fn warn(line: impl Display) {
    note(format_args!("warning: {line}"));
}

/// An error with what lies under it and its hint (stderr).
pub fn error(error: &Error) {
    note(format_args!("error: {error:#}"));
    if let Some(hint) = hint_of(error) {
        note(format_args!("hint: {hint}"));
    }
}

/// Ends the program where it cannot return: a thread hangs, or another process has said why.
pub fn leave(exit: Exit) -> ! {
    std::process::exit(exit as i32)
}

/// A progress bar on stderr; hidden where stderr is not a terminal.
pub fn bar(length: u64, label: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(label.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::width;

    #[test]
    fn chinese_characters_take_two_columns() {
        assert_eq!((width("moon"), width("一轮弯月，a"), width("")), (4, 11, 0));
    }
}
