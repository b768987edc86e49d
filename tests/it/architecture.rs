//! Architecture and language rules that a test can check: layers, circles of files, purity of the
//! core, `unsafe`, file size, duplicate type names, and phrases banned by the project's style.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Layers from the bottom to the top. A file may use its own layer and those below.
const LAYERS: &[&[&str]] = &[
    &CORE,
    &["ffi"],
    &["telemetry", "config", "files"],
    &[
        "hypervisor",
        "host",
        "cluster",
        "documents",
        "journal",
        "publish/file",
    ],
    &["connections"],
    &[
        "probe",
        "labeller",
        "launchers",
        "publish",
        "sockets",
        "executor",
        "external",
        "controller",
        "monitor",
        "doctor",
        "targets",
    ],
    &["daemon"],
    &["cli"],
    &["main", "lib"],
];

/// Pure parts: no async, clock, IO, environment or log.
const CORE: [&str; 11] = [
    "capability",
    "compat",
    "doctor/checks",
    "domain",
    "hotplug",
    "label",
    "operation",
    "sockets/filter",
    "sockets/procedures",
    "units",
    "xml",
];

struct Source {
    path: PathBuf,
    /// Path below src, without extension and without `mod`.
    module: Vec<String>,
    is_test: bool,
    text: String,
}

impl Source {
    /// The lines without comments, up to the inline tests.
    fn code(&self) -> Vec<&str> {
        let end = self.text.find("#[cfg(test)]\nmod tests {");
        let text = &self.text[..end.unwrap_or(self.text.len())];
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        text.lines().filter(is_code).collect()
    }

    fn is_below(&self, part: &str) -> bool {
        let part: Vec<&str> = part.split('/').collect();
        self.module.len() >= part.len() && self.module.iter().zip(&part).all(|(a, b)| a == b)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files below a directory with this extension.
fn files(directory: &str, extension: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut pending = vec![root().join(directory)];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    files("src", "rs")
        .into_iter()
        .map(|(path, text)| {
            let below = path.strip_prefix(root().join("src")).unwrap();
            let mut module: Vec<String> = below
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            let stem = module.last().cloned().unwrap_or_default();
            if stem == "mod" {
                module.pop();
            }
            let is_test = stem.ends_with("tests") || stem == "simulation";
            Source {
                path: below.to_owned(),
                module,
                is_test,
                text,
            }
        })
        .collect()
}

/// Returns the paths in a use tree: `a::{b, c as d}` is `a::b` and `a::c`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or_default().to_owned()];
    };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let mut depth = 0_usize;
    let parts = inner.split(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    let expanded = parts.flat_map(expand).filter(|path| !path.is_empty());
    expanded.map(|path| format!("{prefix}{path}")).collect()
}

/// Use lines of the crate: which file uses which.
struct Uses {
    sources: Vec<Source>,
    /// Indexes in `sources`.
    edges: Vec<BTreeSet<usize>>,
}

impl Uses {
    fn read() -> Self {
        let sources: Vec<Source> = sources().into_iter().filter(|s| !s.is_test).collect();
        let modules: BTreeMap<&[String], usize> = sources
            .iter()
            .enumerate()
            .map(|(at, source)| (source.module.as_slice(), at))
            .collect();
        // Per file, absolute paths; per module, the names that it re-exports.
        let mut used: Vec<Vec<Vec<String>>> = Vec::new();
        let mut exported: BTreeMap<(usize, String), Vec<String>> = BTreeMap::new();
        for (at, source) in sources.iter().enumerate() {
            let mut paths = Vec::new();
            let code = source.code().join(" ");
            for (is_export, tree) in statements(&code) {
                for path in expand(&tree) {
                    let Some(path) = absolute(&path, source, &modules) else {
                        continue;
                    };
                    if is_export && let Some(name) = path.last() {
                        exported.insert((at, name.clone()), path.clone());
                    }
                    paths.push(path);
                }
            }
            used.push(paths);
        }
        let edges = used
            .iter()
            .enumerate()
            .map(|(at, paths)| {
                paths
                    .iter()
                    .filter_map(|path| resolve(path, &modules, &exported, 5))
                    // A parent that re-exports its children is not a circle.
                    .filter(|to| !sources[at].module.starts_with(&sources[*to].module))
                    .collect()
            })
            .collect();
        Self { sources, edges }
    }

    fn name(&self, at: usize) -> String {
        self.sources[at].path.display().to_string()
    }

