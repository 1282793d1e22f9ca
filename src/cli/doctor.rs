//! `vilg doctor`

use crate::{bundle::DEMO_NAME, dist, error::Result, report, runtime};
use serde_json::{Value, json};

/// Show what this machine offers and how this program was built
#[derive(clap::Args)]
#[command(after_help = "In the JSON, sizes are numbers of bytes (`*_bytes`; null: unknown) and counts are numbers.")]
pub struct Args {}

pub fn run(_args: Args, json: bool) -> Result<()> {
    let facts = facts();
    if json {
        report::json(&Value::Object(facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()));
    } else {
        report::table(&[], &facts.iter().map(|(key, value)| row(key, value)).collect::<Vec<_>>());
    }
    Ok(())
}

/// The facts as (key, value), in the order in which they are shown.
fn facts() -> Vec<(&'static str, Value)> {
    let (version, machine) = (report::version(), runtime::facts());
    vec![
        ("version", json!(version.version)),
        ("commit", json!(version.commit)),
        ("features", json!(version.features.split_whitespace().collect::<Vec<_>>())),
        ("target", json!(version.target)),
        ("build", json!(machine.build)),
        ("device", json!(machine.device)),
        ("cuda", json!(machine.cuda)),
        ("nccl", json!(machine.nccl)),
        ("mpi", json!(dist::MPI_STATE)),
        ("threads", json!(machine.threads)),
        ("processor", json!(machine.processor)),
        ("vector_units", json!(machine.vector_units)),
        ("amx", json!(machine.amx)),
        ("memory_bytes", json!(machine.memory_bytes)),
        ("memory_available_bytes", json!(machine.memory_available_bytes)),
        ("disk_available_here_bytes", json!(machine.disk_available_here_bytes)),
        ("demo_model", json!(format!("in the program: --model {DEMO_NAME}"))),
    ]
}

/// One row of the table: `memory_bytes 8000000000` becomes `memory  8.0 GB`.
fn row(key: &str, value: &Value) -> Vec<String> {
    let (name, is_size) = key.strip_suffix("_bytes").map_or((key, false), |name| (name, true));
    let shown = match value {
        Value::Number(bytes) if is_size => format!("{:.1} GB", bytes.as_f64().unwrap_or(0.0) / 1e9),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        Value::Null => "unknown".to_owned(),
        other => other.to_string(),
    };
    vec![name.replace('_', " "), shown]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_of_bytes_and_are_shown_in_gigabytes() {
        for (key, value) in facts().iter().filter(|(key, _)| key.ends_with("_bytes")) {
            assert!(value.is_u64() || value.is_null(), "{key}: {value}");
        }
        assert_eq!(row("memory_available_bytes", &json!(8_040_000_000_u64)), ["memory available", "8.0 GB"]);
        assert_eq!(row("vector_units", &json!(["avx2", "fma"])), ["vector units", "avx2 fma"]);
        assert_eq!(
            (row("commit", &Value::Null), row("threads", &json!(2))),
            (vec!["commit".into(), "unknown".into()], vec!["threads".into(), "2".into()])
        );
    }
}
