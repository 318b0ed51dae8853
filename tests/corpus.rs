//! Checks every input of `fuzz/corpus` for the properties of the fuzz targets, without a fuzzer, so that past
//! findings stay fixed. `fuzz/README.md` explains how to find more.

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

/// Returns the inputs of a property: its corpus and suitable files of the repository.
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

/// A single test, since allocations are counted for the whole process.
#[test]
fn corpus_inputs_satisfy_their_properties() {
    let mut wrong = Vec::new();
    for (name, holds) in properties::PROPERTIES {
        // One-time allocations are not attributed to an input.
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
            // Total allocations, freed or not. The maximum is an alias bomb with 86 MB until it is rejected; a length
            // field taken at face value would cause far more.
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
