//! A configuration as a flat list of dotted keys.

use super::Config;
use crate::error::Result;
use toml::{Table, Value};

/// All values by dotted key (`model.layers`), in the order of the struct's fields.
pub fn values(config: &Config) -> Result<Vec<(String, Value)>> {
    Ok(flatten(Table::try_from(config)?))
}

/// All values of a configuration's table by dotted key, in its order.
pub fn flatten(table: Table) -> Vec<(String, Value)> {
    let mut flat = Vec::new();
    for (section, value) in table {
        match value {
            Value::Table(keys) => flat.extend(keys.into_iter().map(|(key, value)| (format!("{section}.{key}"), value))),
            value => flat.push((section, value)),
        }
    }
    flat
}
