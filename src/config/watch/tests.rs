//! Tests with real files and real signals, so in real time. They run one at a time: a SIGHUP reaches every watcher of
//! the process.

use std::os::unix::fs::symlink;

use rustix::process::{Signal, getpid, kill_process};
use tempfile::TempDir;
use tokio::{
    sync::{Mutex, MutexGuard},
    time::timeout,
};

use super::*;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(200);

async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

fn file(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    fs::write(&path, text).unwrap();
    (folder, path)
}

async fn fires(watcher: &mut ConfigWatcher) {
    timeout(LONG, watcher.changed()).await.expect("a change was not noticed");
}

async fn is_silent(watcher: &mut ConfigWatcher) {
    timeout(SHORT, watcher.changed()).await.expect_err("there was no change");
}

#[tokio::test]
async fn write_fires_once_and_the_same_text_never() {
    let _alone = alone().await;
    let (_folder, path) = file("a");
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    is_silent(&mut watcher).await;

    fs::write(&path, "b").unwrap();
    fires(&mut watcher).await;
    assert_eq!(watcher.seen, b"b");
    fs::write(&path, "b").unwrap();
    is_silent(&mut watcher).await;
}

#[tokio::test]
async fn change_between_calls_fires_later() {
    let _alone = alone().await;
    let (_folder, path) = file("a");
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    fs::write(&path, "b").unwrap();
    tokio::time::sleep(SHORT).await;
    fires(&mut watcher).await;
}

#[tokio::test]
async fn rename_over_the_file_fires() {
    let _alone = alone().await;
    let (folder, path) = file("a");
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    for text in ["b", "c"] {
        let new = folder.path().join(".config.yaml.swp");
        fs::write(&new, text).unwrap();
        fs::rename(&new, &path).unwrap();
        fires(&mut watcher).await;
        assert_eq!(watcher.seen, text.as_bytes());
    }
}

#[tokio::test]
async fn missing_file_is_not_a_change() {
    let _alone = alone().await;
    let (_folder, path) = file("a");
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    fs::remove_file(&path).unwrap();
    is_silent(&mut watcher).await;
    fs::write(&path, "").unwrap();
    is_silent(&mut watcher).await;
    fs::write(&path, "b").unwrap();
    fires(&mut watcher).await;
}

/// Updates the file as kubelet does: `config.yaml -> ..data/config.yaml`, `..data -> ..1`, and `..data` is renamed
/// over.
#[tokio::test]
async fn config_map_update_fires() {
    let _alone = alone().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let publish = |version: &str, text: &str| {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("config.yaml"), text).unwrap();
        symlink(version, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    publish("..1", "a");
    symlink("..data/config.yaml", at("config.yaml")).unwrap();

    let mut watcher = ConfigWatcher::new(at("config.yaml")).unwrap();
    is_silent(&mut watcher).await;
    for (version, old, text) in [("..2", "..1", "b"), ("..3", "..2", "c")] {
        publish(version, text);
        fs::remove_dir_all(at(old)).unwrap();
        fires(&mut watcher).await;
        assert_eq!(watcher.seen, text.as_bytes());
    }
}

#[tokio::test]
async fn write_behind_a_symlink_fires() {
    let _alone = alone().await;
    let (_elsewhere, real) = file("a");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("link.yaml");
    symlink(&real, &path).unwrap();
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    fs::write(&real, "b").unwrap();
    fires(&mut watcher).await;
}

#[tokio::test]
async fn sighup_fires_without_a_change() {
    let _alone = alone().await;
    let (_folder, path) = file("a");
    let mut watcher = ConfigWatcher::new(&path).unwrap();
    is_silent(&mut watcher).await;
    for _ in 0..2 {
        kill_process(getpid(), Signal::HUP).unwrap();
        fires(&mut watcher).await;
    }
}

#[tokio::test]
async fn without_the_system_the_file_is_polled() {
    let _alone = alone().await;
    let (_folder, path) = file("a");
    let mut watcher = ConfigWatcher::with(path.clone(), Arc::default(), None, SHORT / 10).unwrap();
    is_silent(&mut watcher).await;
    fs::write(&path, "b").unwrap();
    fires(&mut watcher).await;

    // The folder does not exist and cannot be watched, so the file is polled.
    let watcher = ConfigWatcher::new("/no/such/folder/config.yaml").unwrap();
    assert!(watcher.folders.is_none());
    assert_eq!(watcher.poll.period(), POLL_INTERVAL);
}

#[test]
fn other_files_of_the_directory_do_not_fire() {
    use notify::event::{CreateKind, DataChange, RenameMode};
    let close = EventKind::Access(AccessKind::Close(AccessMode::Write));
    let write = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    assert!(may_change_content(close, true));
    assert!(!may_change_content(close, false) && !may_change_content(write, false));
    assert!(!may_change_content(EventKind::Access(AccessKind::Open(AccessMode::Any)), true));
    assert!(may_change_content(EventKind::Modify(ModifyKind::Name(RenameMode::To)), false));
    assert!(may_change_content(EventKind::Create(CreateKind::Any), false));
}