    /// Returns the files that can be reached from a file.
    fn reachable(&self, from: usize) -> BTreeSet<usize> {
        let mut reached = BTreeSet::new();
        let mut pending = vec![from];
        while let Some(at) = pending.pop() {
            for to in &self.edges[at] {
                if reached.insert(*to) {
                    pending.push(*to);
                }
            }
        }
        reached
    }
}

/// Returns the use statements in code without comments, with `true` for a re-export.
fn statements(code: &str) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = code[..at].trim_end();
        let is_start = before.is_empty() || before.ends_with([';', '}', '{', ']']);
        let is_export = before.ends_with("pub") || before.ends_with(')');
        if (is_start || is_export)
            && let Some((tree, _)) = code[at + 4..].split_once(';')
        {
            found.push((is_export, tree.to_owned()));
        }
    }
    // Paths in the code itself.
    for (at, _) in code.match_indices("crate::") {
        let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let path = code[at..].split(|c| !is_path(c)).next().unwrap_or_default();
        found.push((false, path.trim_end_matches(':').to_owned()));
    }
    found
}

/// Returns a path from the crate's root, or `None` for a path into another crate.
fn absolute(
    path: &str,
    source: &Source,
    modules: &BTreeMap<&[String], usize>,
) -> Option<Vec<String>> {
    let segments: Vec<String> = path.split("::").map(|s| s.trim().to_owned()).collect();
    let mut base = source.module.clone();
    let rest = match segments.first()?.as_str() {
        "crate" => {
            base.clear();
            &segments[1..]
        }
        "self" => &segments[1..],
        "super" => {
            let levels = segments.iter().take_while(|s| *s == "super").count();
            base.truncate(base.len().checked_sub(levels)?);
            &segments[levels..]
        }
        child => {
            base.push(child.to_owned());
            let is_child = modules.contains_key(base.as_slice());
            base.pop();
            is_child.then_some(&segments[..])?
        }
    };
    base.extend_from_slice(rest);
    Some(base)
}

/// Returns the file that defines the item at a path, following re-exports.
fn resolve(
    path: &[String],
    modules: &BTreeMap<&[String], usize>,
    exported: &BTreeMap<(usize, String), Vec<String>>,
    depth: usize,
) -> Option<usize> {
    let length = (1..=path.len())
        .rev()
        .find(|length| modules.contains_key(&path[..*length]))?;
    let at = modules[&path[..length]];
    let target = path
        .get(length)
        .and_then(|name| exported.get(&(at, name.clone())));
    match target {
        Some(target) if depth > 0 && target != path => {
            resolve(target, modules, exported, depth - 1)
        }
        _ => Some(at),
    }
}

#[test]
fn use_lines_point_down() {
    let uses = Uses::read();
    let layer = |at: usize| {
        let source = &uses.sources[at];
        let parts = LAYERS.iter().enumerate();
        let parts = parts.flat_map(|(layer, parts)| parts.iter().map(move |part| (part, layer)));
        let own = parts.filter(|(part, _)| source.is_below(part));
        let own = own.max_by_key(|(part, _)| part.len());
        own.unwrap_or_else(|| panic!("{} has no layer", uses.name(at)))
            .1
    };
    let mut up = Vec::new();
    for (from, edges) in uses.edges.iter().enumerate() {
        for to in edges.iter().filter(|to| layer(**to) > layer(from)) {
            up.push(format!("{} uses {}", uses.name(from), uses.name(*to)));
        }
    }
    assert_eq!(up, Vec::<String>::new());
}

#[test]
fn files_form_no_circles() {
    let uses = Uses::read();
    let reachable: Vec<_> = (0..uses.sources.len())
        .map(|at| uses.reachable(at))
        .collect();
    let circles: Vec<String> = (0..uses.sources.len())
        .filter(|at| reachable[*at].contains(at))
        .map(|at| {
            let back = uses.edges[at]
                .iter()
                .filter(|to| reachable[**to].contains(&at));
            let back: Vec<String> = back.map(|to| uses.name(*to)).collect();
            format!("{} uses {}", uses.name(at), back.join(", "))
        })
        .collect();
    assert_eq!(circles, Vec::<String>::new());
}

/// True if a line contains the word, and not as the end of a longer one.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_')
    })
}

#[test]
fn core_is_pure() {
    let outside = [
        "tokio",
        "virt::",
        "kube::",
        "k8s_openapi",
        "tracing",
        "std::fs",
        "std::net",
        "std::env",
        "std::process",
        "std::time",
        "std::thread",
        "async fn",
    ];
    for source in sources() {
        if !CORE.iter().any(|part| source.is_below(part)) {
            continue;
        }
        for line in source.code() {
            // A duration is a value; a clock is not.
            let line = line.replace("std::time::Duration", "");
            for word in outside {
                let path = source.path.display();
                assert!(!contains_word(&line, word), "{path} uses {word}: {line}");
            }
        }
    }
}

#[test]
fn adapters_do_not_use_each_other() {
    let adapters = ["hypervisor", "host", "cluster", "documents", "journal"];
    let uses = Uses::read();
    let adapter = |at: usize| adapters.iter().find(|part| uses.sources[at].is_below(part));
    for (from, edges) in uses.edges.iter().enumerate() {
        for to in edges {
            if let (Some(one), Some(other)) = (adapter(from), adapter(*to)) {
                assert_eq!(one, other, "{} uses {}", uses.name(from), uses.name(*to));
            }
        }
    }
}

