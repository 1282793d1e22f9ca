//! Ranks as processes that connect over TCP, with the environment variables of torchrun.

use crate::ranks::{folder, told, train};
use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn rank(folder: &Path, rank: usize, world_size: usize, port: u16, args: &[String]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    let numbers = [("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank), ("MASTER_PORT", port.into())];
    command.envs(numbers.map(|(name, number)| (name, number.to_string()))).env("MASTER_ADDR", "localhost");
    command.args(args).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Exit code and stderr of each rank.
pub(crate) fn run(folder: &Path, world_size: usize, args: &[String]) -> Vec<(Option<i32>, String)> {
    let port = free_port();
    let ranks: Vec<Child> = (0..world_size).map(|i| rank(folder, i, world_size, port, args)).collect();
    ranks.into_iter().map(|rank| told(&rank.wait_with_output().unwrap())).collect()
}

fn model(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join("runs").join(name).join("model/model.safetensors")).unwrap()
}

#[test]
fn processes_give_the_bits_of_threads_and_resume_after_a_kill() {
    let folder = folder();
    let at = folder.path();
    let sets = ["train.zero_stage=3", "train.checkpoint_every=2"];
    let mut threads = Command::new(env!("CARGO_BIN_EXE_vilg"));
    threads.args(train("threads", &sets)).args(["--nproc", "3"]).current_dir(at);
    assert_eq!(told(&threads.output().unwrap()).0, Some(0));
    let ended = run(at, 3, &train("processes", &sets));
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
    assert!(ended[0].1.contains("step 10/10") && ended[1].1.is_empty() && ended[2].1.is_empty(), "{ended:?}");
    assert!(model(at, "threads") == model(at, "processes"));

    let args = train("killed", &[&sets[..], &["train.steps=100000", "train.decay_start=1"]].concat());
    let port = free_port();
    let mut ranks: Vec<Child> = (0..3).map(|i| rank(at, i, 3, port, &args)).collect();
    let metrics = at.join("runs/killed/metrics.jsonl");
    while fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() > 3).eq(&false) {
        thread::sleep(Duration::from_millis(5));
    }
    ranks[1].kill().unwrap();
    let ended: Vec<_> = ranks.into_iter().map(|rank| told(&rank.wait_with_output().unwrap())).collect();
    let seen = |i: usize| ended[i].0 == Some(1) && ended[i].1.contains("lost its connections");
    assert!(ended[1].0.is_none() && seen(0) && seen(2), "{ended:?}");
    assert!(ended[0].1.contains("have ended: 1") || ended[2].1.contains("have ended: 1"), "{ended:?}");
    let args = train("killed", &[&sets[..], &["train.steps=100001", "train.decay_start=1"]].concat());
    let again: Vec<Child> = (0..3).map(|i| rank(at, i, 3, port, &args)).collect();
    thread::sleep(Duration::from_millis(1500));
    for rank in &again {
        // SAFETY: kill has no memory effects.
        unsafe { libc::kill(rank.id() as i32, libc::SIGTERM) };
    }
    let ended: Vec<_> = again.into_iter().map(|rank| told(&rank.wait_with_output().unwrap())).collect();
    assert!(ended.iter().all(|(code, _)| *code == Some(75)), "{ended:?}");
    assert!(ended[0].1.contains("resuming after step"), "{ended:?}");
}

#[test]
fn an_error_of_one_rank_is_printed_once_and_ends_all() {
    let folder = folder();
    let (one, other) = (train("other", &[]), train("other", &["train.clip_norm=3"]));
    let port = free_port();
    let ranks = [(0, &one), (1, &one), (2, &other)].map(|(i, args)| rank(folder.path(), i, 3, port, args));
    let ended = ranks.map(|rank| told(&rank.wait_with_output().unwrap()));
    assert!(ended.iter().all(|(code, _)| *code == Some(1)), "{ended:?}");
    let said: String = ended.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(said.matches("error: rank 2 has another configuration than rank 0").count(), 1, "{said}");
}

#[test]
fn missing_ranks_are_named_and_other_connections_refused() {
    let folder = folder();
    let args = train("meet", &["train.rank_timeout=2"]);
    let port = free_port();
    let ranks = [0, 2].map(|i| rank(folder.path(), i, 3, port, &args));
    // A connection of another program, and one that sends nothing.
    thread::sleep(Duration::from_millis(300));
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap().write_all(&[b'G'; 64]).unwrap();
    let ended = ranks.map(|rank| told(&rank.wait_with_output().unwrap()));
    assert!(ended[0].0 == Some(1) && ended[0].1.contains("waited in vain for ranks 1"), "{ended:?}");
    assert_eq!(ended[1].0, Some(1), "{ended:?}");

    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, text) = told(&rank(folder.path(), 0, 2, port, &args).wait_with_output().unwrap());
    assert!(code == Some(1) && text.contains(&format!("cannot listen on port {port}")), "{text}");
    assert!(text.contains("hint: another run may be using this port"), "{text}");
}
