//! Finds which source files use which others: `use` trees and paths in code are resolved to the file that defines the
//! item.
//!
//! A small parser of Rust, sufficient for this code base: it follows `crate::`, `self::`, `super::`, groups, renamed
//! imports, re-exports and inline modules. Items under `#[cfg(test)]` are skipped; `#[path]` is not followed.

use std::collections::{BTreeMap, BTreeSet};

/// For each file, the items that it uses from each other file.
pub type Graph = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// A module: a file or an inline `mod`.
#[derive(Default)]
struct Module {
    file: String,
    /// Code without `use` statements, inline modules and comments.
    body: String,
    /// Names in scope through `use`: name → path, absolute after [`absolute`]; whether it is a re-export (`pub use`).
    scope: BTreeMap<String, (Vec<String>, bool)>,
    globs: Vec<(Vec<String>, bool)>,
}

type Modules = BTreeMap<Vec<String>, Module>;

/// Reads files as (path below `src`, text).
pub fn graph(files: &[(String, String)]) -> Graph {
    let mut modules = Modules::new();
    let tests: BTreeSet<Vec<String>> = files.iter().flat_map(|(path, text)| test_modules(path, text)).collect();
    for (path, text) in files {
        let name = module_path(path);
        if !(1..=name.len()).any(|n| tests.contains(&name[..n])) {
            add_module(&mut modules, name, path, &without_tests(&without_comments(text)));
        }
    }
    let mut graph = Graph::new();
    for (name, module) in &modules {
        for (user, target, item) in edges(&modules, name, module) {
            if user != target {
                graph.entry(user).or_default().entry(target).or_default().insert(item);
            }
        }
    }
    graph
}

/// Groups of files that reach each other (strongly connected components), each sorted.
pub fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let reached: BTreeMap<&String, BTreeSet<&String>> = graph.keys().map(|file| (file, reach(graph, file))).collect();
    let mut circles: BTreeSet<Vec<String>> = BTreeSet::new();
    for (file, seen) in reached.iter().filter(|(file, seen)| seen.contains(*file)) {
        circles.insert(
            seen.iter()
                .filter(|other| reached.get(**other).is_some_and(|s| s.contains(file)))
                .map(|f| (*f).clone())
                .collect(),
        );
    }
    circles.into_iter().collect()
}

/// All files that `start` uses, directly or through others.
fn reach<'a>(graph: &'a Graph, start: &'a String) -> BTreeSet<&'a String> {
    let (mut seen, mut stack) = (BTreeSet::new(), vec![start]);
    while let Some(file) = stack.pop() {
        stack.extend(graph.get(file).into_iter().flat_map(BTreeMap::keys).filter(|next| seen.insert(*next)));
    }
    seen
}

fn module_path(path: &str) -> Vec<String> {
    let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').filter(|part| !["lib", "main"].contains(part)).map(str::to_owned).collect()
}

/// Modules that a file declares under `#[cfg(test)]`.
fn test_modules(path: &str, text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("#[cfg(test)]").chain(text.match_indices("#[cfg(all(test,")) {
        let item = text[at..].split_once("]\n").map_or("", |(_, rest)| rest);
        let line = item.lines().find(|line| !line.starts_with("#[")).unwrap_or("");
        if let Some((_, name)) = line.split_once("mod ").filter(|_| line.ends_with(';')) {
            let mut module = module_path(path);
            module.push(name.trim_end_matches(';').to_owned());
            found.push(module);
        }
    }
    found
}

/// Blanks comments, and the content of strings and characters.
fn without_comments(text: &str) -> String {
    let (mut code, mut rest) = (String::new(), text);
    while let Some(c) = rest.chars().next() {
        let skip = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '"' => string_length(rest),
            'r' if rest.starts_with("r#\"") => rest[3..].find("\"#").map_or(rest.len(), |end| end + 5),
            '\'' if rest.starts_with("'\\") => rest[2..].find('\'').map_or(1, |end| end + 3),
            '\'' if rest.chars().nth(2) == Some('\'') => rest.char_indices().nth(3).map_or(rest.len(), |(i, _)| i),
            _ => {
                code.push(c);
                rest = &rest[c.len_utf8()..];
                continue;
            }
        };
        rest = &rest[skip.max(1)..];
    }
    code
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return i + 1,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    text.len()
}

/// Removes the item or statement after each `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let (mut kept, mut rest) = (String::new(), code);
    while let Some(at) = ["#[cfg(test)]", "#[cfg(all(test,"].iter().filter_map(|mark| rest.find(mark)).min() {
        kept.push_str(&rest[..at]);
        let item = rest[at..].find(']').map_or("", |end| &rest[at + end + 1..]);
        rest = &item[item_length(item)..];
    }
    kept + rest
}

/// Length of an item up to its closing brace, its semicolon, or (fields and struct literals) its comma.
fn item_length(item: &str) -> usize {
    let mut depth = 0;
    for (i, c) in item.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' if depth == 1 => return i + 1,
            '}' | ')' | ']' => depth -= 1,
            ';' | ',' if depth == 0 => return i + 1,
            _ => {}
        }
    }
    item.len()
}

