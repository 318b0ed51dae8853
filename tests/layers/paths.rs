//! Paths named in a source file, as far as the dependencies between modules require: `use` trees and paths in the code,
//! resolved through `self`, `super` and imported names. Comments, literals and `#[cfg(test)]` items are skipped.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, fs,
    path::{Path, PathBuf},
};

/// Dependency of a file on a path.
#[derive(Debug)]
pub struct PathDependency {
    file: String,
    /// Path of the file's module, without `crate`.
    module: Vec<String>,
    /// Path of the dependency, starting with `crate` or the name of another crate.
    path: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum PathToken {
    Name(String),
    /// `::`
    Colons,
    Other(char),
}

/// Returns the dependencies of `file`.
pub fn arrows(src: &Path, file: &Path) -> Vec<PathDependency> {
    let name = file.strip_prefix(src).expect("a file of the source").with_extension("");
    let (module, text) = (module(src, file), fs::read_to_string(file).expect("a source file"));
    let arrow = |path| PathDependency { file: name.display().to_string(), module: module.clone(), path };
    named(&text, &module).into_iter().map(arrow).collect()
}

/// Returns the paths named in the text of a module.
pub fn named(text: &str, module: &[String]) -> Vec<Vec<String>> {
    let known = KnownPaths::of(text, module.to_vec());
    known.paths.into_iter().chain(known.exports.into_values()).collect()
}

/// Returns the files that each file uses, as paths of their modules. A re-exported name stands for the file that defines
/// it, and passing it on is no use.
pub fn graph(src: &Path, files: &[PathBuf]) -> BTreeMap<String, BTreeSet<String>> {
    let known = |file: &PathBuf| {
        let module = module(src, file);
        (module.clone(), KnownPaths::of(&fs::read_to_string(file).expect("a source file"), module))
    };
    let files: HashMap<_, _> = files.iter().map(known).collect();
    let used = |known: &KnownPaths| {
        let used = known.paths.iter().filter_map(|path| definer(&files, path));
        used.filter(|used| **used != known.module).map(|used| used.join("/")).collect()
    };
    files.iter().map(|(module, known)| (module.join("/"), used(known))).collect()
}

/// Returns the module of the file that defines what a path names, through re-exports.
fn definer<'a>(files: &'a HashMap<Vec<String>, KnownPaths>, path: &[String]) -> Option<&'a Vec<String>> {
    let path = path.strip_prefix(&["crate".to_owned()])?;
    let depth = (0..=path.len()).rev().find(|depth| files.contains_key(&path[..*depth]))?;
    let (module, known) = files.get_key_value(&path[..depth])?;
    let exported = path.get(depth).and_then(|name| known.exports.get(name));
    exported.and_then(|target| definer(files, &[target, &path[depth + 1..]].concat())).or(Some(module))
}

/// Returns the path of a file's module, without `crate`.
fn module(src: &Path, file: &Path) -> Vec<String> {
    let name = file.strip_prefix(src).expect("a file of the source").with_extension("");
    let mut module: Vec<String> = name.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    module
}

// === impl Token ===

impl PathToken {
    fn is(&self, word: &str) -> bool {
        matches!(self, Self::Name(name) if name == word)
    }
}

// === impl PathDependency ===

impl PathDependency {
    /// Returns the top-level module of the file.
    pub fn from(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }

    /// Returns the top-level module of the dependency if it is in this crate.
    pub fn to_ours(&self) -> Option<&str> {
        match &self.path[..] {
            [ours, module, ..] if ours == "crate" => Some(module),
            _ => None,
        }
    }

    /// Returns true if the dependency is `name` or lies inside it.
    pub fn leads_to(&self, name: &str) -> bool {
        let begins = |path: &[String]| {
            let mut path = path.iter();
            name.split("::").all(|part| path.next().is_some_and(|segment| segment == part))
        };
        begins(&self.path) || (self.path[0] == "crate" && begins(&self.path[1..]))
    }
}

impl fmt::Display for PathDependency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}.rs uses {}", self.file, self.path.join("::"))
    }
}

/// Paths named in a file, and the paths that its imported names stand for.
struct KnownPaths {
    module: Vec<String>,
    names: HashMap<String, Vec<String>>,
    /// Paths that the file uses.
    paths: Vec<Vec<String>>,
    /// Names that the file passes on with `pub use`, except by `*`.
    exports: HashMap<String, Vec<String>>,
}

