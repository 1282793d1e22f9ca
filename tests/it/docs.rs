//! The documentation: its links lead somewhere, the keys, files and options that it names exist, and the blocks marked
//! `sh run` run.

use crate::{
    commands::vilg,
    markdown::{Page, words},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All pages by their path below the root.
fn pages() -> Vec<(PathBuf, Page)> {
    let mut paths: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from).into();
    for folder in ["docs", "src/demo"] {
        let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().file_name());
        paths.extend(
            entries.map(|name| Path::new(folder).join(name)).filter(|p| p.extension().is_some_and(|e| e == "md")),
        );
    }
    paths.sort();
    assert!(paths.len() > 12, "{paths:?}");
    paths.into_iter().map(|path| (path.clone(), page(&path))).collect()
}

fn page(path: &Path) -> Page {
    Page::parse(&fs::read_to_string(root().join(path)).unwrap())
}

/// The links of a page that lead nowhere.
fn broken_links(path: &Path, page: &Page) -> Vec<String> {
    let folder = root().join(path.parent().unwrap());
    let is_broken = |link: &String| {
        if link.starts_with("https://") {
            return false;
        }
        let (file, anchor) = link.split_once('#').map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
        let target = if file.is_empty() { root().join(path) } else { folder.join(file) };
        let has = |anchor: &str| {
            fs::read_to_string(&target).is_ok_and(|text| Page::parse(&text).anchors().iter().any(|a| a == anchor))
        };
        !target.exists() || anchor.is_some_and(|anchor| !has(anchor))
    };
    let broken = page.links().into_iter().filter(is_broken);
    broken.map(|link| format!("{}: {link}", path.display())).collect()
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    let broken: Vec<String> = pages.iter().flat_map(|(path, page)| broken_links(path, page)).collect();
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(pages.iter().map(|(_, page)| page.links().len()).sum::<usize>() > 60);
    let bad = Page::parse("[a](docs/none.md) [b](docs/training.md#none) [c](#results) [d](#there)\n");
    let found = broken_links(Path::new("README.md"), &bad);
    assert_eq!(found, ["README.md: docs/none.md", "README.md: docs/training.md#none", "README.md: #there"]);
}

#[test]
fn the_readme_is_short_and_names_every_page() {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    assert!(text.lines().count() <= 150, "{} lines", text.lines().count());
    let links = page(Path::new("README.md")).links();
    for (path, _) in pages().iter().filter(|(path, _)| path.starts_with("docs")) {
        assert!(links.iter().any(|link| Path::new(link) == path), "README.md does not name {}", path.display());
    }
}

/// The keys of a configuration that `text` names: `train.steps` in `train.steps=100`.
fn keys(text: &str, sections: &BTreeSet<String>) -> Vec<String> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !part(c) && c != '.');
    words
        .filter_map(|word| {
            let (section, key) = word.trim_matches('.').split_once('.')?;
            // A file, as model.safetensors, or a path of three parts.
            let is_key = !["safetensors", "md", "png", "rs", "sbatch", "toml"].contains(&key) && !key.contains('.');
            (sections.contains(section) && is_key).then(|| format!("{section}.{key}"))
        })
        .collect()
}

#[test]
fn keys_of_configurations_exist() {
    let known: BTreeSet<String> =
        vilg::config::values(&vilg::config::Config::default()).unwrap().into_iter().map(|(key, _)| key).collect();
    let sections: BTreeSet<String> = known.iter().filter_map(|key| Some(key.split_once('.')?.0.to_owned())).collect();
    // By its name or an earlier one.
    let exists = |key: &str| {
        let (section, name) = key.split_once('.').unwrap();
        let mut stored = serde_json::json!({ section: { name: 0 } });
        vilg::config::rename_stored_keys(&mut stored);
        known.contains(key) || stored[section].get(name).is_none()
    };
    let mut named = BTreeMap::new();
    for (path, page) in pages() {
        let blocks = page.blocks.iter().filter(|block| block.info.starts_with("sh"));
        let set = blocks.flat_map(|block| &block.lines).flat_map(|line| set_values(&words(line)));
        for text in page.code_spans().into_iter().chain(set) {
            named.extend(keys(&text, &sections).into_iter().map(|key| (key, path.clone())));
        }
    }
    let unknown: Vec<_> = named.iter().filter(|(key, _)| !exists(key)).collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(named.len() > 50, "{} keys", named.len());
    assert!(exists("train.recompute") && !exists("train.recomputing"));
}

/// The values of `--set`.
fn set_values(words: &[String]) -> Vec<String> {
    words
        .windows(2)
        .filter(|pair| pair[0] == "--set")
        .map(|pair| pair[1].split('=').next().unwrap().to_owned())
        .collect()
}

