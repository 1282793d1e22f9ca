//! Several ranks on one CPU: nothing may wait for a pool whose only thread is waiting.

use crate::ranks::{folder, told, train};
use std::{
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// The output of a command; a command that does not end is an error.
fn output(mut command: Command, what: &str) -> Output {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(180) {
            child.kill().unwrap();
            panic!("{what} hangs: {}", told(&child.wait_with_output().unwrap()).1);
        }
        sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn trains(folder: &Path, mut command: Command, ranks: usize, sets: &[&str]) {
    let what = format!("{ranks} ranks, {sets:?}");
    let name = what.replace(|c: char| !c.is_alphanumeric(), "-");
    command.args(train(&name, sets)).args(["--nproc", &ranks.to_string()]).current_dir(folder);
    let (code, text) = told(&output(command, &what));
    assert!(code == Some(0) && text.contains("step 10/10"), "{what}: {text}");
}

#[test]
fn replicas_train_on_one_compute_thread() {
    let folder = folder();
    let cases: [(usize, &[&str]); 4] = [
        (2, &["train.zero_stage=0"]),
        (2, &["train.zero_stage=2"]),
        (2, &["train.zero_stage=1", "train.hsdp_shard_size=1"]),
        (4, &["train.zero_stage=3", "train.hsdp_shard_size=2"]),
    ];
    for (ranks, sets) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
        command.args(["--threads", "1"]);
        trains(folder.path(), command, ranks, sets);
    }
}

#[test]
fn replicas_train_on_one_cpu() {
    let bound = Command::new("taskset").args(["-c", "0", "true"]).status();
    if !bound.is_ok_and(|status| status.success()) {
        println!("skipped: taskset cannot bind a process to CPU 0");
        return;
    }
    let mut command = Command::new("taskset");
    command.args(["-c", "0", env!("CARGO_BIN_EXE_vilg")]);
    trains(folder().path(), command, 2, &["train.zero_stage=0"]);
}

/// Its reader threads also resize images.
#[test]
fn a_matcher_trains_on_one_compute_thread() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    for i in 0..6u8 {
        let image = image::RgbImage::from_fn(9, 7, |x, y| image::Rgb([40 * i, 20 * x as u8, 30 * y as u8]));
        image.save(images.join(format!("{i}.png"))).unwrap();
        std::fs::write(
            images.join(format!("{i}.txt")),
            "红苹果".chars().cycle().take(1 + i as usize).collect::<String>(),
        )
        .unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    command.args(["--threads", "1", "train", "--set", "task=\"matcher\"", "--set", "text.vocab=\"demo\""]);
    for set in [
        "data.sources=[{path=\"images\"}]",
        "matcher.image_size=8",
        "matcher.patch_size=4",
        "matcher.image_layers=1",
        "matcher.image_hidden=8",
        "matcher.image_heads=1",
        "matcher.text_layers=1",
        "matcher.text_hidden=8",
        "matcher.text_heads=1",
        "matcher.embedding=4",
        "train.batch_size=4",
        "train.steps=3",
    ] {
        command.args(["--set", set]);
    }
    command.current_dir(folder.path());
    let (code, text) = told(&output(command, "a matcher"));
    assert!(code == Some(0) && text.contains("step 3/3"), "{text}");
}
