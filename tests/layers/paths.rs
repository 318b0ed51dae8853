//! Paths named in a source file, as far as the dependencies between modules require: `use` trees and paths in the code,
//! resolved through `self`, `super` and imported names. Comments, literals and `#[cfg(test)]` items are skipped.

use std::{collections::HashMap, fmt, fs, path::Path};

/// Dependency of a file on a path.
#[derive(Debug)]
pub struct Arrow {
    file: String,
    /// Path of the file's module, without `crate`.
    module: Vec<String>,
    /// Path of the dependency, starting with `crate` or the name of another crate.
    path: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    /// `::`
    Colons,
    Other(char),
}

/// Returns the dependencies of `file`.
pub fn arrows(src: &Path, file: &Path) -> Vec<Arrow> {
    let name = file.strip_prefix(src).expect("a file of the source").with_extension("");
    let mut module: Vec<String> = name.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    let text = fs::read_to_string(file).expect("a source file");
    let arrow = |path| Arrow { file: name.display().to_string(), module: module.clone(), path };
    named(&text, &module).into_iter().map(arrow).collect()
}

/// Returns the paths named in the text of a module.
pub fn named(text: &str, module: &[String]) -> Vec<Vec<String>> {
    Known::of(&without_tests(tokens(text)), module).paths
}

// === impl Arrow ===

impl Arrow {
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

impl fmt::Display for Arrow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}.rs uses {}", self.file, self.path.join("::"))
    }
}

/// Paths named in a file, and the paths that its imported names stand for.
struct Known<'a> {
    module: &'a [String],
    names: HashMap<String, Vec<String>>,
    paths: Vec<Vec<String>>,
}

impl<'a> Known<'a> {
    fn of(tokens: &[Token], module: &'a [String]) -> Self {
        let mut known = Self { module, names: HashMap::new(), paths: Vec::new() };
        for pair in tokens.windows(2) {
            if let [Token::Name(word), Token::Name(child)] = pair
                && word == "mod"
            {
                let path = ["crate".into()].into_iter().chain(module.iter().cloned());
                known.names.insert(child.clone(), path.chain([child.clone()]).collect());
            }
        }
        let mut rest = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            // `use<'a>` in a type is not an import.
            if tokens[at] == Token::Name("use".into()) && tokens.get(at + 1) != Some(&Token::Other('<')) {
                at = known.import(tokens, at + 1, &[]);
            } else {
                rest.push(&tokens[at]);
                at += 1;
            }
        }
        known.inline(&rest);
        known
    }

    /// Parses a `use` tree and returns the index after it.
    fn import(&mut self, tokens: &[Token], mut at: usize, before: &[String]) -> usize {
        let mut path = before.to_vec();
        loop {
            match tokens.get(at) {
                Some(Token::Name(word)) if word == "as" => {
                    if let Some(Token::Name(name)) = tokens.get(at + 1) {
                        let imported = self.resolve(&path);
                        self.names.insert(name.clone(), imported);
                    }
                    at += 2;
                }
                Some(Token::Name(word)) if word == "self" && !path.is_empty() => at += 1,
                Some(Token::Name(word)) => {
                    path.push(word.clone());
                    at += 1;
                }
                Some(Token::Colons) => at += 1,
                Some(Token::Other('{')) => {
                    at += 1;
                    while tokens.get(at).is_some_and(|token| *token != Token::Other('}')) {
                        at = self.import(tokens, at, &path);
                        if tokens.get(at) == Some(&Token::Other(',')) {
                            at += 1;
                        }
                    }
                    return at + 1;
                }
                Some(Token::Other('*')) => at += 1,
                _ => break,
            }
        }
        let imported = self.resolve(&path);
        if let Some(name) = path.last() {
            self.names.entry(name.clone()).or_insert_with(|| imported.clone());
        }
        self.paths.push(imported);
        at
    }

    /// Collects the paths outside `use`.
    fn inline(&mut self, tokens: &[&Token]) {
        let mut at = 0;
        while at < tokens.len() {
            let mut path = Vec::new();
            while let Some(Token::Name(word)) = tokens.get(at) {
                path.push(word.clone());
                if tokens.get(at + 1) != Some(&&Token::Colons) {
                    break;
                }
                at += 2;
            }
            if path.len() > 1 {
                let path = self.resolve(&path);
                self.paths.push(path);
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
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
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
                Token::Other('{' | '(' | '[') => depth += 1,
                Token::Other(')' | ']') => depth -= 1,
                Token::Other('}') => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                Token::Other(';') if depth == 0 => break,
                _ => {}
            }
            at += 1;
        }
        at += 1;
    }
    kept
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = literal(rest) {
            tokens.push(Token::Other('"'));
            length
        } else if rest.starts_with("::") {
            tokens.push(Token::Colons);
            2
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|character: char| !character.is_alphanumeric() && character != '_');
            let end = end.unwrap_or(rest.len());
            tokens.push(Token::Name(rest[..end].into()));
            end
        } else {
            if !first.is_whitespace() {
                tokens.push(Token::Other(first));
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
