//! `vilg bench` through the command line, at a size at which only the form of the result is meaningful.

use crate::commands::vilg;
use serde_json::Value;
use std::{fs, path::Path};

fn measured(args: &[&str]) -> Value {
    let output = vilg(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn works_report_speed_and_memory() {
    for (work, unit, amount) in [("train", "tokens", 32), ("tokenizer", "images", 2), ("decode", "tokens", 32)] {
        let value = measured(&["bench", work, "--shape", "tiny", "--repeat", "2", "--json"]);
        let number = |key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{work}: no {key} in {value}"));
        assert_eq!((&value["work"], &value["shape"], &value["unit"]), (&work.into(), &"tiny".into(), &unit.into()));
        assert_eq!((&value["amount"], &value["device"]), (&amount.into(), &"cpu".into()), "{work}");
        let seconds = &value["seconds"];
        assert_eq!(seconds["all"].as_array().unwrap().len(), 2);
        let median = seconds["median"].as_f64().unwrap();
        assert!(median > 0.0 && seconds["min"].as_f64() <= Some(median) && seconds["max"].as_f64() >= Some(median));
        assert!((number("per_second") * median / number("amount") - 1.0).abs() < 1e-9);
        let share = number("flops") / median / number("peak_flops_per_second");
        assert!((number("share_of_peak") / share - 1.0).abs() < 1e-9 && share < 1.0, "{work}: {value}");
        assert!(number("parameters") > 1e4 && (!cfg!(target_os = "linux") || number("peak_memory_bytes") > 1e6));
    }
}

#[test]
fn attention_is_compared_with_dense_and_plotted() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("attention.svg");
    let args = ["bench", "attention", "--shape", "tiny", "--sides", "2,4", "--repeat", "1", "--json", "--plot"];
    let value = measured(&[&args[..], &[plot.to_str().unwrap()]].concat());
    let costs = value["costs"].as_array().unwrap();
    let rows: Vec<(u64, &str)> =
        costs.iter().map(|c| (c["codes"].as_u64().unwrap(), c["pattern"].as_str().unwrap())).collect();
    let patterns = ["dense", "row", "column", "conv", "dense n×n"];
    assert_eq!(rows, [4, 16].iter().flat_map(|&codes| patterns.map(|p| (codes, p))).collect::<Vec<_>>());
    assert_eq!(costs[0]["speedup"], 1.0);
    assert!(std::fs::read_to_string(plot).unwrap().contains("<svg"));
    let block = measured(&["bench", "attention", "--block", "--shape", "tiny", "--repeat", "1", "--json"]);
    assert_eq!(block["costs"].as_array().unwrap().len(), 4);
}

/// A folder of one shard with 40 samples of codes.
fn codes(folder: &Path) {
    fs::write(folder.join("codes.json"), r#"{"tokenizer":"0","grid":[2,3],"codebook_size":8}"#).unwrap();
    let mut tar = tar::Builder::new(fs::File::create(folder.join("00000.tar")).unwrap());
    for sample in 0..40_u16 {
        let codes: Vec<u16> = (0..6).map(|code| (code + sample) % 8).collect();
        for (extension, content) in [("npy", vilg::data::npy([2, 3], &codes)), ("txt", "小猫".into())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, format!("{sample}.{extension}"), &content[..]).unwrap();
        }
    }
    tar.finish().unwrap();
}

#[test]
fn reading_data_is_timed_in_both_orders() {
    let folder = tempfile::tempdir().unwrap();
    codes(folder.path());
    let images = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/build/img2dataset");
    for source in [folder.path().to_str().unwrap(), images] {
        let args =
            ["bench", "data", source, "--samples", "6", "--batch", "2", "--repeat", "3", "--workers", "1", "--json"];
        let value = measured(&[&args[..], &["--shuffle-buffer", "2", "--image-size", "16"]].concat());
        assert_eq!((&value["batch"], &value["workers"], &value["shuffle_buffer"]), (&2.into(), &1.into(), &2.into()));
        let orders = value["orders"].as_array().unwrap();
        assert_eq!(
            orders.iter().map(|order| order["order"].as_str().unwrap()).collect::<Vec<_>>(),
            ["random", "sequential"]
        );
        for order in orders {
            let mut all: Vec<f64> =
                order["all"].as_array().unwrap().iter().map(|speed| speed.as_f64().unwrap()).collect();
            all.sort_by(f64::total_cmp);
            assert!(all.len() == 3 && all[0] > 0.0 && all[2].is_finite(), "{value}");
            assert_eq!(order["samples_per_second"].as_f64(), Some(all[1]), "the median");
        }
    }
    let none = vilg(&["bench", "data", "no-such-folder"]).output().unwrap();
    assert_eq!(none.status.code(), Some(2));
}
