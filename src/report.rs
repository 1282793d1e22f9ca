//! The only place that prints: results go to stdout, talk goes to stderr.

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{fmt::Display, io::Write};

/// A line of the result (stdout). A closed pipe (`vilg … | head`) ends the program quietly.
pub fn result(line: impl Display) {
    if writeln!(std::io::stdout().lock(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// One JSON object on one line of stdout.
pub fn json(value: &impl Serialize) {
    result(serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}")));
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

/// A progress bar on stderr; hidden where stderr is not a terminal.
pub fn bar(length: u64, label: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(label.to_owned());
    bar
}
