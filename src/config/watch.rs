//! Tells when the file has changed, or somebody says so with SIGHUP.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
    time::{Interval, MissedTickBehavior, interval},
};
use tracing::warn;

/// How often the file is read where the system does not tell.
const POLL: Duration = Duration::from_secs(2);
/// How often it is read where the system does: some file systems only say that they do.
const REPAIR: Duration = Duration::from_secs(30);

/// Watches the file for reloads. What counts is its content: an editor's several events are one change, and a write
/// of the same text is none.
///
/// Create it *before* the file is loaded, or a change in between is missed.
pub struct ConfigWatcher {
    path: PathBuf,
    /// What the file said when it was last looked at.
    seen: Vec<u8>,
    hangup: Signal,
    changes: Arc<Notify>,
    folders: Option<Folders>,
    poll: Interval,
}

/// The folders, not the file: it is replaced by a rename, or reached through a symlink that is. A ConfigMap's is
/// `config.yaml -> ..data/config.yaml` with `..data -> ..2026_01_01`, and `..data` is what changes.
struct Folders {
    watcher: RecommendedWatcher,
    /// The folder of the file as it is named.
    named: PathBuf,
    /// The folder where it really is, if that is another.
    real: Option<PathBuf>,
}

// === impl ConfigWatcher ===

impl ConfigWatcher {
    /// Starts to watch, within a runtime. From here on SIGHUP reloads, instead of ending the process.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let changes = Arc::new(Notify::new());
        let folders = Folders::new(&path, &changes).inspect_err(|error| {
            warn!(path = %path.display(), %error, "cannot watch the configuration; reading it every 2 s instead");
        });
        let period = if folders.is_ok() { REPAIR } else { POLL };
        Self::with(path, changes, folders.ok(), period)
    }

    fn with(
        path: PathBuf,
        changes: Arc<Notify>,
        folders: Option<Folders>,
        period: Duration,
    ) -> io::Result<Self> {
        let mut poll = interval(period);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let hangup = signal(SignalKind::hangup())?;
        let seen = fs::read(&path).unwrap_or_default();
        Ok(Self { path, seen, hangup, changes, folders, poll })
    }

    /// Waits until the content has changed, which is returned, or for SIGHUP, which counts even if nothing has.
    ///
    /// Who reads the file again may find another content, half of it, or none, and what has been seen here is not told a
    /// second time. Cancel-safe: nothing is awaited between a notice and the look at the file.
    pub async fn changed(&mut self) -> Option<&[u8]> {
        loop {
            tokio::select! {
                // Biased, as a SIGHUP is an order: a change noticed along with it is not to be told a second time.
                biased;
                Some(()) = self.hangup.recv() => {
                    return self.look().then_some(&self.seen);
                }
                () = self.changes.notified() => {}
                _ = self.poll.tick() => {}
            }
            if self.look() {
                return Some(&self.seen);
            }
        }
    }

    /// Whether the content is new. A file that is missing or empty is about to be written, and will be seen then.
    fn look(&mut self) -> bool {
        if let Some(folders) = &mut self.folders {
            // Before the read: what changes after it is noticed in the folder that it changes in.
            folders.follow(&self.path);
        }
        match fs::read(&self.path) {
            Ok(content) if !content.is_empty() && content != self.seen => {
                self.seen = content;
                true
            }
            _ => false,
        }
    }
}

// === impl Folders ===

impl Folders {
    fn new(path: &Path, changes: &Arc<Notify>) -> notify::Result<Self> {
        let changes = Arc::clone(changes);
        let name = path.file_name().map(ToOwned::to_owned);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error may be an overflow of events: look, rather than miss one.
            let relevant = event.map_or(true, |event| {
                let own = event.paths.iter().any(|path| path.file_name() == name.as_deref());
                concerns(event.kind, own)
            });
            if relevant {
                changes.notify_one();
            }
        })?;
        let named = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        watcher.watch(&named, RecursiveMode::NonRecursive)?;
        let mut folders = Self { watcher, named, real: None };
        folders.follow(path);
        Ok(folders)
    }

    /// Watches the folder where the file really is, after each change of a symlink on the way.
    fn follow(&mut self, path: &Path) {
        let folder = |path: &Path| Some(path.canonicalize().ok()?.parent()?.to_owned());
        let real = folder(path).filter(|real| self.named.canonicalize().ok().as_ref() != Some(real));
        if real == self.real {
            return;
        }
        if let Some(old) = self.real.take() {
            // Most often it is gone, and its watch with it.
            let _ = self.watcher.unwatch(&old);
        }
        self.real = real.filter(|real| self.watcher.watch(real, RecursiveMode::NonRecursive).is_ok());
    }
}

/// Whether an event can mean a new content: any change of a name, as symlinks may have any; writes only to the file
/// itself, so that a log in the same folder costs nothing. Our own reads are events too.
fn concerns(kind: EventKind, own: bool) -> bool {
    match kind {
        EventKind::Access(kind) => own && kind == AccessKind::Close(AccessMode::Write),
        // Linux tells the end of a write too, and until then the content is half of it.
        EventKind::Modify(ModifyKind::Data(_)) => own && !cfg!(target_os = "linux"),
        EventKind::Modify(ModifyKind::Metadata(_)) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
