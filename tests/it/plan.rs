//! `vilg plan` and `vilg train --dry-run --world-size N` for the 10 B model, without any of its files.

use crate::commands::vilg;
use serde_json::Value;
use std::process::Output;

fn run(args: &[&str]) -> Output {
    vilg(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let output = run(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// GB per GPU of 10 B parameters by ZeRO's formulas: (GPUs, stage, without offload, with offload).
const BY_HAND: [(&str, u64, f64, f64); 9] = [
    ("8", 1, 75.0, 60.0),
    ("8", 2, 41.6, 26.6),
    ("8", 3, 24.5, 9.5),
    ("16", 1, 67.5, 60.0),
    ("16", 2, 31.6, 24.1),
    ("16", 3, 13.3, 5.8),
    ("64", 1, 61.9, 60.0),
    ("64", 2, 24.1, 22.2),
    ("64", 3, 4.8, 3.0),
];

#[test]
fn plan_of_10_b_equals_the_formulas() {
    for memory in ["16", "80"] {
        for gpus in ["8", "16", "64"] {
            let value =
                json(&["plan", "--config", "configs/10b.toml", "--gpus", gpus, "--gpu-memory", memory])["plan"].take();
            let rows = value["rows"].as_array().unwrap();
            assert_eq!(rows.len(), 8);
            for (_, stage, without, with) in BY_HAND.iter().filter(|row| row.0 == gpus) {
                for (offload, expected) in [(false, without), (true, with)] {
                    let row = rows.iter().find(|row| row["stage"] == *stage && row["offload"] == offload).unwrap();
                    let number = |key: &str| row[key].as_f64().unwrap() / 1e9;
                    let held = number("states_bytes");
                    assert!((held / expected - 1.0).abs() < 0.05, "stage {stage}, {gpus} GPUs: {held}, not {expected}");
                    let kinds = &row["kinds"];
                    let extra = ["under_way", "average", "activations"].map(|kind| kinds[kind].as_f64().unwrap() / 1e9);
                    assert!((number("total_bytes") - held - extra.iter().sum::<f64>()).abs() < 1e-6);
                    let available = memory.parse::<f64>().unwrap() - 1.0;
                    assert_eq!(row["fits"], number("total_bytes") <= available, "{row}");
                    assert_eq!(number("host_bytes") > 0.0, offload);
                }
            }
            // Stage 3 with offload is the configuration's own: with eight samples a micro-step, activations alone take 10 GB.
            assert_eq!(value["fits"], (gpus, memory) != ("8", "16"));
        }
    }
}

#[test]
fn a_roofline_names_what_bounds_a_step() {
    let args = ["plan", "--config", "configs/10b.toml", "--gpus", "64", "--gpu-memory", "80", "--gpu-tflops", "989"];
    let of = |more: &[&str]| json(&[&args, more].concat())["rooflines"].take();
    let found = of(&["--gpu-bandwidth", "3.35", "--roofline"]);
    let [stock, fused] = found.as_array().unwrap().as_slice() else { panic!("{found}") };
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap();
    for (roofline, slowest) in [(stock, "element-wise ops"), (fused, "matrix products")] {
        // 32 micro-steps gather all weights: the network is slower than all ops.
        assert!(number(roofline, "network_seconds") > number(roofline, "compute_seconds"));
        assert_eq!(roofline["ops"][0][0], slowest, "the slowest is first");
    }
    assert!(number(fused, "compute_seconds") < number(stock, "compute_seconds"));
    let fast = of(&["--gpu-bandwidth", "3.35", "--gpu-network", "450", "--roofline"]);
    assert!(number(&fast[1], "mfu") > 3.0 * number(fused, "mfu"));
    assert_eq!(of(&[]), Value::Array(Vec::new()));
}

#[test]
fn a_dry_run_of_64_ranks_needs_neither_data_nor_vocabulary_nor_tokenizer() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/10b.toml");
    let nowhere = tempfile::tempdir().unwrap();
    let dry_run = |more: &[&str]| {
        let mut command = vilg(&[&["train", "--config", config, "--dry-run", "--json"], more].concat());
        command.current_dir(nowhere.path()).output().unwrap()
    };
    let output = dry_run(&["--world-size", "64"]);
    let talk = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{talk}");
    assert_eq!(talk.lines().filter(|line| line.starts_with("warning: ") && line.ends_with(" is not there")).count(), 5);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["not_there"].as_array().unwrap().len(), 5, "three sources, vocabulary, tokenizer");
    let ranks = &value["ranks"];
    let number = |value: &Value| value.as_u64().unwrap();
    let total = number(&value["summary"]["total"]);
    let (least, most) = (number(&ranks["smallest"]), number(&ranks["largest"]));
    assert!(least <= total / 64 && most >= total / 64 && most - least <= 50, "{least} {most}");
    assert_eq!(number(&ranks["held"]["bytes"]["weights"]), 4 * most);
    assert_eq!(ranks["samples_a_micro_step"][0]["most"], 1);
    assert!(value["plan"]["epochs"].is_null());

    // A dry run of this machine's ranks needs its data.
    assert_eq!(dry_run(&[]).status.code(), Some(2));
    // The same refusal as in `vilg train`.
    let refused = dry_run(&["--world-size", "65"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is less than 65 ranks x 16 micro-batches"));
    assert_eq!(std::fs::read_dir(nowhere.path()).unwrap().count(), 0);
}

#[test]
fn plans_are_readable_for_every_configuration_that_we_ship() {
    for name in ["emoji", "emoji-tokenizer", "300m", "300m-end-to-end", "10b"] {
        let config = format!("configs/{name}.toml");
        for device in ["gpu", "cpu"] {
            let args = ["plan", "--config", &config, "--gpus", "2", "--gpu-memory", "80", "--on", device];
            let output = run(&args);
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("parameters"), "{name} {device}: {text}");
            assert!(json(&args).is_object());
        }
    }
}
