//! Former names and phrases that the code, its help and its documentation no longer use.

use std::{collections::BTreeSet, fs, path::Path};

/// Names that were replaced by the terms of the field; whole words, with regard to case.
const NAMES: [&str; 53] = [
    "Taped",
    "Picture",
    "Pictures",
    "picture",
    "pictures",
    "open_picture",
    "TapedLayer",
    "taped",
    "Room",
    "room",
    "rooms",
    "mix",
    "Mix",
    "units",
    "coming",
    "going",
    "describe",
    "describing",
    "learns: bool",
    "let learns",
    "fn gather_words",
    "shards.gather",
    "shards.release",
    "shards.reduce",
    "of_factor",
    "Criterion",
    "Judged",
    "judge",
    "judged",
    "Adversary",
    "adversary",
    "Anchors",
    "MovingAverage",
    "struct Nearest",
    "Feed",
    "shard_stage",
    "shard_ranks",
    "recompute =",
    "Measured",
    "identity",
    "Job",
    "Painting",
    "painting",
    "paint",
    "paints",
    "painted",
    "paint_codes",
    "idle",
    "Onto",
    "onto: bool",
    "Native",
    "native segments",
    "native pass",
];

/// Phrases of literal translation and private metaphor.
const PHRASES: [&str; 22] = [
    "whatever",
    "lies",
    "is told",
    "are told",
    "of such",
    "so many",
    "at home",
    "too sure",
    "rightly",
    "half as large again",
    "so-manieth",
    "what moves",
    "cost no time",
    "fell onto",
    "after another split",
    "words told",
    "only touches",
    "of theirs",
    "no part of",
    "is no number",
    "for who reads",
    "workspace for [CLS]",
];

/// Legitimate uses: file, word or phrase, reason.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("src/config/renamed.rs", "shard_stage", "alias of a renamed key"),
    ("src/config/renamed.rs", "shard_ranks", "alias of a renamed key"),
    ("src/config/train.rs", "shard_stage", "alias of a renamed key"),
    ("src/config/train.rs", "shard_ranks", "alias of a renamed key"),
    ("src/demo/config.toml", "recompute =", "written by an earlier version; loading it tests the aliases"),
    (
        "src/demo/image-tokenizer/config.toml",
        "shard_stage",
        "written by an earlier version; loading it tests the aliases",
    ),
    (
        "src/demo/image-tokenizer/config.toml",
        "shard_ranks",
        "written by an earlier version; loading it tests the aliases",
    ),
    (
        "src/demo/image-tokenizer/config.toml",
        "recompute =",
        "written by an earlier version; loading it tests the aliases",
    ),
    ("src/generate/text_to_image.rs", "paint", "key of the random numbers: another key would give other images"),
    ("src/ops/norm/group_norm.rs", "identity", "the mathematical identity"),
    ("src/ops/optim/newton_schulz.rs", "identity", "the mathematical identity"),
    ("src/train/checkpoint.rs", "identity", "alias that reads earlier checkpoints"),
    ("CHANGELOG.md", "pictures", "earlier name of a key"),
    ("CHANGELOG.md", "shard_stage", "earlier name of a key"),
    ("CHANGELOG.md", "shard_ranks", "earlier name of a key"),
    ("docs/faq.md", "shard_stage", "earlier name of a key"),
    ("docs/faq.md", "shard_ranks", "earlier name of a key"),
    ("docs/training.md", "shard_stage", "earlier name of a key"),
    ("docs/training.md", "shard_ranks", "earlier name of a key"),
    ("tests/it/fuzz/targets.rs", "recompute =", "a seed with an earlier name of a key"),
    ("src/bundle/import/chinese_clip/tests.rs", "picture", "name in a golden file"),
    ("src/data/build/tests.rs", "picture", "name in a golden file"),
    ("scripts/golden_build.py", "picture", "name in a golden file"),
    ("scripts/golden_matcher.py", "picture", "name in a golden file"),
    ("src/train/task_tests.rs", "picture", "key of random numbers: bounds were measured with these images"),
    ("src/data/sampler.rs", "mix", "key of the random numbers: another key would give another order"),
    ("src/random.rs", "mix", "mixing of bits"),
    ("src/eval/matcher/reliability.rs", "mix", "method of a library"),
    ("src/run_report/plot.rs", "mix", "method of a library"),
    ("src/cli/doctor.rs", "units", "units of a processor"),
    ("src/cli/mod.rs", "units", "units of a processor"),
    ("src/ops/matmul/bf16/tile.rs", "units", "units of a processor"),
    ("docs/faq.md", "units", "units of a processor"),
    ("CONTRIBUTING.md", "units", "units of measurement"),
    ("src/run_report/page.rs", "units", "units of measurement"),
    ("scripts/golden_taming.py", "identity", "the mathematical identity"),
];

#[test]
fn former_names_and_riddles_are_not_used() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for start in ["src", "tests", "configs", "scripts", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        collect(&root.join(start), &mut files);
    }
    assert!(files.len() > 300, "{} files found", files.len());
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for file in files {
        let name = file.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for word in NAMES.iter().chain(&PHRASES).copied() {
            let Some(line) = text.lines().position(|line| contains(line, word)) else { continue };
            match ALLOWED.iter().position(|(allowed, allowed_word, _)| *allowed == name && *allowed_word == word) {
                Some(entry) => drop(used.insert(entry)),
                None => wrong.push(format!("{name}:{}: `{word}`", line + 1)),
            }
        }
    }
    for (entry, (file, word, _)) in ALLOWED.iter().enumerate().filter(|(entry, _)| !used.contains(entry)) {
        wrong.push(format!("ALLOWED[{entry}] is no longer needed, remove it: {file}, `{word}`"));
    }
    assert!(
        wrong.is_empty(),
        "rename these as CONTRIBUTING.md asks, or allow them with a reason:\n{}",
        wrong.join("\n")
    );
}

/// All files below `path`, without golden files, inputs of other tools and this list.
fn collect(path: &Path, files: &mut Vec<std::path::PathBuf>) {
    if path.is_dir() {
        if path.ends_with("tests/golden") || path.ends_with("tests/cases") {
            return;
        }
        fs::read_dir(path).unwrap().for_each(|entry| collect(&entry.unwrap().path(), files));
    } else if path.exists() && !path.ends_with("tests/it/words.rs") {
        files.push(path.to_owned());
    }
}

/// Whether `line` contains `word` with no letter, digit or underscore directly before or after it.
fn contains(line: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(inside)
            && !line[at + word.len()..].chars().next().is_some_and(inside)
    })
}

#[test]
fn only_whole_words_count() {
    assert!(contains("let idle = 1;", "idle") && contains("idle", "idle"));
    assert!(!contains("idled", "idle") && !contains("is_idle", "idle"));
    assert!(contains("train.recompute = 3", "recompute =") && !contains("recompute the activations", "recompute ="));
}
