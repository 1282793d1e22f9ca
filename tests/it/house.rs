//! Rules of the code base (see `src/lib.rs`): floors, file length, and where `unsafe` and printing are allowed.

use crate::imports;
use std::{collections::BTreeMap, fs, path::Path, path::PathBuf};

const MAX_LINES: usize = 400;

/// Modules in which a file may not use definitions of its own parent (`mod.rs`) if the parent uses the file. In other
/// modules a parent may define types that its children share.
const STRICT_MODULES: [&str; 1] = ["ops"];

/// A source file without comments and without its test module.
struct Source {
    /// Path below `src`, with `/`.
    path: String,
    text: String,
    code: Vec<(usize, String)>,
}

impl Source {
    /// The top-level module that the file belongs to.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// Lines of code with one of the words, as `path:line`.
    fn lines_with(&self, words: &[&str]) -> Vec<String> {
        let found = self.code.iter().filter(|(_, line)| words.iter().any(|w| line.contains(w)));
        found.map(|(number, line)| format!("src/{}:{number}: {}", self.path, line.trim())).collect()
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    assert!(files.len() > 10, "no sources found");
    files.iter().map(|file| source(file, &root)).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => collect(&path, files),
            false if path.extension().is_some_and(|e| e == "rs") => files.push(path),
            false => {}
        }
    }
}

fn source(file: &Path, root: &Path) -> Source {
    let text = fs::read_to_string(file).unwrap();
    let path = file.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
    let tests = text.find("#[cfg(test)]\nmod tests {").or(text.find("#[cfg(test)]\npub(crate) mod tests {"));
    let code = text[..tests.unwrap_or(text.len())].lines().enumerate();
    let code = code.filter(|(_, line)| !line.trim_start().starts_with("//"));
    let code = code.map(|(i, line)| (i + 1, line.split(" // ").next().unwrap().to_owned())).collect();
    Source { path, text, code }
}

/// Floor of each module by the table in `lib.rs`.
fn floors() -> BTreeMap<String, usize> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let mut floors = BTreeMap::new();
    for line in lib.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        let Ok(floor) = cells[0].parse() else { continue };
        floors.extend(cells[1].split('`').skip(1).step_by(2).map(|module| (module.to_owned(), floor)));
    }
    floors
}

/// Top-level modules used by a file: `crate::a::…` and `crate::{a::…, b}`.
fn used_modules(code: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(names_of_group(group)),
            None => modules.push(identifier(rest)),
        }
    }
    modules
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// First path segments in `a::{x, y}, b::z, c}…`.
fn names_of_group(group: &str) -> Vec<String> {
    let (mut names, mut depth, mut expect_name) = (Vec::new(), 0, true);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expect_name = true,
            c if expect_name && c.is_alphabetic() => {
                names.push(identifier(&group[i..]));
                expect_name = false;
            }
            _ => {}
        }
    }
    names
}

#[test]
fn groups_are_parsed() {
    let code = "use crate::{\n    a::{x, y::{z}},\n    b,\n};\nlet q = crate::c::d();";
    assert_eq!(used_modules(code), ["a", "b", "c"]);
}

