//! The starts of each run: program, machine and command line.

use super::{
    html::{Cell, Row, escape, mark, table},
    run::Run,
};
use serde_json::Value;

const HEADER: [&str; 10] =
    ["time", "after step", "version", "commit", "features", "host", "processor", "threads", "memory", "command"];

/// A table for each run; empty if no start is known.
pub fn html(runs: &[Run]) -> String {
    let mut html = String::new();
    for (at, run) in runs.iter().enumerate().filter(|(_, run)| !run.launches.shown.is_empty()) {
        let (shown, total) = (run.launches.shown.len(), run.launches.total);
        let of_all = if shown < total { format!(", the last {shown} of {total} starts") } else { String::new() };
        let rows: Vec<Row> = run.launches.shown.iter().map(row).collect();
        let table = table(&HEADER.map(str::to_owned), &rows);
        html +=
            &format!("<h3>{} {}{of_all}</h3>\n<div class=\"versions\">{table}</div>\n", mark(at), escape(&run.name));
    }
    html
}

fn row(launch: &Value) -> Row {
    let text = |at: &str| match launch.pointer(at) {
        None | Some(Value::Null) => Cell::Missing,
        Some(Value::String(text)) => Cell::Text(text.clone()),
        Some(value) => Cell::Text(value.to_string()),
    };
    let commit = launch.pointer("/program/commit").and_then(Value::as_str);
    let commit = commit.map_or(Cell::Missing, |commit| Cell::Text(commit.chars().take(12).collect()));
    let memory = launch["memory_bytes"].as_f64();
    let memory = memory.map_or(Cell::Missing, |bytes| Cell::Text(format!("{:.1} GB", bytes / 1e9)));
    let command: Vec<&str> = launch["command"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let cells = vec![
        text("/time"),
        text("/step"),
        text("/program/version"),
        commit,
        text("/program/features"),
        text("/host"),
        text("/processor"),
        text("/threads"),
        memory,
        Cell::Text(command.join(" ")),
    ];
    Row { cells, class: "" }
}
