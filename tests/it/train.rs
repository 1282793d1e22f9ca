//! `vilg train` through the command line: killed, stopped and resumed on two threads, it gives the bits of an
//! undisturbed run on one thread.

use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const CONFIG: &str = r#"
name = "tiny"
task = "image-tokenizer"
seed = 7
data.sources = [{ path = "images" }]

[image_tokenizer]
image_size = 8
channels = 32
channel_multipliers = [1, 1]
residual_blocks = 1
attention_sides = []
latent_channels = 8
codebook_size = 16
code_dim = 4
restart_after = 3

[train]
steps = 90
batch_size = 2
warmup_steps = 4
checkpoint_every = 5
sample_every = 0
"#;

pub fn prepare(folder: &Path) {
    fs::create_dir_all(folder.join("images")).unwrap();
    fs::write(folder.join("tiny.toml"), CONFIG).unwrap();
    for i in 0..7u8 {
        let pixel = |x: u32, y: u32| image::Rgb([(x as u8) * 30, (y as u8) * 30, i * 36]);
        image::RgbImage::from_fn(8, 8, pixel).save(folder.join(format!("images/{i}.png"))).unwrap();
    }
}

fn train(folder: &Path, threads: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    command.args(["--threads", threads, "train", "--config", "tiny.toml"]).current_dir(folder);
    command.stderr(Stdio::null()).spawn().unwrap()
}

fn steps(folder: &Path) -> usize {
    fs::read_to_string(folder.join("runs/tiny/metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Sends these signals in quick succession after a few more steps; returns the exit code.
fn interrupt(folder: &Path, signals: &[i32]) -> Option<i32> {
    let mut child = train(folder, "2");
    let (before, begun) = (steps(folder), Instant::now());
    // A resumed run first repeats the steps after its checkpoint.
    while steps(folder) < before.max(5) + 4 && begun.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(2));
    }
    for signal in signals {
        // SAFETY: kill has no memory effects; the child process has not been waited for yet.
        assert_eq!(unsafe { libc::kill(child.id() as i32, *signal) }, 0);
        sleep(Duration::from_millis(1));
    }
    child.wait().unwrap().code()
}

#[test]
fn survives_signals_bit_by_bit() {
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&whole, &cut] {
        prepare(folder.path());
    }
    // On one thread, so that no step waits for another thread.
    assert_eq!(train(whole.path(), "1").wait().unwrap().code(), Some(0));
    let ends: [(&[i32], Option<i32>); 6] = [
        (&[SIGTERM], Some(75)),
        (&[SIGKILL], None),
        (&[SIGINT], Some(130)),
        // The second signal arrives while the checkpoint of the first one is written.
        (&[SIGTERM, SIGUSR1], Some(75)),
        (&[SIGINT, SIGINT], Some(130)),
        (&[SIGUSR1], Some(75)),
    ];
    for (signals, code) in ends {
        assert_eq!(interrupt(cut.path(), signals), code, "signals {signals:?}");
    }
    assert!(steps(cut.path()) < 90, "the run ended before the signals did");
    assert_eq!(train(cut.path(), "2").wait().unwrap().code(), Some(0));
    assert_eq!(steps(cut.path()), 90);
    for file in ["checkpoints/step-90/state.safetensors", "checkpoints/step-90/state.json", "model/model.safetensors"] {
        let read = |folder: &Path| fs::read(folder.join("runs/tiny").join(file)).unwrap();
        assert!(read(whole.path()) == read(cut.path()), "{file} differs");
    }
}

/// `train.log_every` of 3 gives a line to the first step, to every third one and to the last one.
#[test]
fn every_nth_step_has_a_line_with_its_times_and_a_terminal_shows_a_bar_between() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let program = format!("'{}' train --config tiny.toml --set train.steps=7", env!("CARGO_BIN_EXE_vilg"));
    let shell = |line: &str| Command::new("sh").args(["-c", line]).current_dir(folder.path()).output().unwrap();
    let output = shell(&format!("{program} --set train.log_every=3"));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("step ")).collect();
    let steps: Vec<&str> = lines.iter().map(|line| line.split('/').next().unwrap()).collect();
    assert_eq!(steps, ["1", "3", "6", "7"], "{text}");
    for part in ["grad_norm ", "memory ", "images/s", "elapsed 0:00:", "eta 0:00:"] {
        assert!(lines.iter().all(|line| line.contains(part)), "{part}: {text}");
    }
    assert!(lines[3].ends_with("eta 0:00:00") && !text.contains('\r'), "{text}");

    let inner = format!("{program} --set train.log_every=3 --set name=shown").replace('\'', "\"");
    let output =
        shell(&format!("command -v script > /dev/null || exit 99; TERM=xterm script -qec '{inner}' /dev/null"));
    if output.status.code() == Some(99) {
        println!("skipped: no script");
        return;
    }
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("step 3/7") && shown.contains("step 7/7"), "{shown}");
    assert!(shown.contains("loss ") && shown.contains(['█', '░']), "{shown}");
}

/// Sends these signals, a few steps apart, to a run without end; returns its output. `prefix` is shell code.
fn hung_up(prefix: &str, signals: &[i32]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let mut command = Command::new("sh");
    let args = "train --config tiny.toml --set train.steps=1000000 --set train.decay_start=1";
    command.args(["-c", &format!("{prefix} exec '{}' {args}", env!("CARGO_BIN_EXE_vilg"))]);
    let mut child = command.current_dir(folder.path()).stderr(Stdio::piped()).spawn().unwrap();
    // Its output must be read, or it blocks on a full pipe.
    let said = child.stderr.take().unwrap();
    let said = std::thread::spawn(move || std::io::read_to_string(said).unwrap());
    for signal in signals {
        let (before, begun) = (steps(folder.path()), Instant::now());
        while steps(folder.path()) < before + 4 && begun.elapsed() < Duration::from_secs(60) {
            sleep(Duration::from_millis(2));
        }
        // SAFETY: kill has no memory effects; the child process has not been waited for yet.
        assert_eq!(unsafe { libc::kill(child.id() as i32, *signal) }, 0);
    }
    let code = child.wait().unwrap().code();
    (code, said.join().unwrap())
}

#[test]
fn a_hangup_saves_unless_it_is_ignored() {
    let (code, text) = hung_up("", &[SIGHUP]);
    assert!(code == Some(75) && text.contains("stopped by SIGHUP after step"), "{code:?} {text}");
    // As nohup does.
    let (code, text) = hung_up("trap '' HUP;", &[SIGHUP, SIGTERM]);
    assert!(code == Some(75) && text.contains("stopped by SIGTERM after step"), "{code:?} {text}");
}
