//! Help, errors and results of the command line.

use std::process::{Command, Stdio};

pub(crate) fn vilg(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    command.args(args);
    command
}

/// Makes a command that needs no other rank one of two, as under torchrun.
pub(crate) fn as_rank_of_two(mut command: Command, rank: &str) -> Command {
    command.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)]);
    command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")]);
    command
}

/// Snapshots: `tests/cmd/*.trycmd` (renew with `TRYCMD=overwrite`).
#[test]
fn snapshots() {
    trycmd::TestCases::new().env("NO_COLOR", "1").case("tests/cmd/*.trycmd");
}

/// As in `vilg … | head -0`.
#[test]
fn a_closed_pipe_is_quiet() {
    for args in [["config", "show"], ["completions", "bash"], ["config", "--help"]] {
        let mut child = vilg(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}: {:?}", output.status);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = vilg(&["config", "init"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: cannot write to stdout"));
}

#[test]
fn init_prints_valid_configurations() {
    for name in
        ["emoji", "emoji-tokenizer", "emoji-vqgan", "emoji-dvae", "vqgan-f8-8192", "dvae-f8-8192", "300m", "10b"]
    {
        let printed = vilg(&["config", "init", name]).output().unwrap().stdout;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new.toml");
        assert!(vilg(&["config", "init", name, "-o"]).arg(&file).status().unwrap().success());
        assert_eq!(std::fs::read(&file).unwrap(), printed, "{name}");
        assert!(vilg(&["config", "check", "--config"]).arg(&file).status().unwrap().success(), "{name}");
    }
}

#[test]
fn the_version_names_commit_features_and_target() {
    let long = String::from_utf8(vilg(&["--version"]).output().unwrap().stdout).unwrap();
    assert_eq!(long, format!("vilg {}\n", vilg::report::version()));
    let short = String::from_utf8(vilg(&["-V"]).output().unwrap().stdout).unwrap();
    assert_eq!(short, format!("vilg {}\n", vilg::report::version().version));
    let doctor = vilg(&["doctor", "--json"]).output().unwrap().stdout;
    let doctor: serde_json::Value = serde_json::from_slice(&doctor).unwrap();
    assert!(doctor["threads"].is_u64() && doctor["vector_units"].is_array(), "{doctor}");
    assert!(doctor["memory_bytes"].is_u64() || doctor["memory_bytes"].is_null(), "{doctor}");
}

#[test]
fn quiet_prints_no_notes_and_verbose_prints_details() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("moon.png");
    let stderr = |flag: &[&str]| {
        let output = vilg(&["t2i", "ไทย", "-o"]).arg(&file).args(flag).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let (quiet, verbose) = (stderr(&["-q"]), stderr(&["-v"]));
    assert!(quiet.starts_with("warning: ") && quiet.lines().count() == 1, "{quiet}");
    assert!(verbose.contains("vilg 0.") && verbose.contains("model demo loaded"), "{verbose}");
}

#[test]
fn json_results_are_json() {
    for args in [["doctor", "--json"].as_slice(), &["config", "show", "--json"], &["config", "check", "--json"]] {
        let output = vilg(args).output().unwrap();
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(value.is_object(), "{args:?}");
    }
}

/// Holds with and without CUDA, on any machine.
#[test]
fn a_missing_device_gives_an_error_and_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/emoji.toml");
    for args in [["t2i", "红苹果", "--device", "cuda:9999"], ["train", "--config", config, "--device=cuda:9999"]] {
        let output = vilg(&args).current_dir(&folder).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}: {:?}", output.status);
        let lines: Vec<&str> = said.lines().collect();
        assert!(
            matches!(lines[..], [error, hint] if error.starts_with("error: ") && hint.starts_with("hint: ")),
            "{said}"
        );
        assert!(output.stdout.is_empty() && folder.path().read_dir().unwrap().next().is_none(), "{args:?}");
    }
}
