//! Memory available to this process: the smallest limit of its cgroups and of the machine.

use std::{
    fmt, fs,
    path::{Component, Path, PathBuf},
};

/// Available memory and the origin of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Size in bytes.
    pub bytes: usize,
    /// Origin of the limit, for messages.
    pub source: &'static str,
}

const CGROUP: &str = "the memory limit of the cgroup";
const MACHINE: &str = "the memory of the machine";

// === impl MemoryLimit ===

impl MemoryLimit {
    /// Reads the limit of this process; `None` where the system does not expose it, as on macOS.
    pub fn current() -> Option<Self> {
        Self::below(Path::new("/"))
    }

    /// Reads the limit from files below `root`.
    fn below(root: &Path) -> Option<Self> {
        let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| total(&text));
        let machine = machine.map(|bytes| Self { bytes, source: MACHINE });
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let of_groups = groups.lines().flat_map(|line| group_limits(root, line));
        let of_groups = of_groups.map(|bytes| Self { bytes, source: CGROUP });
        // `min_by_key` returns the first minimum: a cgroup as large as the machine sets no limit.
        machine.into_iter().chain(of_groups).min_by_key(|limit| limit.bytes)
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", mebibytes(self.bytes), self.source)
    }
}

/// Parses `MemTotal: 16318480 kB`.
fn total(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Returns the limits for a line of `/proc/self/cgroup` (`0::/a/b` of version 2, `4:memory:/a/b` of version 1), up the
/// hierarchy. In a container the path may be that of the host, of which only the root is mounted.
fn group_limits(root: &Path, line: &str) -> Vec<usize> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return Vec::new() };
    let (mounts, file): (&[&str], _) = match controllers {
        "" => (&["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max"),
        _ if controllers.split(',').any(|name| name == "memory") => {
            (&["sys/fs/cgroup/memory"], "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let names = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
    let group: PathBuf = names.collect();
    let folders =
        mounts.iter().flat_map(|mount| group.ancestors().map(move |group| root.join(mount).join(group)));
    // Unlimited is `max` in version 2 and a huge number in version 1.
    folders.filter_map(|folder| fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()).collect()
}

/// Formats bytes as MiB, rounded up.
pub(super) fn mebibytes(bytes: usize) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the limit that these files set.
    fn found(files: &[(&str, &str)]) -> Option<(usize, &'static str)> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        MemoryLimit::below(root.path()).map(|limit| (limit.bytes >> 20, limit.source))
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:        2097152 kB\nMemFree:         1 kB\n");
    const UNLIMITED: &str = "9223372036854771712\n";

    #[test]
    fn smallest_limit_up_the_hierarchy_counts() {
        let v2 = ("proc/self/cgroup", "0::/pods/one\n");
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[MEMINFO]), Some((2048, MACHINE)));
        assert_eq!(found(&[MEMINFO, v2]), Some((2048, MACHINE)));
        let max = ("sys/fs/cgroup/pods/one/memory.max", "max\n");
        assert_eq!(found(&[MEMINFO, v2, max]), Some((2048, MACHINE)));
        let of_parent = ("sys/fs/cgroup/pods/memory.max", "1073741824\n");
        assert_eq!(found(&[MEMINFO, v2, max, of_parent]), Some((1024, CGROUP)));
        let own = ("sys/fs/cgroup/pods/one/memory.max", "536870912\n");
        assert_eq!(found(&[MEMINFO, v2, own, of_parent]), Some((512, CGROUP)));
        // A container sees its own group as the root.
        let root = ("sys/fs/cgroup/memory.max", "268435456\n");
        assert_eq!(found(&[MEMINFO, ("proc/self/cgroup", "0::/\n"), root]), Some((256, CGROUP)));
        assert_eq!(found(&[MEMINFO, ("proc/self/cgroup", "0::/../other\n"), root]), Some((256, CGROUP)));
    }

    #[test]
    fn limits_of_version_1_count() {
        let v1 =
            ("proc/self/cgroup", "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/x:y\n0::/\n");
        let unlimited = ("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED);
        assert_eq!(found(&[MEMINFO, v1, unlimited]), Some((2048, MACHINE)));
        let limited = ("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", "1073741824\n");
        assert_eq!(found(&[MEMINFO, v1, unlimited, limited]), Some((1024, CGROUP)));
        // Only the root of the host's path is mounted.
        let mounted = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912\n");
        assert_eq!(found(&[MEMINFO, v1, mounted]), Some((512, CGROUP)));
    }
}
