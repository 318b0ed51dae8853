//! File descriptors. A connection takes one, so their limit bounds the size of a crowd.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::LoadtestError;

/// Maximum descriptors that Anteroom reserves; with a low limit, it reserves a quarter of that limit.
const MAX_RESERVED_DESCRIPTORS: u64 = 4096;
/// Descriptors for connections shared by several clients and for other files of the load test.
const OTHER_DESCRIPTORS: u64 = 512;

/// Limit on the number of clients with a connection each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClientLimit {
    limit: Option<u64>,
}

// === impl ClientLimit ===

impl ClientLimit {
    /// Raises the limit of this process, and so of the processes it starts, to the maximum allowed.
    pub(crate) fn from_raised_limit() -> Result<Self, LoadtestError> {
        let limit = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })
            .map_err(|error| LoadtestError::io("raise the limit of open files", error))?;
        Ok(Self { limit })
    }

    /// Returns the number of clients that fit, at most `wanted`, and a note if that is fewer.
    pub(crate) fn fit(self, wanted: usize) -> (usize, Option<String>) {
        let Some(limit) = self.limit else { return (wanted, None) };
        let besides = MAX_RESERVED_DESCRIPTORS.min(limit / 4) + OTHER_DESCRIPTORS;
        let most = usize::try_from(limit.saturating_sub(besides)).unwrap_or(usize::MAX);
        if wanted <= most {
            return (wanted, None);
        }
        let needed = wanted as u64 + MAX_RESERVED_DESCRIPTORS + OTHER_DESCRIPTORS;
        let note = format!(
            "{wanted} connections were wanted, and {most} had to do: a process may open {limit} files here, each \
             connection is one, and Anteroom keeps some of them for what is no client. Run it as root where `ulimit -Hn {needed}` works (containers: `--ulimit \
             nofile={needed}`, systemd: LimitNOFILE={needed})"
        );
        (most, Some(note))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_shortage_is_reported() {
        let room = ClientLimit { limit: Some(20_000) };
        assert_eq!(room.fit(15_392), (15_392, None));
        let (most, note) = room.fit(50_000);
        assert_eq!(most, 15_392);
        assert!(note.unwrap().contains("`ulimit -Hn 54608`"));
        assert_eq!(
            ClientLimit { limit: Some(1024) }.fit(1000).0,
            256,
            "where there are few, a quarter is kept"
        );
        assert_eq!(ClientLimit { limit: None }.fit(1 << 20).0, 1 << 20);
    }
}