#[test]
fn files_that_are_named_exist() {
    let mut missing = Vec::new();
    for (path, _) in pages() {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let words = text.split(|c: char| c.is_whitespace() || "`()[]\"'|,;".contains(c));
        let files = words.map(|word| word.trim_start_matches("./").trim_end_matches(['.', ':'])).filter(|word| {
            let top = ["configs/", "scripts/", "tests/", "src/", "benches/"].iter().any(|top| word.starts_with(top));
            let plain = !word.contains(['*', '{', '$', '<', '#']);
            top && plain && Path::new(word).extension().is_some()
        });
        missing
            .extend(files.filter(|file| !root().join(file).exists()).map(|file| format!("{}: {file}", path.display())));
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Function names of tests that a text names, as `a_step_holds_what_the_formulas_say`.
fn tests_named(page: &Page) -> Vec<String> {
    let is_test = |span: &String| {
        span.matches('_').count() > 2 && span.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    page.code_spans().into_iter().filter(is_test).collect()
}

#[test]
fn tests_that_are_named_exist() {
    fn code(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => code(&path, all),
                false if path.extension().is_some_and(|end| end == "rs") => *all += &fs::read_to_string(path).unwrap(),
                false => {}
            }
        }
    }
    let mut all = String::new();
    ["src", "tests/it"].iter().for_each(|folder| code(&root().join(folder), &mut all));
    let mut named = 0;
    for path in ["docs/distributed.md", "CONTRIBUTING.md"] {
        for name in tests_named(&page(Path::new(path))) {
            assert!(all.contains(&format!("fn {name}(")), "{path} names the test `{name}`, which does not exist");
            named += 1;
        }
    }
    assert!(named > 15, "{named} tests");
}

/// The help of a command, by the words of its name; none if there is no such command.
fn help(command: &[String]) -> Option<String> {
    let mut asked = vilg(&["help"]);
    let output = asked.args(command).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// What is wrong with a command line that begins with `vilg`.
fn wrong_command(words: &[String], helps: &mut BTreeMap<Vec<String>, Option<String>>) -> Option<String> {
    let mut help_of = |name: &[String]| helps.entry(name.to_vec()).or_insert_with(|| help(name)).clone();
    let first = words.get(1).filter(|word| !word.starts_with('-'))?;
    if first == "help" || first == "COMMAND" {
        return None;
    }
    let mut name = vec![first.clone()];
    let Some(mut text) = help_of(&name) else { return Some(format!("no command `{first}`")) };
    while text.contains("\nCommands:\n") {
        name.push(words.get(1 + name.len())?.clone());
        match help_of(&name) {
            Some(below) => text = below,
            None => return Some(format!("no command `{}`", name.join(" "))),
        }
    }
    let options =
        words.iter().skip(1 + name.len()).take_while(|word| *word != "--").filter(|word| {
            word.starts_with('-') && word.len() > 1 && !word[1..].starts_with(|c: char| c.is_ascii_digit())
        });
    for option in options {
        let option = option.split('=').next().unwrap();
        let names: BTreeSet<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect();
        if !names.contains(option) {
            return Some(format!("`vilg {}` has no option `{option}`", name.join(" ")));
        }
    }
    None
}

#[test]
fn commands_and_options_exist() {
    let (mut wrong, mut helps, mut seen) = (Vec::new(), BTreeMap::new(), 0);
    for (path, page) in pages() {
        let blocks = page.blocks.iter().filter(|block| block.info.starts_with("sh"));
        let lines = blocks.flat_map(|block| &block.lines).map(|line| words(line));
        let spans = page.code_spans().into_iter().map(|span| words(&span));
        for line in lines.chain(spans).filter(|line| line.first().is_some_and(|word| word == "vilg")) {
            seen += 1;
            wrong.extend(wrong_command(&line, &mut helps).map(|what| format!("{}: {what}", path.display())));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 80, "{seen} commands");
    for (line, what) in [
        ("vilg draw x", "no command `draw`"),
        ("vilg data draw", "no command `data draw`"),
        ("vilg t2i x --colour", "`vilg t2i` has no option `--colour`"),
        ("vilg data vocab x -z 1", "`vilg data vocab` has no option `-z`"),
    ] {
        assert_eq!(wrong_command(&words(line), &mut helps).as_deref(), Some(what));
    }
}

/// Blocks that begin with `sh run`, one folder for each page.
#[test]
fn marked_blocks_run() {
    let mut ran = 0;
    for (path, page) in pages() {
        let blocks: Vec<_> = page.blocks.iter().filter(|block| block.info == "sh run").collect();
        if blocks.is_empty() {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["configs", "src", "tests"] {
            std::os::unix::fs::symlink(root().join(name), folder.path().join(name)).unwrap();
        }
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vilg"), bin.join("vilg")).unwrap();
        let search = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        for block in blocks {
            let script = format!("set -e\n{}\n", block.lines.join("\n"));
            let output =
                Command::new("sh").args(["-c", &script]).current_dir(&folder).env("PATH", &search).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {:?}\n{script}\n{said}", path.display(), output.status);
            ran += 1;
        }
    }
    assert!(ran >= 6, "{ran} blocks");
}
