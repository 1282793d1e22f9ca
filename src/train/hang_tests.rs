//! A rank hangs in a compute thread: the ranks' time limit and SIGTERM end the process all the same.
//!
//! Ending means that the process leaves, so that each run is a test of its own in a process of its own.

use super::{
    tests::{Event, ToyTask, config},
    *,
};
use crate::dist::launch;
use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Instant,
};

/// Set in the processes that shall hang.
const CHILD: &str = "VILG_TEST_HANGS";

/// Trains on two ranks, of which the second hangs in step 3.
fn hang(patience: Duration, stop: &Stop) {
    let (folder, config) = (tempfile::tempdir().unwrap(), config());
    launch(2, patience, |group| {
        let mut task = ToyTask::new(&config);
        task.event = (group.rank() == 1).then_some((3, Event::Hang));
        let folder = RunFolder::open(folder.path(), &config, group.leads())?;
        train(group, &config, &mut task, folder, &Resume::Auto, stop)
    })
    .unwrap();
}

#[test]
#[ignore = "hangs: run by rank_timeout_ends_a_run_whose_rank_hangs"]
fn hangs_until_rank_timeout() {
    if env::var_os(CHILD).is_some() {
        hang(Duration::from_secs(2), &Stop::default());
    }
}

#[test]
#[ignore = "hangs: run by sigterm_ends_a_run_whose_rank_hangs"]
fn hangs_until_sigterm() {
    if env::var_os(CHILD).is_some() {
        let stop = Stop::on_signals(None).unwrap();
        let _watchdog = stop.watch(Duration::from_secs(1)).unwrap();
        hang(Duration::from_secs(600), &stop);
    }
}

/// Runs the test `name`, calls `hanging` with its process's id once it hangs, and returns its exit code and what it said
/// since.
fn ended(name: &str, hanging: impl FnOnce(u32)) -> (Option<i32>, String) {
    let mut child: Child = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("train::hang_tests::{name}"), "--ignored", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("hangs now") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "{name} ended before it hung");
    }
    hanging(child.id());
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{name} still hangs");
        }
        sleep(Duration::from_millis(50));
    }
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    (child.wait().unwrap().code(), rest)
}

#[test]
fn rank_timeout_ends_a_run_whose_rank_hangs() {
    let (code, said) = ended("hangs_until_rank_timeout", |_| {});
    assert!(code == Some(1) && said.contains("waited 2 s at") && said.contains("for rank 1"), "{code:?} {said}");
}

#[test]
fn sigterm_ends_a_run_whose_rank_hangs() {
    let terminate = |id| {
        let sent = Command::new("sh").args(["-c", &format!("kill -TERM {id}")]).status().unwrap();
        assert!(sent.success());
    };
    let (code, said) = ended("hangs_until_sigterm", terminate);
    assert!(
        code == Some(1) && said.contains("error: SIGTERM came") && said.contains("a rank hangs"),
        "{code:?} {said}"
    );
}
