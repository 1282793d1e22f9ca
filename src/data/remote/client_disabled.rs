//! Replaces [`client`](super::client) in a build without the feature `remote`.

use super::{
    answer::{Answer, Entry, Failure, Limits, Wanted},
    location::Location,
};
use crate::error::{Result, usage};

const MESSAGE: &str = "this program was built without `remote`";
const HINT: &str = "rebuild with `cargo build --release --features remote`";

/// # Errors
/// Always.
pub fn open(_location: &Location, _wanted: &Wanted<'_>, _limits: &Limits) -> Result<Answer, Failure> {
    Err(Failure::permanent(MESSAGE, HINT))
}

/// # Errors
/// Always.
pub fn list(_folder: &Location, _levels: Option<usize>) -> Result<Vec<Entry>> {
    Err(usage(MESSAGE, HINT))
}
