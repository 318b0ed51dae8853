//! Token by which replicas authenticate to each other.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Request, Status, metadata::MetadataValue};

/// A token in a file, which is read again for every connection, so that a change needs no restart.
pub(super) struct TokenFile {
    path: PathBuf,
    /// Token as of the last successful read.
    last: Mutex<Option<Arc<str>>>,
    /// Time of the last warning.
    warned: Mutex<Option<Instant>>,
}

/// Minimum interval between warnings about the token.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

// === impl TokenFile ===

impl TokenFile {
    /// Creates a token from a file. While the file has never been readable, no token is required, and that is logged.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        let token = Self { path: path.into(), last: Mutex::default(), warned: Mutex::default() };
        token.current();
        token
    }

    /// Adds the token to a call.
    pub(super) fn attach_token<T>(&self, call: &mut Request<T>) {
        let value = self.current().and_then(|token| MetadataValue::try_from(format!("Bearer {token}")).ok());
        if let Some(value) = value {
            call.metadata_mut().insert("authorization", value);
        }
    }

    /// Checks the token of a call. A call without a token comes from a replica of the previous release, and is
    /// accepted in this release, with a warning.
    pub(super) fn authenticate_call<T>(&self, call: &Request<T>) -> Result<(), Status> {
        let Some(token) = self.current() else { return Ok(()) };
        let Some(shown) = call.metadata().get("authorization") else {
            if self.may_warn() {
                tracing::warn!(
                    "a replica shows no token: it is accepted in this release, and will be refused in the next; give every \
                     replica the same `peers.tokenFile`"
                );
            }
            return Ok(());
        };
        let shown = shown.as_bytes().strip_prefix(b"Bearer ").unwrap_or_default();
        if equal_in_constant_time(shown, token.as_bytes()) {
            return Ok(());
        }
        Err(Status::unauthenticated(
            "this is not the token in `peers.tokenFile` of the replica that was asked",
        ))
    }

    /// Returns `true` if another warning may be logged. The rate is limited, since unauthenticated callers can cause
    /// warnings.
    fn may_warn(&self) -> bool {
        let mut warned = self.warned.lock();
        let may = warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL);
        if may {
            *warned = Some(Instant::now());
        }
        may
    }

    fn current(&self) -> Option<Arc<str>> {
        let mut last = self.last.lock();
        match read(&self.path) {
            Ok(token) => *last = Some(token),
            Err(error) if self.may_warn() => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "cannot read peers.tokenFile; using the last token, if any");
            }
            Err(_) => {}
        }
        last.clone()
    }
}

/// Compares in a time independent of the position of the first difference.
fn equal_in_constant_time(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).fold(0, |differing, (one, other)| differing | (one ^ other)) == 0
}

fn read(path: &PathBuf) -> io::Result<Arc<str>> {
    let text = fs::read_to_string(path)?;
    let token = text.trim();
    let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    is_token.then(|| token.into()).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "no token in it; write the token as one line without spaces",
        )
    })
}
