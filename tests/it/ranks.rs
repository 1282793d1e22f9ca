//! Several ranks through the command line: processes under mpirun give the same bits as threads, and no fault of one of
//! them loses more than the steps since the last checkpoint.

use crate::{commands::vilg, tokenizer::write_random};
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};
use tempfile::TempDir;
use vilg::config;

const CONFIG: &str = r#"
name = "tiny"
seed = 7
data.sources = [{ path = "codes" }]
text = { vocab = "vocab.txt", max_tokens = 8 }
image_tokenizer.path = "tokenizer"
model = { layers = 3, hidden = 24, heads = 2, conv_size = 3 }

[train]
steps = 10
batch_size = 7
caption_batch_size = 6
warmup_steps = 2
checkpoint_every = 4
sample_every = 0
rank_timeout = 60
"#;

/// A folder with everything that a generator's training needs.
pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let image_tokenizer = config::ImageTokenizer {
        image_size: 16,
        channels: 32,
        channel_multipliers: vec![1, 1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 4,
        codebook_size: 16,
        code_dim: 4,
        ..Default::default()
    };
    write_random(&at("tokenizer"), image_tokenizer);
    fs::create_dir(at("images")).unwrap();
    for i in 0..11u8 {
        let pixel = |x: u32, y: u32| image::Rgb([x as u8 * 16, y as u8 * 16, i * 23]);
        image::RgbImage::from_fn(16, 16, pixel).save(at(&format!("images/{i}.png"))).unwrap();
        fs::write(at(&format!("images/{i}.txt")), ["一弯月", "红苹果", "小狗的脸"][i as usize % 3]).unwrap();
    }
    fs::write(at("tiny.toml"), CONFIG).unwrap();
    for args in [
        &["data", "encode", "images", "--model", "tokenizer", "-o", "codes"][..],
        &["data", "vocab", "images", "-o", "vocab.txt"],
    ] {
        assert_eq!(told(&vilg(args).current_dir(folder.path()).output().unwrap()).0, Some(0));
    }
    folder
}

/// Exit code and stderr.
pub fn told(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The arguments of a run named `name`.
pub fn train(name: &str, sets: &[&str]) -> Vec<String> {
    let mut args = ["train", "--config", "tiny.toml", "--set"].map(str::to_owned).to_vec();
    args.push(format!("name={name}"));
    args.extend(sets.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]));
    args
}

#[test]
fn a_launcher_without_mpi_is_refused_before_anything_is_written() {
    let folder = folder();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    command.args(train("alone", &[])).current_dir(folder.path());
    let (code, text) = told(&command.env("PMI_RANK", "1").env("PMI_SIZE", "3").output().unwrap());
    assert!(code == Some(2) && text.contains("rank 1 of 3") && text.contains("hint: "), "{text}");
    let (code, text) = told(&command.env_remove("PMI_SIZE").output().unwrap());
    assert!(code == Some(2) && text.contains("PMI_RANK is set, but PMI_SIZE is not"), "{text}");
    command.env("PMI_SIZE", "2").args(["--nproc", "2"]);
    let (code, text) = told(&command.output().unwrap());
    assert!(code == Some(2) && text.contains("leave out --nproc"), "{text}");
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn a_time_limit_stops_with_a_checkpoint() {
    let folder = folder();
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
        command.args(train("limited", &["train.steps=1000000"])).args(more).current_dir(folder.path());
        told(&command.output().unwrap())
    };
    let (code, text) = run(&["--time-limit", "2s", "--nproc", "2"]);
    assert!(code == Some(75) && text.contains("stopped by --time-limit after step"), "{text}");
    let (code, text) = run(&["--time-limit", "1s"]);
    assert!(code == Some(75) && text.contains("resuming after step"), "{text}");
    assert_eq!(run(&["--time-limit", "soon"]).0, Some(2));
}

/// Runs one of `tests/*.sh`; it must print `said` or why it cannot run here.
fn script(name: &str, said: &str) {
    let folder = folder();
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name));
    let output = command.arg(env!("CARGO_BIN_EXE_vilg")).arg(folder.path()).output().unwrap();
    let (code, text) = told(&output);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(code == Some(0) && (out.contains(said) || out.contains("skipped: ")), "{out} {text}");
    println!("{}", out.lines().last().unwrap_or_default());
}

#[test]
#[ignore = "takes minutes and strace: cargo test --test it -- --ignored single_calls"]
fn kills_at_single_calls_cost_no_bit() {
    script("killed_at_calls.sh", "cost no bit");
}

