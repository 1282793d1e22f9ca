//! Training on file systems without locks or syncs of folders, which a preloaded library simulates.

use crate::{ranks::told, train::prepare};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Compiles `tests/cases/NAME.c` to a library; `None` if there is no C compiler.
fn shim(name: &str, folder: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name).with_extension("c");
    let library = folder.join(name).with_extension("so");
    let mut compiler = Command::new("cc");
    let built = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    if built.is_err() {
        println!("skipped: no C compiler");
        return None;
    }
    assert!(built.unwrap().success());
    Some(library)
}

#[test]
fn without_locks_or_syncs_of_folders_a_run_warns_once_and_trains() {
    for (name, warning) in
        [("no_flock", "has no locks (Function not implemented"), ("no_folder_fsync", "cannot sync folders (Invalid")]
    {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let Some(library) = shim(name, folder.path()) else { return };
        let run = |steps: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
            command.args(["train", "--config", "tiny.toml", "--set", steps]).current_dir(folder.path());
            told(&command.env("LD_PRELOAD", &library).output().unwrap())
        };
        for steps in ["train.steps=11", "train.steps=16"] {
            let (code, text) = run(steps);
            assert_eq!(code, Some(0), "{name}: {text}");
            assert_eq!(text.matches(warning).count(), 1, "{name}: {text}");
        }
        assert!(fs::exists(folder.path().join("runs/tiny/checkpoints/step-16/manifest.json")).unwrap());
    }
}
