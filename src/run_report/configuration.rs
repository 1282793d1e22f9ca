//! The configurations of runs side by side; what differs between them comes first.

use super::{
    html::{Cell, Row, mark, table},
    run::Run,
};

/// A table of the keys that differ, and one of all keys; empty without runs.
pub fn html(runs: &[Run]) -> String {
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in runs.iter().flat_map(|run| &run.config) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    if keys.is_empty() {
        return String::new();
    }
    let names = runs.iter().enumerate().map(|(at, run)| format!("{} {}", mark(at), run.name));
    let header: Vec<String> = std::iter::once("key".to_owned()).chain(names).collect();
    let rows: Vec<Row> = keys.into_iter().map(|key| row(runs, key)).collect();
    let differing: Vec<Row> = rows.iter().filter(|row| !row.class.is_empty()).cloned().collect();
    let differences = match (runs.len(), differing.len()) {
        (1, _) => String::new(),
        (_, 0) => "<p>The configurations are equal.</p>\n".to_owned(),
        _ => format!("<h3>Differences</h3>\n{}", table(&header, &differing)),
    };
    format!(
        "<div class=\"config\">{differences}<details><summary>all {} keys</summary>\n{}</details></div>\n",
        rows.len(),
        table(&header, &rows)
    )
}

fn row(runs: &[Run], key: &str) -> Row {
    let value = |run: &Run| run.config.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
    let values: Vec<Option<String>> = runs.iter().map(value).collect();
    let differs = values.windows(2).any(|pair| pair[0] != pair[1]);
    let cells = values.into_iter().map(|value| value.map_or(Cell::Missing, Cell::Text));
    let cells = std::iter::once(Cell::Text(key.to_owned())).chain(cells).collect();
    Row { cells, class: if differs { "differs" } else { "" } }
}
