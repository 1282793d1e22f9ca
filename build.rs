//! Gives the crate the commit, features and target it is built from, for `vilg --version` and the metadata of run and
//! model folders: the compile-time variables `VILG_COMMIT`, `VILG_FEATURES` and `VILG_TARGET`.
//!
//! Reads `.git` with the standard library alone, so that a build needs no git. `VILG_COMMIT` in the environment wins:
//! packagers who build from an archive set it.
//!
//! With the feature `cuda`, nvcc also compiles the kernels of `src/ops/cuda`. Without it, no compiler is called.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=VILG_COMMIT");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let given = env::var("VILG_COMMIT").ok().filter(|commit| !commit.is_empty());
    if let Some(commit) = given.or_else(|| head_commit(&root)) {
        println!("cargo::rustc-env=VILG_COMMIT={}", commit.trim());
    }
    println!("cargo::rustc-env=VILG_FEATURES={}", features().join(" "));
    println!("cargo::rustc-env=VILG_TARGET={}", env::var("TARGET").unwrap_or_default());
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels(&root);
    }
}

/// The sources of the kernels: the first one includes the others.
const KERNELS: [&str; 8] = [
    "src/ops/cuda/kernels.cu",
    "src/ops/cuda/device.cuh",
    "src/ops/attention/softmax.cu",
    "src/ops/embedding/embedding.cu",
    "src/ops/norm/layer_norm.cu",
    "src/ops/optim/adamw.cu",
    "src/ops/pointwise/cross_entropy.cu",
    "src/ops/pointwise/gelu.cu",
];

/// Writes `kernels.ptx`, for all GPUs of compute capability 8.0 or more: a driver compiles it for its own.
fn compile_kernels(root: &Path) {
    KERNELS.iter().for_each(|file| println!("cargo::rerun-if-changed={file}"));
    let ptx = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("kernels.ptx");
    let flags = ["--ptx", "-std=c++17", "-O3", "-arch=compute_80", "-o"];
    for nvcc in compilers() {
        match Command::new(&nvcc).args(flags).arg(&ptx).arg(root.join(KERNELS[0])).status() {
            Ok(status) if status.success() => return,
            Ok(status) => panic!("{} cannot compile the CUDA kernels: {status}", nvcc.display()),
            Err(_) => {} // there is none
        }
    }
    panic!("the feature `cuda` needs nvcc, NVIDIA's compiler (docs/gpu.md)");
}

/// Where nvcc may be, in the order in which candle's build looks for it.
fn compilers() -> Vec<PathBuf> {
    let variable = |name: &str| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    };
    let in_folder = |folder: PathBuf| folder.join("bin/nvcc");
    let named = [variable("NVCC"), Some("nvcc".into()), variable("CUDA_HOME").map(in_folder)];
    let usual = [variable("CUDA_PATH"), Some("/usr/local/cuda".into()), Some("/opt/cuda".into())];
    named.into_iter().chain(usual.map(|folder| folder.map(in_folder))).flatten().collect()
}

/// The features that this build has switched on, by name.
fn features() -> Vec<String> {
    let name = |(key, _): (String, String)| key.strip_prefix("CARGO_FEATURE_").map(str::to_lowercase);
    let mut names: Vec<String> = env::vars().filter_map(name).filter(|name| name != "default").collect();
    names.sort();
    names
}

/// The commit that is checked out in `root`; `None` where there is no repository, or nothing is committed.
fn head_commit(root: &Path) -> Option<String> {
    let (folder, shared) = git_folders(root)?;
    let head = fs::read_to_string(watch(folder.join("HEAD"))).ok()?;
    let Some(branch) = head.trim().strip_prefix("ref: ") else { return full_hash(head.trim()) };
    let file = shared.join(branch);
    if let Ok(hash) = fs::read_to_string(&file) {
        watch(file);
        return full_hash(hash.trim());
    }
    // The branch is packed: the next commit creates its file, which shows in the nearest folder that exists. Cargo
    // would run this script at every build if it watched a file that does not exist.
    if let Some(folder) = file.ancestors().skip(1).find(|folder| folder.is_dir()) {
        watch(folder.to_owned());
    }
    let packed = fs::read_to_string(watch(shared.join("packed-refs"))).ok()?;
    let hash = |line: &str| line.split_once(' ').filter(|(_, name)| *name == branch).map(|(hash, _)| hash.to_owned());
    full_hash(&packed.lines().find_map(hash)?)
}

/// The repository's folder and the folder that worktrees share; they differ in a worktree, where `.git` is a file
/// `gitdir: FOLDER`.
fn git_folders(root: &Path) -> Option<(PathBuf, PathBuf)> {
    let dot_git = root.join(".git");
    let folder = match fs::read_to_string(&dot_git) {
        Ok(link) => root.join(link.trim().strip_prefix("gitdir: ")?),
        Err(_) if dot_git.is_dir() => dot_git,
        Err(_) => return None,
    };
    let shared = match fs::read_to_string(folder.join("commondir")) {
        Ok(path) => folder.join(path.trim()),
        Err(_) => folder.clone(),
    };
    Some((folder, shared))
}

/// Runs this script again when `path` changes.
fn watch(path: PathBuf) -> PathBuf {
    if path.exists() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    path
}

/// `text` where it is the hash of a commit, SHA-1 or SHA-256.
fn full_hash(text: &str) -> Option<String> {
    (text.len() >= 40 && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_owned())
}
