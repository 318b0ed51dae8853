//! `.ci/dist` and `.ci/release`, with [`RECORD`] instead of the programs that publish.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

use super::in_tree;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const RECORD: &str = "tests/deploy/record";

/// Packs a file as if it were the binary.
fn pack(folder: &Path) {
    let mut command = Command::new("bash");
    command.arg(in_tree(".ci/dist")).arg("--pack").arg(in_tree(RECORD)).arg(folder);
    let output = command.env("SOURCE_DATE_EPOCH", "1700000000").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn dist_packs_reproducibly_with_sums() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    pack(&first);
    pack(&second);
    let name = format!("anteroom-{VERSION}-{}-linux", std::env::consts::ARCH);
    let archive = first.join(format!("{name}.tar.gz"));
    assert_eq!(fs::read(&archive).unwrap(), fs::read(second.join(archive.file_name().unwrap())).unwrap());
    run(Command::new("sha256sum").arg("-c").arg(format!("{name}.sha256")).current_dir(&first));

    run(Command::new("tar").arg("-xzf").arg(&archive).current_dir(&first));
    for (packed, source) in [
        ("anteroom", RECORD),
        ("LICENSE", "LICENSE"),
        ("README.md", "README.md"),
        ("example.yaml", "docs/example.yaml"),
        ("anteroom.service", "deploy/systemd/anteroom.service"),
    ] {
        let packed = fs::read(first.join(&name).join(packed)).unwrap();
        assert_eq!(packed, fs::read(in_tree(source)).unwrap(), "{source}");
    }
    assert_eq!(fs::read_dir(first.join(&name)).unwrap().count(), 5);
}

/// A copy of the tree with what the steps of a release read, and a folder with the recording programs.
struct Release {
    folder: TempDir,
}

impl Release {
    fn new(changelog: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for part in [".ci", "bin", "deploy/chart/anteroom"] {
            fs::create_dir_all(root.join(part)).unwrap();
        }
        for file in [".ci/release", "Cargo.toml", "deploy/chart/anteroom/values.yaml"] {
            fs::copy(in_tree(file), root.join(file)).unwrap();
        }
        fs::write(root.join("CHANGELOG.md"), changelog).unwrap();
        for program in ["docker", "git", "gh", "helm"] {
            symlink(in_tree(RECORD), root.join("bin").join(program)).unwrap();
        }
        Self { folder }
    }

    fn step(&self, arguments: &[&str], tag: &str) -> Output {
        let root = self.folder.path();
        let path = format!("{}:{}", root.join("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("bash");
        command.arg(root.join(".ci/release")).args(arguments).stdin(Stdio::null());
        command.env("PATH", path).env("RECORD", root.join("record")).env("TAG", tag);
        command
            .env("REGISTRY", "ghcr.io/Some-Owner")
            .env("REGISTRY_USER", "user")
            .env("REGISTRY_TOKEN", "secret");
        command.output().unwrap()
    }

    /// Runs a step that must succeed, and returns its output and the command lines that it ran.
    fn recorded(&self, arguments: &[&str], tag: &str) -> (String, String) {
        let record = self.folder.path().join("record");
        let _ = fs::remove_file(&record);
        let output = self.step(arguments, tag);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        (String::from_utf8(output.stdout).unwrap(), fs::read_to_string(record).unwrap_or_default())
    }
}

#[test]
fn release_needs_the_version_and_its_changes() {
    let tag = format!("v{VERSION}");
    let dated = Release::new(&format!(
        "# Changelog\n\n## {VERSION} - 2026-12-01\n\n- A key.\n\n## 0.0.1\n\n- Old.\n"
    ));
    dated.recorded(&["check"], &tag);
    for (release, tag, message) in [
        (&dated, "v99.0.0", "Cargo.toml needs"),
        (&dated, "", "Cargo.toml needs"),
        (
            &Release::new("# Changelog\n\n## Unreleased\n\n- A key.\n"),
            tag.as_str(),
            "CHANGELOG.md has no section",
        ),
        (
            &Release::new(&format!("## {VERSION}\n\n## 0.0.1\n\n- Old.\n")),
            tag.as_str(),
            "CHANGELOG.md has no section",
        ),
        (
            &Release::new(&format!("## {VERSION}0\n\n- Another.\n")),
            tag.as_str(),
            "CHANGELOG.md has no section",
        ),
    ] {
        let output = release.step(&["check"], tag);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(message), "{tag}: {error}");
    }
}

#[test]
fn release_pushes_one_image_for_all_machines() {
    let (release, tag) = (Release::new(""), format!("v{VERSION}"));
    let image = format!("ghcr.io/some-owner/anteroom:{VERSION}");
    let (_, ran) = release.recorded(&["image"], &tag);
    assert!(ran.contains("docker login ghcr.io --username user --password-stdin\nsecret"), "{ran}");
    for part in [
        "docker buildx build --file deploy/Dockerfile",
        &format!("--build-arg VERSION={VERSION} --build-arg REVISION=0123abc"),
        "--sbom=true --provenance=mode=max",
        &format!("--tag {image}-{} --push .\n", std::env::consts::ARCH),
    ] {
        assert!(ran.contains(part), "{part} in {ran}");
    }
    let (printed, ran) = release.recorded(&["manifest"], &tag);
    assert!(printed.starts_with("name=ghcr.io/some-owner/anteroom\n"), "{printed}");
    let joined = format!("docker buildx imagetools create --tag {image} {image}-x86_64 {image}-aarch64\n");
    assert!(ran.contains(&joined), "{ran}");
    assert!(ran.contains(&format!("docker buildx imagetools inspect {image} --format digest=")), "{ran}");
}

#[test]
fn released_chart_uses_the_released_image() {
    let release = Release::new("");
    let (_, ran) = release.recorded(&["chart", "."], &format!("v{VERSION}"));
    assert!(ran.contains("  repository: ghcr.io/some-owner/anteroom\n  tag: \"\""), "{ran}");
    assert!(!ran.contains("No image is published"), "{ran}");
    assert!(ran.contains("helm registry login ghcr.io --username user --password-stdin\nsecret"), "{ran}");
    assert!(
        ran.contains(&format!("helm push ./anteroom-{VERSION}.tgz oci://ghcr.io/some-owner/charts\n")),
        "{ran}"
    );
    let sums = format!("anteroom-{VERSION}.tgz.sha256");
    run(Command::new("sha256sum").arg("-c").arg(sums).current_dir(release.folder.path()));
}

#[test]
fn release_has_its_notes_and_files() {
    let release = Release::new(
        "# Changelog\n\n## 1.2.3\n\n- A key.\n\n## 1.2.3-rc.1 - 2026-12-01\n\n- Another.\n\n## 0.0.1\n",
    );
    fs::create_dir(release.folder.path().join("dist")).unwrap();
    for file in ["dist/a.tar.gz", "dist/a.sha256"] {
        fs::write(release.folder.path().join(file), "").unwrap();
    }
    let (_, ran) = release.recorded(&["publish", "dist"], "v1.2.3");
    let expected = "gh release create v1.2.3 --verify-tag --title 1.2.3 --notes-file - dist/a.sha256 dist/a.tar.gz\n\n- A key.\n\n";
    assert_eq!(ran, expected);
    let (_, ran) = release.recorded(&["publish", "dist"], "v1.2.3-rc.1");
    assert!(
        ran.contains("--notes-file - --prerelease dist/a.sha256") && ran.ends_with("- Another.\n\n"),
        "{ran}"
    );
}