#[test]
fn a_full_disk_ends_the_run_and_loses_nothing() {
    let folder = folder();
    let at = folder.path();
    for (name, background) in [("waiting", "false"), ("beside", "true")] {
        let background = format!("train.background_checkpoints={background}");
        let run = |steps: &str, limit: &str| {
            let steps = format!("train.steps={steps}");
            let args = train(name, &[&steps, &background, "train.zero_stage=3", "train.decay_start=1"]);
            let mut command = Command::new("bash");
            // A limit on the size of files, in KiB: further writes fail, as on a full disk.
            command.args([
                "-c",
                &format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\""),
                "_",
                env!("CARGO_BIN_EXE_vilg"),
            ]);
            told(&command.args(args).args(["--nproc", "2"]).current_dir(at).output().unwrap())
        };
        let (code, text) = run("10", "20");
        assert!(code == Some(1) && text.contains("cannot write the checkpoint"), "at once: {text}");
        assert!(!text.contains("step 1/"), "before the first step: {text}");
        assert_eq!(run("3", "unlimited").0, Some(0));
        let (code, text) = run("10", "20");
        assert!(code == Some(1) && text.contains("cannot write the checkpoint"), "{text}");
        assert!(text.contains("hint: older checkpoints are untouched") && !text.contains("panicked"), "{text}");
        let (code, text) = run("10", "unlimited");
        assert!(code == Some(0) && text.contains("resuming after step 3"), "{text}");
    }
}

#[cfg(feature = "mpi")]
mod processes {
    use super::*;
    use serde_json::Value;
    use std::{
        process::{Child, Stdio},
        thread::sleep,
        time::{Duration, Instant},
    };

