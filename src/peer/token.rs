//! The token by which replicas know each other.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Request, Status, metadata::MetadataValue};

/// A token in a file, which is read again for every connection: whoever changes it need not restart us.
pub(super) struct Token {
    path: PathBuf,
    /// As it was when it could last be read, if it could ever be.
    last: Mutex<Option<Arc<str>>>,
    /// When something was last logged of it.
    warned: Mutex<Option<Instant>>,
}

/// How often something is logged of the token, at most.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

// === impl Token ===

impl Token {
    /// The token in this file. As long as there is none, none is asked for, and that is logged.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        let token = Self { path: path.into(), last: Mutex::default(), warned: Mutex::default() };
        token.current();
        token
    }

    /// Shows the token with a call.
    pub(super) fn show<T>(&self, call: &mut Request<T>) {
        let value = self.current().and_then(|token| MetadataValue::try_from(format!("Bearer {token}")).ok());
        if let Some(value) = value {
            call.metadata_mut().insert("authorization", value);
        }
    }

    /// Checks the token that a call shows. One without any is from a replica of the release before, and accepted in this
    /// one, with a warning.
    pub(super) fn check<T>(&self, call: &Request<T>) -> Result<(), Status> {
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
        if is_same(shown, token.as_bytes()) {
            return Ok(());
        }
        Err(Status::unauthenticated(
            "this is not the token in `peers.tokenFile` of the replica that was asked",
        ))
    }

    /// Whether it is time for another warning: strangers cause them.
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
                tracing::warn!(%path, %error, "peers.tokenFile cannot be read: the last token is used, if there was one");
            }
            Err(_) => {}
        }
        last.clone()
    }
}

/// Compares in a time that does not depend on where the two differ.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).fold(0, |differing, (one, other)| differing | (one ^ other)) == 0
}

fn read(path: &PathBuf) -> io::Result<Arc<str>> {
    let text = fs::read_to_string(path)?;
    let token = text.trim();
    let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    is_token
        .then(|| token.into())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no token: one line without spaces"))
}