#[test]
fn unsafe_code_is_in_ffi_and_explained() {
    for source in sources() {
        let blocks = source
            .code()
            .iter()
            .filter(|line| line.contains("unsafe "))
            .count();
        if source.is_below("ffi") {
            let explained = source.text.matches("// SAFETY:").count();
            assert!(explained > 0 || blocks == 0, "{}", source.path.display());
        } else {
            assert_eq!(blocks, 0, "{}", source.path.display());
        }
    }
}

#[test]
fn product_files_have_at_most_600_lines() {
    for source in sources().iter().filter(|source| !source.is_test) {
        let lines = source.text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines", source.path.display());
    }
}

#[test]
fn at_most_3_percent_of_type_names_are_used_twice() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for line in source.text.lines() {
            let line = line.trim_start();
            let line = line.strip_prefix("pub").unwrap_or(line);
            let line = match line.strip_prefix('(') {
                Some(rest) => rest.split_once(')').map_or(line, |(_, rest)| rest),
                None => line,
            };
            let mut words = line.split_whitespace();
            if let Some("struct" | "enum" | "trait" | "union") = words.next() {
                let name = words.next().unwrap_or_default();
                let end = name
                    .find(|c: char| !c.is_alphanumeric())
                    .unwrap_or(name.len());
                let file = source.path.display().to_string();
                files.entry(name[..end].to_owned()).or_default().push(file);
            }
        }
    }
    let all = files.len();
    files.retain(|_, files| files.len() > 1);
    assert!(
        files.len() * 100 <= all * 3,
        "{} of {all}: {files:#?}",
        files.len()
    );
}

/// Words that no doc comment begins with: they start a clause, not a noun phrase or a verb.
const BANNED_STARTS: [&str; 9] = [
    "What ",
    "Who ",
    "Whose ",
    "Whom ",
    "Whether ",
    "How ",
    "Of ",
    "So many ",
    "All that ",
];

/// Phrases that the project's style bans, in comments, messages and documents.
const BANNED_PHRASES: [&str; 12] = [
    "for ever",
    "not any more",
    "any more",
    "put right",
    "puts right",
    "begun anew",
    "begins anew",
    "made anew",
    "takes up",
    "at rest",
    "told",
    "tells",
];

/// Returns banned phrases in prose, each with its line.
fn banned(text: &str) -> Vec<&str> {
    let is_letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let has = |line: &str, phrase: &str| {
        let line = line.to_lowercase();
        line.match_indices(phrase).any(|(at, _)| {
            let after = at + phrase.len();
            !is_letter(line[..at].chars().next_back()) && !is_letter(line[after..].chars().next())
        })
    };
    let lines = text.lines();
    lines
        .filter(|line| BANNED_PHRASES.iter().any(|phrase| has(line, phrase)))
        .collect()
}

#[test]
fn comments_and_docs_are_in_plain_english() {
    let mut found = Vec::new();
    for source in sources() {
        let path = source.path.display();
        for line in source.text.lines() {
            let comment = line.trim_start();
            let doc = ["/// ", "//! "]
                .iter()
                .find_map(|mark| comment.strip_prefix(mark));
            let is_first = doc.is_some_and(|doc| BANNED_STARTS.iter().any(|s| doc.starts_with(s)));
            if is_first && is_first_line(&source.text, line) {
                found.push(format!("{path}: {line}"));
            }
        }
        found.extend(
            banned(&source.text)
                .iter()
                .map(|line| format!("{path}: {line}")),
        );
    }
    let documents = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ];
    let documents = documents.map(|name| {
        (
            root().join(name),
            fs::read_to_string(root().join(name)).unwrap(),
        )
    });
    for (path, text) in files("docs", "md").into_iter().chain(documents) {
        found.extend(
            banned(&text)
                .iter()
                .map(|line| format!("{}: {line}", path.display())),
        );
    }
    assert!(
        found.is_empty(),
        "{} lines:\n{}",
        found.len(),
        found.join("\n")
    );
}

/// True if the line begins a doc comment.
fn is_first_line(text: &str, line: &str) -> bool {
    let mut before = "";
    for current in text.lines() {
        if std::ptr::eq(current, line) {
            break;
        }
        before = current.trim_start();
    }
    let is_doc = before.starts_with("///") || before.starts_with("//!");
    !is_doc || matches!(before, "///" | "//!")
}

#[test]
fn no_match_on_a_bool() {
    let mut found = Vec::new();
    for (path, text) in [
        files("src", "rs"),
        files("tests", "rs"),
        files("benches", "rs"),
    ]
    .concat()
    {
        for (at, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.starts_with("true =>") || line.starts_with("false =>") {
                found.push(format!("{}:{}: {line}", path.display(), at + 1));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} lines:\n{}",
        found.len(),
        found.join("\n")
    );
}
