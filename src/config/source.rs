//! Positions of keys in a file, and paths to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Deserializer, de};
use serde_saphyr::{Location, Spanned};

use super::{
    env::Expansion,
    error::{Position, Problem, one_line},
};

/// A parsed file: its name, text, and tree of positions.
pub(super) struct SourceFile<'a> {
    name: &'a str,
    text: &'a str,
    root: SourceNode,
    pub(super) faults: Faults,
    /// Values that refer to environment variables.
    pub(super) expansions: BTreeMap<KeyPath, Expansion>,
}

/// Places of a file that already have a problem. Problems that only follow from these are not reported.
#[derive(Default)]
pub(super) struct Faults {
    /// Values that are invalid and therefore left out of the configuration.
    pub(super) skipped: BTreeSet<KeyPath>,
    /// Values that the file lacks and should have, or was probably meant to have.
    pub(super) doubtful: BTreeSet<KeyPath>,
}

/// Path to a key, displayed as `routes[0].hold.maxRequests`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyPath(Vec<PathSegment>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PathSegment {
    Key(String),
    Index(usize),
}

pub(super) type SourceNode = Spanned<NodeKind>;

/// Kind of a node. Collected by a second pass over the text, since the configuration's types have no positions.
pub(super) enum NodeKind {
    /// A scalar other than a text, formatted for messages.
    Leaf(String),
    Text(String),
    List(Vec<SourceNode>),
    Map(Vec<(Spanned<String>, SourceNode)>),
}

// === impl SourceFile ===

impl<'a> SourceFile<'a> {
    pub(super) fn new(name: &'a str, text: &'a str) -> Self {
        let unknown = Location::UNKNOWN;
        let root = Spanned::new(NodeKind::Map(Vec::new()), unknown, unknown);
        Self { name, text, root, faults: Faults::default(), expansions: BTreeMap::new() }
    }

    pub(super) fn with_root(self, root: SourceNode) -> Self {
        Self { root, ..self }
    }

    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    pub(super) fn root(&self) -> &SourceNode {
        &self.root
    }

    /// Removes a top-level key that has been overridden.
    pub(super) fn remove_overridden_key(&mut self, key: &str) {
        if let NodeKind::Map(entries) = &mut self.root.value {
            entries.retain(|(name, _)| name.value != key);
        }
    }

    /// Returns the node at a path, if the file has it.
    pub(super) fn node(&self, path: &KeyPath) -> Option<&SourceNode> {
        path.0.iter().try_fold(&self.root, |node, step| Some(node.value.child(step)?.0))
    }

    /// Returns the indices in the file of the routes that the configuration has.
    pub(super) fn route_indices(&self) -> Vec<usize> {
        let path = KeyPath::default().key("routes");
        let Some(NodeKind::List(items)) = self.node(&path).map(|node| &node.value) else { return Vec::new() };
        (0..items.len()).filter(|index| !self.faults.skipped.contains(&path.index(*index))).collect()
    }

    /// Returns the text at a path as the file has it, with references to variables.
    pub(super) fn raw_text(&self, path: &KeyPath) -> Option<&str> {
        match &self.node(path)?.value {
            NodeKind::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the position for a path: of a scalar, or of the key of a list or mapping; for a key that the file lacks,
    /// of the nearest parent.
    pub(super) fn position(&self, path: &KeyPath) -> Option<Position> {
        let mut node = &self.root;
        let mut place = None;
        for step in &path.0 {
            let Some((child, key)) = node.value.child(step) else { break };
            place = match child.value {
                NodeKind::Leaf(_) | NodeKind::Text(_) => Some(child.referenced),
                _ => Some(key.unwrap_or(child.referenced)),
            };
            node = child;
        }
        place.and_then(known_position)
    }

    /// Creates a problem with the key at a path.
    pub(super) fn problem(&self, path: &KeyPath, message: impl Into<String>) -> Problem {
        self.problem_at(self.position(path), path, message)
    }

    /// Creates a problem at another position than that of its path.
    pub(super) fn problem_at(
        &self,
        position: Option<Position>,
        path: &KeyPath,
        message: impl Into<String>,
    ) -> Problem {
        let mask = |text: String, expansion: &Expansion| expansion.mask(&text);
        let message = self.expansions.values().fold(message.into(), mask);
        let index = position.and_then(|position| usize::try_from(position.line.checked_sub(1)?).ok());
        Problem {
            file: self.name.to_owned(),
            position,
            key: one_line(&path.to_string()),
            message: one_line(&message),
            line: index.and_then(|index| lines(self.text).nth(index)).map(str::to_owned),
        }
    }
}

/// Splits lines as YAML does: a lone carriage return ends one, too.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'))
}

/// Returns the position, if the parser knows it.
pub(super) fn known_position(location: Location) -> Option<Position> {
    (location.line() > 0).then(|| Position { line: location.line(), column: location.column() })
}

// === impl Faults ===

impl Faults {
    /// Returns whether the value at the path, one that it is part of or a part of it already has a problem.
    pub(super) fn has_problem_at(&self, path: &KeyPath) -> bool {
        [&self.skipped, &self.doubtful].into_iter().any(|faults| {
            let below = faults.range(path..).next().is_some_and(|fault| fault.0.starts_with(&path.0));
            below || (1..path.0.len()).any(|length| faults.contains(&KeyPath(path.0[..length].to_vec())))
        })
    }
}

// === impl KeyPath ===

impl KeyPath {
    pub(super) fn key(&self, name: impl Into<String>) -> Self {
        self.step(PathSegment::Key(name.into()))
    }