/// Parses a module; inline modules become modules of the same file.
fn add_module(modules: &mut Modules, name: Vec<String>, file: &str, code: &str) {
    let mut module = Module { file: file.to_owned(), ..Module::default() };
    let mut rest = code;
    while let Some(at) = next_keyword(rest, &["use ", "mod "]) {
        let statement = &rest[at..];
        let public = rest[..at].trim_end().ends_with("pub") || rest[..at].trim_end().ends_with(')');
        module.body.push_str(&rest[..at]);
        let end = statement.find([';', '{']).unwrap_or(statement.len() - 1);
        if statement.starts_with("use ") {
            let end = statement.find(';').unwrap_or(statement.len() - 1);
            for path in flat(&statement[4..end]) {
                import(&mut module, path, public);
            }
            rest = &statement[end + 1..];
        } else if statement[end..].starts_with('{') {
            let length = item_length(&statement[end..]);
            let mut inner = name.clone();
            inner.push(statement[4..end].trim().to_owned());
            add_module(modules, inner, file, &statement[end + 1..end + length - 1]);
            rest = &statement[end + length..];
        } else {
            rest = &statement[end + 1..];
        }
    }
    module.body.push_str(rest);
    modules.insert(name, module);
}

fn next_keyword(code: &str, words: &[&str]) -> Option<usize> {
    let found = words.iter().flat_map(|word| code.match_indices(word).map(|(at, _)| at));
    found.filter(|at| code[..*at].chars().next_back().is_none_or(|c| c.is_whitespace() || "{};".contains(c))).min()
}

/// The paths of a `use` tree, each as its segments; a new name follows `as`.
fn flat(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some((prefix, group)) = tree.split_once('{') else {
        return vec![tree.split("::").map(|part| part.trim().to_owned()).collect()];
    };
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    let group = group.trim_end().strip_suffix('}').unwrap_or(group);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&group[start..]);
    parts
        .iter()
        .filter(|part| !part.trim().is_empty())
        .flat_map(|part| flat(&format!("{prefix}{}", part.trim())))
        .collect()
}

fn import(module: &mut Module, mut path: Vec<String>, public: bool) {
    let last = path.pop().unwrap_or_default();
    let (item, alias) = last.split_once(" as ").unwrap_or((&last, &last));
    match item {
        "*" => module.globs.push((path, public)),
        "self" => {
            let name = path.last().cloned().unwrap_or_default();
            module.scope.insert(if alias == "self" { name } else { alias.to_owned() }, (path, public));
        }
        _ => {
            path.push(item.to_owned());
            module.scope.insert(alias.to_owned(), (path, public));
        }
    }
}

/// Edges of a module: (file, file that it uses, name of the item).
fn edges(modules: &Modules, name: &[String], module: &Module) -> Vec<(String, String, String)> {
    let mut paths: Vec<Vec<String>> = qualified_paths(&module.body);
    paths.extend(module.globs.iter().filter(|(_, public)| !public).map(|(path, _)| path.clone()));
    for (alias, (path, public)) in &module.scope {
        if !public || words(&module.body).any(|word| word == alias) {
            paths.push(path.clone());
        }
    }
    let resolved = paths.iter().filter_map(|path| resolve(modules, name, path, 0));
    resolved.map(|(file, item)| (module.file.clone(), file, item)).collect()
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Paths of two segments or more, such as `super::a::b` and `ops::gelu`.
fn qualified_paths(code: &str) -> Vec<Vec<String>> {
    let tokens = code.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
    let paths = tokens.filter(|token| token.contains("::")).map(|token| token.trim_matches(':').split("::"));
    paths.map(|path| path.map(str::to_owned).collect::<Vec<_>>()).filter(|path| path.len() > 1).collect()
}

/// The file that defines `path` as seen from `from`, and the item's name; `None` if it is outside of the crate.
fn resolve(modules: &Modules, from: &[String], path: &[String], depth: usize) -> Option<(String, String)> {
    if depth > 12 {
        return None;
    }
    let (mut at, mut rest) = (from.to_vec(), path);
    let mut rooted = false;
    while let Some((first, next)) = rest.split_first() {
        match first.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => {
                at.pop();
            }
            _ => break,
        }
        (rest, rooted) = (next, true);
    }
    while let Some((first, next)) = rest.split_first() {
        let module = modules.get(&at)?;
        let child = [at.as_slice(), std::slice::from_ref(first)].concat();
        if modules.contains_key(&child) && (rooted || !module.scope.contains_key(first)) {
            // A re-exported function with the name of its module is found in the module.
            (at, rest, rooted) = (child, next, true);
            if next.is_empty() {
                let (module, name) = (modules.get(&at)?, at.last()?);
                let again = module.scope.get(name).and_then(|(path, _)| resolve(modules, &at, path, depth + 1));
                return again.or_else(|| defines(module, name).then(|| (module.file.clone(), name.clone())));
            }
            continue;
        }
        if let Some((imported, _)) = module.scope.get(first) {
            let whole = [imported.as_slice(), next].concat();
            return (whole != path || at != from).then(|| resolve(modules, &at, &whole, depth + 1))?;
        }
        let glob = module.globs.iter().find_map(|(path, _)| {
            let whole = [path.as_slice(), rest].concat();
            resolve(modules, &at, &whole, depth + 1).filter(|(file, item)| item == first && *file != module.file)
        });
        return match rooted {
            true => glob.or_else(|| Some((module.file.clone(), first.clone()))),
            false => glob,
        };
    }
    None
}

fn defines(module: &Module, name: &str) -> bool {
    let named = |keyword: &str| module.body.contains(&format!("{keyword} {name}"));
    ["fn", "struct", "enum", "trait", "const", "static", "type", "macro_rules!"].into_iter().any(named)
}