#[test]
fn files_use_their_own_floor_or_a_lower_one() {
    let floors = floors();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| !["main.rs", "lib.rs"].contains(&s.path.as_str())) {
        let module = source.module();
        let Some(floor) = floors.get(module) else { panic!("{module} is missing in the map of src/lib.rs") };
        let code: String = source.code.iter().map(|(_, line)| format!("{line}\n")).collect();
        for used in used_modules(&code).iter().filter(|_| !source.path.ends_with("tests.rs")) {
            match floors.get(used) {
                Some(other) if other <= floor => {}
                Some(other) => {
                    wrong.push(format!("src/{} (floor {floor}) uses {used} (floor {other})", source.path));
                }
                None => {} // a macro or item of the crate root
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Two files that import each other cannot be read, tested or replaced separately.
#[test]
fn files_do_not_import_each_other_in_circles() {
    let files: Vec<(String, String)> = sources().into_iter().map(|source| (source.path, source.text)).collect();
    let mut graph = imports::graph(&files);
    for (file, used) in graph.iter_mut().filter(|(file, _)| !STRICT_MODULES.contains(&file.split('/').next().unwrap()))
    {
        used.retain(|used, _| !used.strip_suffix("mod.rs").is_some_and(|folder| file.starts_with(folder)));
    }
    assert!(graph["ops/conv/mod.rs"].contains_key("ops/conv/winograd/mod.rs"), "imports are no longer understood");
    let circles = imports::circles(&graph);
    let mut wrong = String::new();
    for circle in &circles {
        wrong += &format!("circle of {}:\n", circle.join(", "));
        for file in circle {
            for (used, items) in graph[file].iter().filter(|(used, _)| circle.contains(used)) {
                wrong += &format!("  {file} uses {used}: {items:?}\n");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn circles_are_found_through_super_groups_and_re_exports() {
    let files = [
        ("lib.rs", "pub mod a;\npub mod d;\n"),
        ("a/mod.rs", "mod b;\nmod c;\npub use b::B;\n"),
        ("a/b.rs", "use super::{c::{C, D as E}};\npub struct B(C, E);\n"),
        ("a/c.rs", "use crate::a;\npub struct C; pub struct D;\nfn f(_: a::B) {}\n"),
        ("d.rs", "// crate::a::B\nuse crate::a::B;\n#[cfg(test)]\nmod tests {\n use crate::d; }\n"),
    ];
    let graph = imports::graph(&files.map(|(path, text)| (path.to_owned(), text.to_owned())));
    assert_eq!(imports::circles(&graph), [["a/b.rs", "a/c.rs"]]);
    assert_eq!(graph["d.rs"].keys().collect::<Vec<_>>(), ["a/b.rs"]);
    assert!(!graph.contains_key("a/mod.rs"), "declaring and re-exporting a child is no use of it");
}

#[test]
fn a_parent_that_uses_its_user_is_a_circle() {
    let files = [
        ("lib.rs", "pub mod a;\n"),
        ("a/mod.rs", "mod b;\nuse b::f;\npub struct Size;\npub fn g() { f(Size) }\n"),
        ("a/b.rs", "use super::Size;\npub fn f(_: Size) {}\n"),
    ];
    let graph = imports::graph(&files.map(|(path, text)| (path.to_owned(), text.to_owned())));
    assert_eq!(imports::circles(&graph), [["a/b.rs", "a/mod.rs"]]);
}

#[test]
fn files_are_short() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|s| s.text.lines().count() > MAX_LINES)
        .map(|s| format!("src/{}: {} lines", s.path, s.text.lines().count()))
        .collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines:\n{}", long.join("\n"));
}

#[test]
fn only_the_kernels_the_runtime_and_ranks_are_unsafe_or_gated() {
    for source in sources().iter().filter(|s| !["ops", "runtime", "dist"].contains(&s.module())) {
        let gates = ["cfg(feature", "cfg(not(feature", "cfg!(feature", "cfg_attr(feature", "cfg_attr(not(feature"];
        let mut found = source.lines_with(&["unsafe ", "unsafe{"]);
        found.extend(source.lines_with(&gates));
        // A backend outside the lower floors: the network, as a pair of files with the same signatures.
        found.retain(|line| source.path != "data/remote/mod.rs" || !line.contains("path = \"client_disabled.rs\""));
        assert!(found.is_empty(), "belongs in ops/ or dist/:\n{}", found.join("\n"));
    }
}

#[test]
fn only_report_prints() {
    let words = ["println!", "print!(", "dbg!(", "stdout()", "stderr()", "process::exit"];
    for source in sources().iter().filter(|s| s.module() != "report") {
        let found = source.lines_with(&words);
        assert!(found.is_empty(), "belongs in report.rs:\n{}", found.join("\n"));
    }
}

#[test]
fn nothing_is_left_undone_or_silenced() {
    for source in sources() {
        let found = source.lines_with(&["todo!", "unimplemented!", "unreachable_unchecked"]);
        assert!(found.is_empty(), "{}", found.join("\n"));
        let silenced = source.text.lines().filter(|l| l.contains("#[allow(") || l.contains("#![allow("));
        for line in silenced {
            assert!(line.contains("reason") || line.contains("// "), "src/{}: no reason beside {line}", source.path);
        }
    }
}

/// A comparison with one task lets the compiler overlook a new one, a `match` does not.
#[test]
fn tasks_are_matched_and_not_compared() {
    let compared = ["== Task::", "!= Task::", "== config::Task::", "!= config::Task::"];
    let found: Vec<String> = sources().iter().flat_map(|source| source.lines_with(&compared)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn dependencies_are_used() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let all: String = sources().iter().map(|s| s.text.as_str()).collect();
    for name in manifest["dependencies"].as_table().unwrap().keys() {
        let krate = name.replace('-', "_");
        assert!(all.contains(&format!("{krate}::")), "dependency {name} is not used");
    }
}
