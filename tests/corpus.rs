//! Every input of `fuzz/corpus`, held against what must hold for any: what fuzzing has found stays found, with nothing
//! but Rust. How to look for more: `fuzz/README.md`.

#![allow(clippy::unwrap_used)]

#[path = "../fuzz/src/lib.rs"]
mod properties;

use std::{
    alloc::System,
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

/// What a property is held against: its corpus, and what there is anyway.
fn inputs(name: &str) -> Vec<PathBuf> {
    let mut folders = vec![fuzz().join("corpus").join(name)];
    if name == "config" {
        folders.extend(
            ["../docs", "../tests/config/good", "../tests/config/bad"].map(|folder| fuzz().join(folder)),
        );
    }
    let files = |folder: PathBuf| {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file())
    };
    folders.into_iter().flat_map(files).collect()
}

/// One test, since it is the whole process that is counted.
#[test]
fn what_must_hold_does_for_every_input_of_the_corpus() {
    let mut wrong = Vec::new();
    for (name, holds) in properties::PROPERTIES {
        // What is made once is no input's.
        holds(b"");
        let inputs = inputs(name);
        assert!(inputs.len() > 5, "{name}: hardly a corpus");
        for path in inputs {
            let input = fs::read(&path).unwrap();
            let region = Region::new(ALLOCATOR);
            if catch_unwind(AssertUnwindSafe(|| holds(&input))).is_err() {
                wrong.push(format!("{}: see above", path.display()));
            }
            let taken = region.change().bytes_allocated;
            // All in all, freed or not. An alias bomb takes the most, 86 MB until it is given up; what a length field can
            // ask for is far beyond.
            if taken > 128 << 20 {
                wrong.push(format!("{}: {taken} bytes allocated for {}", path.display(), input.len()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_property_has_a_target_and_a_corpus() {
    let properties: BTreeSet<_> = properties::PROPERTIES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz().join("corpus")), properties);
    assert_eq!(names(&fuzz().join("targets")), properties);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in properties {
        assert!(
            manifest.contains(&format!("path = \"targets/{name}.rs\"")),
            "{name} is not in fuzz/Cargo.toml"
        );
    }
}
