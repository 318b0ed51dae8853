//! How many files may be open: each connection is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Limits;

/// Raises the soft limit of open files to the hard one: the soft limit is an old default of shells, for programs that
/// count in 1,024. Returns the soft limit as it was, for the processes that we start; `None` is unlimited.
pub fn raise_file_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, ?current, ?maximum, "the number of open files cannot be raised to its hard limit");
    }
    current
}

/// No more connections than there can be files, less those that are needed to serve them: to endpoints, to the cluster,
/// for whoever looks at the metrics.
pub(super) fn fit(limits: Limits) -> Limits {
    let Some(files) = getrlimit(Resource::Nofile).current else { return limits };
    let room = room(usize::try_from(files).unwrap_or(usize::MAX));
    if room >= limits.max_connections {
        return limits;
    }
    tracing::warn!(
        files,
        max_connections = limits.max_connections,
        connections = room,
        "limits.maxConnections is more than the open files that this process may have: raise those (ulimit -n, \
         LimitNOFILE=), or lower the limit"
    );
    Limits { max_connections: room, ..limits }
}

/// What is left for clients of so many files.
fn room(files: usize) -> usize {
    files.saturating_sub((files / 4).clamp(64, 4096)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_files_are_kept_for_what_is_no_client() {
        for (files, clients) in
            [(0, 1), (1, 1), (128, 64), (256, 192), (1024, 768), (20_000, 15_904), (1 << 20, 1_044_480)]
        {
            assert_eq!(room(files), clients);
        }
    }

    #[test]
    fn connections_fit_into_the_files_there_are() {
        let Some(files) = getrlimit(Resource::Nofile).current else { return };
        let files = usize::try_from(files).unwrap();
        let fitted = |max_connections| fit(Limits { max_connections, ..Limits::default() }).max_connections;
        assert_eq!(fitted(1), 1);
        assert_eq!(fitted(usize::MAX), room(files));
    }
}