impl KnownPaths {
    fn of(text: &str, module: Vec<String>) -> Self {
        let tokens = without_tests(tokens(text));
        let mut known = Self { module, names: HashMap::new(), paths: Vec::new(), exports: HashMap::new() };
        for pair in tokens.windows(2) {
            if let [PathToken::Name(word), PathToken::Name(child)] = pair
                && word == "mod"
            {
                let path = [&["crate".to_owned()], &known.module[..], std::slice::from_ref(child)].concat();
                known.names.insert(child.clone(), path);
            }
        }
        let mut rest = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            // `use<'a>` in a type is not an import.
            if tokens[at] == PathToken::Name("use".into())
                && tokens.get(at + 1) != Some(&PathToken::Other('<'))
            {
                let before = at.checked_sub(1).map(|before| &tokens[before]);
                let is_public =
                    before.is_some_and(|token| *token == PathToken::Other(')') || token.is("pub"));
                at = known.import(&tokens, at + 1, &[], is_public);
            } else {
                rest.push(&tokens[at]);
                at += 1;
            }
        }
        known.inline(&rest);
        known
    }

    /// Parses a `use` tree and returns the index after it.
    fn import(
        &mut self,
        tokens: &[PathToken],
        mut at: usize,
        before: &[String],
        mut is_public: bool,
    ) -> usize {
        let mut path = before.to_vec();
        let mut alias = None;
        loop {
            match tokens.get(at) {
                Some(PathToken::Name(word)) if word == "as" => {
                    if let Some(PathToken::Name(name)) = tokens.get(at + 1) {
                        let imported = self.resolve(&path);
                        self.names.insert(name.clone(), imported);
                        alias = Some(name);
                    }
                    at += 2;
                }
                Some(PathToken::Name(word)) if word == "self" && !path.is_empty() => at += 1,
                Some(PathToken::Name(word)) => {
                    path.push(word.clone());
                    at += 1;
                }
                Some(PathToken::Colons) => at += 1,
                Some(PathToken::Other('{')) => {
                    at += 1;
                    while tokens.get(at).is_some_and(|token| *token != PathToken::Other('}')) {
                        at = self.import(tokens, at, &path, is_public);
                        if tokens.get(at) == Some(&PathToken::Other(',')) {
                            at += 1;
                        }
                    }
                    return at + 1;
                }
                Some(PathToken::Other('*')) => (at, is_public) = (at + 1, false),
                _ => break,
            }
        }
        let imported = self.resolve(&path);
        if let Some(name) = path.last() {
            self.names.entry(name.clone()).or_insert_with(|| imported.clone());
        }
        match alias.or(path.last()).filter(|_| is_public) {
            Some(name) => drop(self.exports.insert(name.clone(), imported)),
            None => self.paths.push(imported),
        }
        at
    }

    /// Collects the paths outside `use`.
    fn inline(&mut self, tokens: &[&PathToken]) {
        let mut at = 0;
        while at < tokens.len() {
            let before = at.checked_sub(1).map(|before| tokens[before]);
            // The path in `pub(in path)` is no use.
            if tokens[at].is("in") && before == Some(&PathToken::Other('(')) {
                at += tokens[at..].iter().take_while(|token| ***token != PathToken::Other(')')).count();
                continue;
            }
            let mut path = Vec::new();
            while let Some(PathToken::Name(word)) = tokens.get(at) {
                path.push(word.clone());
                if tokens.get(at + 1) != Some(&&PathToken::Colons) {
                    break;
                }
                at += 2;
            }
            if path.len() > 1 {
                let path = self.resolve(&path);
                self.paths.push(path);
            } else if let Some(path) = path.first().and_then(|name| self.exports.get(name))
                && before.is_none_or(|token| *token != PathToken::Other('.') && !token.is("mod"))
            {
                self.paths.push(path.clone());
            }
            at += 1;
        }
    }

    fn resolve(&self, path: &[String]) -> Vec<String> {
        let Some(first) = path.first() else { return vec!["self".into()] };
        let ours = |depth: usize| [&["crate".to_owned()], &self.module[..depth]].concat();
        match first.as_str() {
            "crate" => path.to_vec(),
            "self" => [&ours(self.module.len()), &path[1..]].concat(),
            "super" => {
                let up = path.iter().take_while(|part| *part == "super").count();
                [&ours(self.module.len().saturating_sub(up)), &path[up..]].concat()
            }
            _ => match self.names.get(first) {
                Some(known) => [known, &path[1..]].concat(),
                None => path.to_vec(),
            },
        }
    }
}

/// Removes every item marked `#[cfg(test)]`.
fn without_tests(tokens: Vec<PathToken>) -> Vec<PathToken> {
    let test: Vec<_> = ["#", "[", "cfg", "(", "test", ")", "]"].into_iter().flat_map(self::tokens).collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].starts_with(&test) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += test.len();
        // Skip to the `;` or the closing brace of the item.
        let mut depth = 0;
        while at < tokens.len() {
            match tokens[at] {
                PathToken::Other('{' | '(' | '[') => depth += 1,
                PathToken::Other(')' | ']') => depth -= 1,
                PathToken::Other('}') => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                PathToken::Other(';') if depth == 0 => break,
                _ => {}
            }
            at += 1;
        }
        at += 1;
    }
    kept
}

fn tokens(text: &str) -> Vec<PathToken> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = literal(rest) {
            tokens.push(PathToken::Other('"'));
            length
        } else if rest.starts_with("::") {
            tokens.push(PathToken::Colons);
            2
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|character: char| !character.is_alphanumeric() && character != '_');
            let end = end.unwrap_or(rest.len());
            tokens.push(PathToken::Name(rest[..end].into()));
            end
        } else {
            if !first.is_whitespace() {
                tokens.push(PathToken::Other(first));
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

/// Returns the length of the string or character literal at the start of `text`, if there is one.
fn literal(text: &str) -> Option<usize> {
    let after_prefix = text.trim_start_matches(['b', 'c']);
    let prefix = text.len() - after_prefix.len();
    if prefix > 1 {
        return None;
    }
    if let Some(raw) = after_prefix.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        let body = raw[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        return Some(prefix + 1 + hashes + 1 + body.find(&end)? + end.len());
    }
    let quote = after_prefix.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
    let body = &after_prefix[1..];
    if quote == '\'' && !body.starts_with('\\') {
        // A lifetime has no closing quote after its first character.
        let character = body.chars().next()?;
        return body[character.len_utf8()..].starts_with('\'').then(|| prefix + 2 + character.len_utf8());
    }
    let mut escaped = false;
    let end = body.find(|character: char| {
        let ends = character == quote && !escaped;
        escaped = character == '\\' && !escaped;
        ends
    })?;
    Some(prefix + 1 + end + 1)
}
