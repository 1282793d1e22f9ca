//! JSON files: one list, or one object on each line.

use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed, plain},
};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Maximum size of a file in bytes.
const MAX_FILE: u64 = 256 << 20;

/// Reads the objects of a file: those of a list, or one on each line. `format` is the hint of errors.
///
/// # Errors
/// The file cannot be read, has no objects, or one that is not a `T`.
pub fn objects<T: DeserializeOwned>(path: &Path, format: &str) -> Result<Vec<T>> {
    let name = path.display();
    let text = bounded_read::read_text(path, MAX_FILE).hint(format_args!("cannot read {name}"), format)?;
    let text = text.trim_start_matches('\u{feff}');
    let found: Vec<T> = match text.trim_start().starts_with('[') {
        true => serde_json::from_str(text).map_err(plain).hint(format_args!("bad {name}"), format)?,
        false => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let parse = |(at, line): (usize, &str)| {
                serde_json::from_str(line).map_err(plain).hint(format_args!("bad {name}, line {}", at + 1), format)
            };
            lines.map(parse).collect::<Result<_>>()?
        }
    };
    ensure!(!found.is_empty(), failed(format_args!("there is nothing in {name}"), format));
    Ok(found)
}
