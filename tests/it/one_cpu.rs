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
