//! Options of supervisors.

use std::{path::PathBuf, sync::Arc};

use crate::state::{Discovery, NoDiscovery, NoScale, Scale};

/// Options of all supervisors of this process.
#[derive(Clone)]
pub struct Options {
    /// Executable whose `guardian` subcommand starts model servers.
    pub guardian: PathBuf,
    /// Soft limit of open files for model servers; `None` leaves them the limit of this process.
    pub open_files: Option<u64>,
    /// Name that is unique among the running proxies of this machine and the same after a restart. With it, a model server
    /// waits for the one that the previous run of this proxy has left.
    pub instance: Option<Arc<str>>,
    /// Discovery of the targets' pods.
    pub discovery: Arc<dyn Discovery>,
    /// Scale subresource of workloads, for routes with `scaleBy: kubernetes`.
    pub scale: Arc<dyn Scale>,
}

// === impl Options ===

impl Default for Options {
    fn default() -> Self {
        // An upgrade may have replaced the file; the kernel's link leads to the running executable.
        let guardian = if cfg!(target_os = "linux") {
            "/proc/self/exe".into()
        } else {
            std::env::current_exe().unwrap_or_else(|_| "anteroom".into())
        };
        Self {
            guardian,
            open_files: None,
            instance: None,
            discovery: Arc::new(NoDiscovery),
            scale: Arc::new(NoScale),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_guardian_is_the_running_executable() {
        let listed = std::process::Command::new(Options::default().guardian).arg("--list").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.contains("default_guardian_is_the_running_executable"), "{listed}");
    }
}
