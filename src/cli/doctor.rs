//! `vilg doctor`

use crate::{
    bundle::DEMO_NAME,
    device_check::{self, Check, Part},
    dist,
    error::{Result, ensure, failed},
    report, runtime,
};
use serde_json::{Value, json};

/// Show what this machine offers and how this program was built; --check: compare what a device computes with the CPU
#[derive(clap::Args)]
#[command(
    after_help = "In the JSON, sizes are numbers of bytes (`*_bytes`; null: unknown) and counts are numbers. With \
    --check it is `device`, `failed` (a number) and `checks`, each with part, name, dtype, error, tolerance, passed and \
    failure; the exit code is 1 if a check fails. On the CPU, --check compares the implementation for devices with the \
    CPU's kernels.\n\n\
    Examples:\n  \
    vilg doctor\n  \
    vilg doctor --check ops,attention,collectives --device cuda"
)]
pub struct Args {
    /// Compute these parts on --device and compare the results with the CPU, in some seconds
    #[arg(long, value_enum, value_name = "PART,..", value_delimiter = ',')]
    check: Vec<Part>,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    if !args.check.is_empty() {
        return check(&args.check, json);
    }
    let facts = facts();
    if json {
        report::json(&Value::Object(facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()));
    } else {
        report::table(&[], &facts.iter().map(|(key, value)| row(key, value)).collect::<Vec<_>>());
    }
    Ok(())
}

/// Compares the device with the CPU.
fn check(parts: &[Part], json: bool) -> Result<()> {
    let device = runtime::device()?;
    let (checks, name) = (device_check::run(parts, &device), runtime::facts().device);
    let bad = checks.iter().filter(|check| !check.passed).count();
    if json {
        report::json(&json!({ "device": name, "failed": bad, "checks": checks }));
    } else {
        let header = ["check", "numbers", "error", "bound", "result"];
        report::table(&header, &checks.iter().map(check_row).collect::<Vec<_>>());
    }
    let what = format!("{bad} of {} checks failed on {name}", checks.len());
    ensure!(bad == 0, failed(what, "compute with --device cpu, and report the result (docs/gpu.md)"));
    Ok(())
}

fn check_row(check: &Check) -> Vec<String> {
    let result = match &check.failure {
        Some(failure) => format!("failed: {failure}"),
        None => if check.passed { "ok" } else { "failed" }.to_owned(),
    };
    let error = check.error.map_or(String::new(), |error| format!("{error:.1e}"));
    vec![check.name.clone(), check.dtype.to_owned(), error, format!("{:.1e}", check.tolerance), result]
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
