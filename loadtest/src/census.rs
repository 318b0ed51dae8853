//! Resources of a process: memory, files, threads, children.

use std::fs;
use std::io;

use serde::Serialize;

use crate::procfs::process_tree;

/// Counts of one process without its descendants, except for `descendants`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ProcessStats {
    pub(crate) rss_kib: u64,
    pub(crate) files: u64,
    pub(crate) threads: u64,
    /// Children, their children, and so on.
    pub(crate) descendants: u64,
}

// === impl ProcessStats ===

impl ProcessStats {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name| number(&status, name).ok_or(io::ErrorKind::InvalidData);
        Ok(Self {
            rss_kib: field("VmRSS:")?,
            threads: field("Threads:")?,
            files: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            descendants: process_tree(pid).len() as u64 - 1,
        })
    }
}

fn number(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_stats_are_above_zero() {
        assert_eq!(number("Name:\tx\nVmRSS:\t  1234 kB\n", "VmRSS:"), Some(1234));
        let ours = ProcessStats::of(std::process::id()).unwrap();
        assert!(ours.rss_kib > 100 && ours.files >= 3 && ours.threads >= 1, "{ours:?}");
    }
}