    pub(super) fn index(&self, index: usize) -> Self {
        self.step(PathSegment::Index(index))
    }

    pub(super) fn parent(&self) -> Self {
        Self(self.0[..self.0.len().saturating_sub(1)].to_vec())
    }

    fn step(&self, step: PathSegment) -> Self {
        Self(self.0.iter().cloned().chain([step]).collect())
    }

    /// Returns whether the path is that of a route.
    pub(super) fn is_route(&self) -> bool {
        matches!(&self.0[..], [PathSegment::Key(key), PathSegment::Index(_)] if key == "routes")
    }

    pub(super) fn steps(&self) -> &[PathSegment] {
        &self.0
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.0.iter().enumerate() {
            match step {
                PathSegment::Key(name) if number == 0 => f.write_str(name)?,
                PathSegment::Key(name) => write!(f, ".{name}")?,
                PathSegment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

// === impl NodeKind ===

impl NodeKind {
    /// Returns the child, and the position of its key if it has one.
    fn child(&self, step: &PathSegment) -> Option<(&SourceNode, Option<Location>)> {
        match (self, step) {
            (Self::List(items), PathSegment::Index(index)) => Some((items.get(*index)?, None)),
            (Self::Map(entries), PathSegment::Key(name)) => entries
                .iter()
                .find(|(key, _)| key.value == *name)
                .map(|(key, child)| (child, Some(key.referenced))),
            _ => None,
        }
    }
}

impl fmt::Display for NodeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf(text) if text.is_empty() => f.write_str("nothing"),
            Self::Leaf(text) => f.write_str(text),
            Self::Text(text) => {
                // A huge scalar, such as a whole file, must not be repeated in an error.
                const MAX_CHARS: usize = 100;
                match text.char_indices().nth(MAX_CHARS) {
                    Some((end, _)) => write!(f, "\"{}…\"", &text[..end]),
                    None => write!(f, "\"{text}\""),
                }
            }
            Self::List(_) => f.write_str("a list"),
            Self::Map(_) => f.write_str("keys with values"),
        }
    }
}

impl<'de> Deserialize<'de> for NodeKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;

        impl<'de> de::Visitor<'de> for NodeVisitor {
            type Value = NodeKind;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a scalar, a list or a mapping")
            }

            fn visit_unit<E>(self) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(String::new()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_u128<E>(self, value: u128) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf(value.to_string()))
            }

            fn visit_str<E>(self, value: &str) -> Result<NodeKind, E> {
                Ok(NodeKind::Text(value.to_owned()))
            }

            fn visit_bytes<E>(self, _: &[u8]) -> Result<NodeKind, E> {
                Ok(NodeKind::Leaf("binary data".to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut access: A) -> Result<NodeKind, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = access.next_element()? {
                    items.push(item);
                }
                Ok(NodeKind::List(items))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut access: A) -> Result<NodeKind, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = access.next_entry()? {
                    entries.push(entry);
                }
                Ok(NodeKind::Map(entries))
            }
        }

        deserializer.deserialize_any(NodeVisitor)
    }
}