    /// The metrics of the steps that do not depend on time, as text, so that every bit is compared.
    fn metrics(folder: &Path, name: &str) -> Vec<String> {
        let text = fs::read_to_string(folder.join("runs").join(name).join("metrics.jsonl")).unwrap();
        let keys = ["step", "image", "text", "gradient_norm", "learning_rate"];
        let line = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            keys.map(|key| line[key].to_string()).join(" ")
        };
        text.lines().map(line).collect()
    }

    /// mpirun with `ranks` processes of vilg.
    fn mpirun(folder: &Path, ranks: usize, args: &[String]) -> Command {
        let mut command = Command::new("mpirun");
        let bind = ["--bind-to", "none", "--oversubscribe", "--mca", "btl_vader_single_copy_mechanism", "none"];
        command.args(bind).args(["-n", &ranks.to_string()]);
        command.arg(env!("CARGO_BIN_EXE_vilg")).args(["--threads", "4"]).args(args).current_dir(folder);
        // Allowed as root, and with more ranks than cores.
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command
    }

    fn run(folder: &Path, ranks: usize, args: &[String]) -> (Option<i32>, String) {
        told(&mpirun(folder, ranks, args).output().unwrap())
    }

    fn bits(folder: &Path, name: &str) -> Vec<u8> {
        fs::read(folder.join("runs").join(name).join("model/model.safetensors")).unwrap()
    }

    #[test]
    fn processes_give_the_bits_of_threads_at_every_stage() {
        let folder = folder();
        let at = folder.path();
        let cases = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3), (4, 2), (4, 3)];
        for (ranks, stage, replica) in cases.map(|(r, s)| (r, s, 0)).into_iter().chain([(4, 1, 2), (4, 3, 2)]) {
            let sets = [format!("train.zero_stage={stage}"), format!("train.hsdp_shard_size={replica}")];
            let sets = sets.each_ref().map(String::as_str);
            let (a, b) = (format!("processes{ranks}{stage}{replica}"), format!("threads{ranks}{stage}{replica}"));
            let (code, text) = run(at, ranks, &train(&a, &sets));
            assert_eq!(code, Some(0), "{text}");
            assert_eq!(text.matches("step 10/10").count(), 1, "only one rank speaks: {text}");
            let mut threads = Command::new(env!("CARGO_BIN_EXE_vilg"));
            threads.args(train(&b, &sets)).args(["--nproc", &ranks.to_string()]).current_dir(at);
            assert_eq!(told(&threads.output().unwrap()).0, Some(0));
            assert_eq!(metrics(at, &a), metrics(at, &b), "{ranks} ranks, stage {stage}, {replica} a replica");
            assert!(bits(at, &a) == bits(at, &b), "{ranks} ranks, stage {stage}, {replica} a replica");
        }
    }

    #[test]
    fn another_configuration_on_one_rank_is_refused_before_the_first_step() {
        let folder = folder();
        let mut command = mpirun(folder.path(), 2, &train("other", &[]));
        command.args([":", "-n", "1", env!("CARGO_BIN_EXE_vilg")]);
        let (code, text) = told(&command.args(train("other", &["train.clip_norm=3"])).output().unwrap());
        assert_eq!(code, Some(1), "{text}");
        assert_eq!(text.matches("error: rank 2 has another configuration than rank 0").count(), 1, "{text}");
        assert!(!folder.path().join("runs").exists());
    }

    /// A run that continues until it is stopped.
    struct Launched(Child);

    impl Launched {
        fn start(folder: &Path, ranks: usize, args: &[String]) -> Self {
            Self(mpirun(folder, ranks, args).stderr(Stdio::piped()).spawn().unwrap())
        }

        /// The processes of the ranks.
        fn ranks(&self) -> Vec<i32> {
            let children = format!("/proc/{0}/task/{0}/children", self.0.id());
            let children = fs::read_to_string(children).unwrap_or_default();
            children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
        }

        /// Waits until the run has done `more` steps.
        fn wait_for_steps(&self, folder: &Path, name: &str, more: usize) {
            let path = folder.join("runs").join(name).join("metrics.jsonl");
            let steps = || fs::read_to_string(&path).map_or(0, |text| text.lines().count());
            let (before, begun) = (steps(), Instant::now());
            while steps() < before + more && begun.elapsed() < Duration::from_secs(60) {
                sleep(Duration::from_millis(2));
            }
        }

        fn signal(&self, rank: usize, signal: i32) {
            // SAFETY: kill has no memory effects; the ranks are mpirun's children, and mpirun is not waited for yet.
            assert_eq!(unsafe { libc::kill(self.ranks()[rank], signal) }, 0);
        }

        fn end(self) -> (Option<i32>, String) {
            told(&self.0.wait_with_output().unwrap())
        }
    }

    #[test]
    fn a_signal_to_one_process_stops_all_after_the_same_step() {
        let folder = folder();
        let at = folder.path();
        let sets = ["train.steps=100000", "train.decay_start=1", "train.zero_stage=2"];
        let launched = Launched::start(at, 3, &train("signal", &sets));
        launched.wait_for_steps(at, "signal", 6);
        launched.signal(2, libc::SIGTERM);
        let (code, text) = launched.end();
        assert_eq!(code, Some(75), "{text}");
        assert_eq!(text.matches("error: stopped by SIGTERM after step").count(), 1, "{text}");
        let again = [train("signal", &sets), vec!["--time-limit".into(), "1s".into()]].concat();
        let (code, text) = run(at, 1, &again);
        assert!(code == Some(75) && text.contains("resuming after step"), "{text}");
    }

    #[test]
    fn a_hanging_process_is_named_with_its_last_call() {
        let folder = folder();
        let sets = ["train.steps=100000", "train.zero_stage=3", "train.rank_timeout=5"];
        let launched = Launched::start(folder.path(), 3, &train("still", &sets));
        launched.wait_for_steps(folder.path(), "still", 4);
        launched.signal(1, libc::SIGSTOP);
        let (code, text) = launched.end();
        assert!(code.is_some_and(|code| code != 0), "{text}");
        assert!(text.contains("for rank 1 (last seen at") && text.contains("waited 5 s at"), "{text}");
    }

    #[test]
    fn two_hosts_give_the_bits_of_one() {
        script("two_hosts.sh", "the bits of one");
    }

    /// Kills a random rank at `kills` random times; the result must be bit-equal to that of an undisturbed run.
    fn survives_kills(kills: usize) {
        let folder = folder();
        let at = folder.path();
        let sets = ["train.steps=400", "train.checkpoint_every=5", "train.zero_stage=3", "train.keep_checkpoints=2"];
        assert_eq!(run(at, 3, &train("whole", &sets)).0, Some(0));
        let mut random = vilg::random::Random::keyed(11, "kills", kills as u64, 0);
        let mut killed = 0;
        while killed < kills {
            let launched = Launched::start(at, 3, &train("killed", &sets));
            // From before the first step to the end of the run.
            sleep(Duration::from_millis(250 + random.below(600)));
            let Some(pid) = launched.ranks().get(random.below(3) as usize).copied() else { continue };
            // SAFETY: as above; it fails if the run has just ended.
            if unsafe { libc::kill(pid, libc::SIGKILL) } == 0 {
                killed += 1;
            }
            let (code, text) = launched.end();
            assert!(!text.contains("panicked") && !text.contains("is not usable"), "{code:?} {text}");
            if code == Some(0) {
                // The run ended before the kill: start over.
                assert!(bits(at, "whole") == bits(at, "killed"));
                fs::remove_dir_all(at.join("runs/killed")).unwrap();
            }
        }
        assert_eq!(run(at, 3, &train("killed", &sets)).0, Some(0));
        assert!(bits(at, "whole") == bits(at, "killed"), "killing changed the result");
        let state = |name: &str| fs::read(at.join("runs").join(name).join("checkpoints/step-400/state.json")).unwrap();
        assert!(state("whole") == state("killed"));
    }

    #[test]
    fn killed_processes_cost_no_bit() {
        survives_kills(4);
    }

    #[test]
    #[ignore = "takes minutes: cargo test --features mpi --test it -- --ignored"]
    fn fifty_killed_processes_cost_no_bit() {
        survives_kills(50);
    }
}
