//! Memory and file descriptors of a process.

use std::fs;
use std::io;

use serde::Serialize;

/// Memory and descriptors at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Footprint {
    /// Resident memory in bytes, without kernel memory of its connections.
    pub(crate) memory: u64,
    pub(crate) descriptors: u64,
}

// === impl Footprint ===

impl Footprint {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let memory = resident(&rollup).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, descriptors: descriptors(pid)? })
    }
}

/// Returns the number of open file descriptors of a process.
pub(crate) fn descriptors(pid: u32) -> io::Result<u64> {
    let folder = format!("/proc/{pid}/fd");
    // The number of descriptors since Linux 6.2, zero before. Reading the folder is slow if there are many.
    match fs::metadata(&folder)?.len() {
        0 => Ok(fs::read_dir(&folder)?.count() as u64),
        count => Ok(count),
    }
}

/// Returns the resident memory, in bytes, from the text of `smaps_rollup`.
fn resident(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_in_kib() {
        assert_eq!(
            resident("7f00-7fff ---p [rollup]\nRss:                2048 kB\nPss: 1 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(resident("Pss: 1 kB\n"), None);
    }

    #[test]
    fn open_files_are_counted() {
        let before = Footprint::of(std::process::id()).unwrap();
        assert!(before.memory > 0);
        // Other tests open files as well, but none keeps this many open.
        let _files: Vec<_> = (0..500).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        assert!(descriptors(std::process::id()).unwrap() > before.descriptors + 250);
    }
}
