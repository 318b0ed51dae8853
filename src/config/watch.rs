//! Detects changes of the file, and SIGHUP.

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

/// Polling interval if file notifications are unavailable.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Polling interval with file notifications, which some file systems accept but never send.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);

/// Watches the file for reloads. Only its content counts: several events of an editor are one change, and rewriting the
/// same text is none.
///
/// Create it *before* loading the file, so that no change in between is missed.
pub struct ConfigWatcher {
    path: PathBuf,
    /// Content at the last check.
    seen: Vec<u8>,
    sighup: Signal,
    changes: Arc<Notify>,
    folders: Option<DirectoryWatches>,
    poll: Interval,
}

/// Watches of directories rather than the file, which is replaced by a rename or reached through a symlink. For a
/// ConfigMap, `config.yaml -> ..data/config.yaml` with `..data -> ..2026_01_01`, and `..data` changes.
struct DirectoryWatches {
    watcher: RecommendedWatcher,
    /// Directory of the path as given.
    named: PathBuf,
    /// Directory of the resolved path, if it differs.
    real: Option<PathBuf>,
}

// === impl ConfigWatcher ===

impl ConfigWatcher {
    /// Starts watching; needs a runtime. From now on SIGHUP reloads instead of ending the process.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let changes = Arc::new(Notify::new());
        let folders = DirectoryWatches::new(&path, &changes).inspect_err(|error| {
            warn!(path = %path.display(), %error, "cannot watch the configuration; polling it every 2 s");
        });
        let period = if folders.is_ok() { REPAIR_INTERVAL } else { POLL_INTERVAL };
        Self::with(path, changes, folders.ok(), period)
    }

    fn with(
        path: PathBuf,
        changes: Arc<Notify>,
        folders: Option<DirectoryWatches>,
        period: Duration,
    ) -> io::Result<Self> {
        let mut poll = interval(period);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let hangup = signal(SignalKind::hangup())?;
        let seen = fs::read(&path).unwrap_or_default();
        Ok(Self { path, seen, sighup: hangup, changes, folders, poll })
    }

    /// Waits for a change of content, which is returned, or for SIGHUP, which returns `None` if the content is
    /// unchanged.
    ///
    /// Use the returned content: the file may have changed again, or be half-written. Cancel-safe: nothing is awaited
    /// between a notification and the read.
    pub async fn changed(&mut self) -> Option<&[u8]> {
        loop {
            tokio::select! {
                // SIGHUP first: a change noticed together with it must not be reported twice.
                biased;
                Some(()) = self.sighup.recv() => {
                    return self.read_if_changed().then_some(&self.seen);
                }
                () = self.changes.notified() => {}
                _ = self.poll.tick() => {}
            }
            if self.read_if_changed() {
                return Some(&self.seen);
            }
        }
    }

    /// Reads the file and returns whether its content is new. A missing or empty file is about to be written, and is
    /// read again then.
    fn read_if_changed(&mut self) -> bool {
        if let Some(folders) = &mut self.folders {
            // The watches follow symlinks before the read, so that a later change triggers an event in the right
            // directory.
            folders.follow_symlinks(&self.path);
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

// === impl DirectoryWatches ===

impl DirectoryWatches {
    fn new(path: &Path, changes: &Arc<Notify>) -> notify::Result<Self> {
        let changes = Arc::clone(changes);
        let name = path.file_name().map(ToOwned::to_owned);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error may be an overflow of events, so check the file.
            let relevant = event.map_or(true, |event| {
                let own = event.paths.iter().any(|path| path.file_name() == name.as_deref());
                may_change_content(event.kind, own)
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
        folders.follow_symlinks(path);
        Ok(folders)
    }

    /// Watches the directory of the resolved path, after each change of a symlink.
    fn follow_symlinks(&mut self, path: &Path) {
        let folder = |path: &Path| Some(path.canonicalize().ok()?.parent()?.to_owned());
        let real = folder(path).filter(|real| self.named.canonicalize().ok().as_ref() != Some(real));
        if real == self.real {
            return;
        }
        if let Some(old) = self.real.take() {
            // `unwatch` fails if the directory and its watch are gone, which is normal.
            let _ = self.watcher.unwatch(&old);
        }
        self.real = real.filter(|real| self.watcher.watch(real, RecursiveMode::NonRecursive).is_ok());
    }
}

/// Returns whether an event may mean new content: any rename, since it may replace a symlink, and writes to the file
/// itself, so that a log file in the directory does not count. Our own reads cause events, too.
fn may_change_content(kind: EventKind, own: bool) -> bool {
    match kind {
        EventKind::Access(kind) => own && kind == AccessKind::Close(AccessMode::Write),
        // Linux reports the end of a write; until then the content is incomplete.
        EventKind::Modify(ModifyKind::Data(_)) => own && !cfg!(target_os = "linux"),
        EventKind::Modify(ModifyKind::Metadata(_)) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
