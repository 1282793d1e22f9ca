//! `vilg eval fid` on statistics, and what it refuses before any work.

use crate::commands::vilg;
use candle_core::{Device, Tensor};
use serde_json::Value;
use std::{fs, path::Path};
use vilg::eval::fid::{Moments, Protocol, write_statistics};

/// Runs `vilg eval fid` in `folder`: exit code, stdout and stderr.
fn run(folder: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output = vilg(&["eval", "fid"]).args(args).current_dir(folder).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Statistics of two features of each dimension, at a distance of 2 around `mean`.
fn statistics(path: &Path, mean: f64, dim: usize, protocol: Protocol) {
    let rows: Vec<f64> = [mean - 1.0, mean + 1.0].into_iter().flat_map(|value| vec![value; dim]).collect();
    let features = Tensor::from_vec(rows, (2, dim), &Device::Cpu).unwrap();
    write_statistics(path, &Moments::of(&features).unwrap().gaussian().unwrap(), protocol).unwrap();
}

#[test]
fn statistics_are_compared_without_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    statistics(&at.join("a.npz"), 0.0, 3, Protocol::PytorchFid);
    statistics(&at.join("b.npz"), 2.0, 3, Protocol::PytorchFid);
    statistics(&at.join("clean.npz"), 2.0, 3, Protocol::Clean);
    statistics(&at.join("short.npz"), 2.0, 2, Protocol::PytorchFid);
    // Equal covariances of rank 1, means at a distance of 2 in each dimension.
    let (code, stdout, stderr) = run(at, &["a.npz", "b.npz", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert!((found["fid"].as_f64().unwrap() - 12.0).abs() < 1e-6, "{found}");
    assert_eq!((&found["protocol"], &found["images"][0]), (&"pytorch-fid".into(), &Value::Null));
    let (_, stdout, _) = run(at, &["a.npz", "a.npz"]);
    assert!(stdout.starts_with("protocol pytorch-fid: ") && stdout.contains("FID  0.0000"), "{stdout}");
    fs::create_dir(at.join("images")).unwrap();
    fs::write(at.join("text.npz"), "text").unwrap();
    for (args, code, what) in [
        (&["a.npz", "clean.npz"][..], 1, "the protocol clean, not pytorch-fid"),
        (&["a.npz", "short.npz"][..], 1, "features of 3 and of 2 values"),
        (&["a.npz", "none.npz"][..], 1, "none.npz"),
        (&["a.npz", "text.npz"][..], 1, "text.npz is not a .npz file"),
        (&["images", "b.npz"][..], 2, "--inception is missing"),
        (&["images", "b.npz", "--inception", "images"][..], 1, "no Inception network in images"),
        (&["a.npz", "images", "--metrics", "kid"][..], 2, "a.npz has no features of single images"),
        (&["images", "b.npz", "--metrics", "fid,prc"][..], 2, "b.npz has no features of single images"),
        (&["a.npz", "b.npz", "--metrics", "fvd"][..], 2, "invalid value"),
        (&["images", "b.npz", "--metrics", "is", "--protocol", "dm-gan"][..], 2, "TensorFlow's weights"),
        (&["images", "b.npz", "--save-stats"][..], 2, "b.npz exists"),
        (&["a.npz", "c.npz", "--save-stats"][..], 2, "--save-stats needs images"),
        (&["images", "c.txt", "--save-stats"][..], 2, "--save-stats needs images"),
        (&["a.npz"][..], 2, "required"),
    ] {
        let (found, _, stderr) = run(at, args);
        assert!(found == Some(code) && stderr.contains(what) && stderr.contains("hint: "), "{args:?}: {stderr}");
    }
}
