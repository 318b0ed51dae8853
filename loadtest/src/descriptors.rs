//! File descriptors: a connection each, so their limit is that of a crowd.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::Error;

/// What both sides need besides the clients' connections: connections to the backend and those that several
/// clients share, files.
const BESIDES: u64 = 768;

/// How many clients with a connection each there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    limit: Option<u64>,
}

// === impl Room ===

impl Room {
    /// Raises the limit of this process, and so of those that it starts, as far as it may.
    pub(crate) fn make() -> Result<Self, Error> {
        let limit = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })
            .map_err(|error| Error::io("raise the limit of open files", error))?;
        Ok(Self { limit })
    }

    /// As many of `wanted` clients as fit, and a note where that is fewer.
    pub(crate) fn fit(self, wanted: usize) -> (usize, Option<String>) {
        let Some(limit) = self.limit else { return (wanted, None) };
        let most = usize::try_from(limit.saturating_sub(BESIDES)).unwrap_or(usize::MAX);
        if wanted <= most {
            return (wanted, None);
        }
        let needed = wanted as u64 + BESIDES;
        let note = format!(
            "{wanted} connections were wanted, and {most} had to do: a process may open {limit} files here, and each \
             connection is one. Run it as root where `ulimit -Hn {needed}` works (containers: `--ulimit \
             nofile={needed}`, systemd: LimitNOFILE={needed})"
        );
        (most, Some(note))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_fit_is_told_of() {
        let room = Room { limit: Some(1768) };
        assert_eq!(room.fit(1000), (1000, None));
        let (most, note) = room.fit(1001);
        assert_eq!(most, 1000);
        assert!(note.unwrap().contains("`ulimit -Hn 1769`"));
        assert_eq!(Room { limit: None }.fit(1 << 20).0, 1 << 20);
    }
}
