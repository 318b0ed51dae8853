//! Limit of open files: each connection takes one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Limits;

/// Raises the soft limit of open files to the hard one; the soft default of 1,024 exists for programs that use
/// `select`. Returns the previous soft limit, for child processes; `None` is unlimited.
pub fn raise_file_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, ?current, ?maximum, "cannot raise the limit of open files to its hard limit");
    }
    current
}

/// Lowers the maximum number of connections to the limit of open files, less a reserve for endpoints, the cluster and
/// the admin listener. Warns unless it did so for the same maximum `before`.
pub(super) fn fit(limits: Limits, before: Option<Limits>) -> Limits {
    let Some(files) = getrlimit(Resource::Nofile).current else { return limits };
    let room = files_for_clients(usize::try_from(files).unwrap_or(usize::MAX));
    if room >= limits.max_connections {
        return limits;
    }
    if before.is_none_or(|before| before.max_connections != limits.max_connections) {
        tracing::warn!(
            files,
            max_connections = limits.max_connections,
            connections = room,
            "limits.maxConnections exceeds the limit of open files: raise the latter (ulimit -n, LimitNOFILE=) or lower \
             the former"
        );
    }
    Limits { max_connections: room, ..limits }
}

/// Returns the number of files left for clients.
fn files_for_clients(files: usize) -> usize {
    files.saturating_sub((files / 4).clamp(64, 4096)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_limit_reserves_some_for_other_uses() {
        for (files, clients) in
            [(0, 1), (1, 1), (128, 64), (256, 192), (1024, 768), (20_000, 15_904), (1 << 20, 1_044_480)]
        {
            assert_eq!(files_for_clients(files), clients);
        }
    }

    #[test]
    fn connections_fit_the_file_limit() {
        let Some(files) = getrlimit(Resource::Nofile).current else { return };
        let files = usize::try_from(files).unwrap();
        let fitted =
            |max_connections| fit(Limits { max_connections, ..Limits::default() }, None).max_connections;
        assert_eq!(fitted(1), 1);
        assert_eq!(fitted(usize::MAX), files_for_clients(files));
    }
}
