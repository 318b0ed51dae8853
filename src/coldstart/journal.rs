//! Journal of cold starts: JSON lines in rotated files, written as cold starts end and read at the start of the process.
//!
//! A record whose counts changed after it was written is appended again; of lines with the same id the last one counts.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::FlockOperation;
use thiserror::Error;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use super::{ColdStart, ColdStarts};

/// The journal's folder, locked by this process.
pub struct Journal {
    dir: PathBuf,
    max_bytes: u64,
    files: usize,
    file: File,
    size: u64,
    /// The newest records, as last written.
    written: BTreeMap<u64, ColdStart>,
    /// Held until the journal is dropped.
    #[expect(dead_code, reason = "closing it releases the lock")]
    lock: File,
}

/// An unusable journal folder.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "documented by the error text")]
pub enum JournalError {
    #[error("cannot use report.dir `{}`: {source}; give a folder that this process may write to", dir.display())]
    Unusable { dir: PathBuf, source: io::Error },
    #[error("report.dir `{}` is in use by another process; give each its own folder", .0.display())]
    Taken(PathBuf),
}

/// Interval at which changed counts are written.
const COUNTS_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum length of a line read, in bytes: far more than a record with its last lines of output.
const MAX_RECORD_LINE_BYTES: u64 = 1 << 20;

// === impl Journal ===

impl Journal {
    /// Opens the folder and reads the newest records, oldest first. An invalid line is logged and skipped.
    ///
    /// # Errors
    /// If the folder cannot be created, read or written, or is locked by another process.
    pub fn open(dir: &Path, max_bytes: usize, files: usize) -> Result<(Self, Vec<ColdStart>), JournalError> {
        let unusable = |source| JournalError::Unusable { dir: dir.into(), source };
        fs::create_dir_all(dir).map_err(unusable)?;
        let lock = OpenOptions::new().create(true).append(true).open(dir.join("lock")).map_err(unusable)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => JournalError::Taken(dir.into()),
            error => unusable(error.into()),
        })?;
        let mut records = BTreeMap::new();
        for number in (0..files).rev() {
            read(&path(dir, number), &mut records).map_err(unusable)?;
            while records.len() > ColdStarts::MAX_RECORDS {
                records.pop_first();
            }
        }
        let (file, size) = open(&path(dir, 0)).map_err(unusable)?;
        let found = records.values().cloned().collect();
        let max_bytes = max_bytes as u64;
        let journal = Self { dir: dir.into(), max_bytes, files, file, size, written: records, lock };
        Ok((journal, found))
    }

    /// Writes new and changed records of `store` until `stop`, and a last time after that.
    pub async fn run(self, store: Arc<ColdStarts>, stop: CancellationToken) {
        let mut changed = store.changed();
        let mut ticks = interval(COUNTS_INTERVAL);
        let mut journal = self;
        let mut is_failing = false;
        loop {
            let is_last = tokio::select! {
                biased; // the last pass writes all that is pending
                Ok(()) = changed.changed() => false,
                _ = ticks.tick() => false,
                () = stop.cancelled() => true,
            };
            let mut news = store.recent(None, ColdStarts::MAX_RECORDS);
            news.retain(|record| journal.written.get(&record.id) != Some(record));
            if !news.is_empty() {
                news.reverse();
                let done = tokio::task::spawn_blocking(move || {
                    let result = news.into_iter().try_for_each(|record| journal.keep(record));
                    (journal, result)
                });
                // Fails only if the task panicked.
                let Ok((ours, result)) = done.await else { return };
                journal = ours;
                let dir = journal.dir.display();
                match result {
                    Ok(()) if std::mem::take(&mut is_failing) => {
                        tracing::info!(%dir, "writing the cold-start journal works again");
                    }
                    Err(error) if !std::mem::replace(&mut is_failing, true) => {
                        tracing::warn!(%dir, %error, again_in = ?COUNTS_INTERVAL, "cannot write the cold-start journal; retrying");
                    }
                    _ => {}
                }
            }
            if is_last {
                return;
            }
        }
    }

    /// Writes a record and remembers it as written.
    fn keep(&mut self, record: ColdStart) -> io::Result<()> {
        self.write(&record)?;
        self.written.insert(record.id, record);
        while self.written.len() > 2 * ColdStarts::MAX_RECORDS {
            self.written.pop_first();
        }
        Ok(())
    }

    /// Appends a line, to a new file if this one is full.
    fn write(&mut self, record: &ColdStart) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if self.size > 0 && self.size + line.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        let written = self.file.write_all(&line);
        match written {
            Ok(()) => self.size += line.len() as u64,
            // A partial line would corrupt the next one.
            Err(_) => self.file.set_len(self.size)?,
        }
        written
    }

    /// Renames every file to the next number and removes the oldest.
    fn rotate(&mut self) -> io::Result<()> {
        for number in (0..self.files).rev() {
            let from = path(&self.dir, number);
            let moved = if number + 1 == self.files {
                fs::remove_file(&from)
            } else {
                fs::rename(&from, path(&self.dir, number + 1))
            };
            match moved {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        (self.file, self.size) = open(&path(&self.dir, 0))?;
        Ok(())
    }
}

/// Returns the path of a file; 0 is the newest.
fn path(dir: &Path, number: usize) -> PathBuf {
    match number {
        0 => dir.join("cold-starts.jsonl"),
        number => dir.join(format!("cold-starts.{number}.jsonl")),
    }
}

/// Opens a file for appending, and terminates a last line that was cut off.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    let mut size = file.metadata()?.len();
    if size > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
            size += 1;
        }
    }
    Ok((file, size))
}

fn read(path: &Path, records: &mut BTreeMap<u64, ColdStart>) -> io::Result<()> {
    let mut reader = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.by_ref().take(MAX_RECORD_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        match serde_json::from_slice::<ColdStart>(&line) {
            Ok(record) => {
                records.insert(record.id, record);
            }
            Err(_) if line.trim_ascii().is_empty() => {}
            Err(error) => {
                tracing::warn!(file = %path.display(), line = number, %error, "invalid record of a cold start; skipped");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u64) -> ColdStart {
        ColdStart { id, route: "tiny".into(), total_ms: 1.5, ..ColdStart::default() }
    }

    fn ids(records: &[ColdStart]) -> Vec<u64> {
        records.iter().map(|record| record.id).collect()
    }

    #[test]
    fn records_survive_reopening_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let length = serde_json::to_vec(&record(10)).unwrap().len() + 1;
        let (mut journal, found) = Journal::open(dir.path(), 3 * length, 3).unwrap();
        assert!(found.is_empty());
        (10..31).for_each(|id| journal.write(&record(id)).unwrap());
        assert!(matches!(Journal::open(dir.path(), 100, 3), Err(JournalError::Taken(_))));
        drop(journal);
        let mut files: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files, ["cold-starts.1.jsonl", "cold-starts.2.jsonl", "cold-starts.jsonl", "lock"]);
        let (_, found) = Journal::open(dir.path(), 3 * length, 3).unwrap();
        assert_eq!(ids(&found), (22..31).collect::<Vec<_>>(), "three files of three");
        assert_eq!(found[0], record(22));
    }

    #[test]
    fn invalid_line_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let line = |id| serde_json::to_string(&record(id)).unwrap();
        let again = serde_json::to_string(&ColdStart { left: 3, ..record(1) }).unwrap();
        let cut_off = &line(9)[..30];
        let text = format!("{}\n{{\"id\": \"x\"}}\n\n{}\n{again}\n{cut_off}", line(1), line(2));
        fs::write(dir.path().join("cold-starts.jsonl"), text).unwrap();
        let (mut journal, found) = Journal::open(dir.path(), 1 << 20, 8).unwrap();
        assert_eq!(ids(&found), [1, 2]);
        assert_eq!(found[0].left, 3, "of two lines the last one counts");
        journal.write(&record(3)).unwrap();
        drop(journal);
        assert_eq!(ids(&Journal::open(dir.path(), 1 << 20, 8).unwrap().1), [1, 2, 3]);
    }

    #[test]
    fn unusable_folder_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Journal::open(&file.join("sub"), 1 << 20, 8).err().unwrap().to_string();
        assert!(error.starts_with("cannot use report.dir `") && error.contains("file/sub"), "{error}");
    }

    #[tokio::test]
    async fn record_is_rewritten_when_its_counts_change() {
        use super::super::{LeaveReason, Tracker};
        let dir = tempfile::tempdir().unwrap();
        let lines = || fs::read_to_string(dir.path().join("cold-starts.jsonl")).unwrap();
        let (journal, _) = Journal::open(dir.path(), 1 << 20, 8).unwrap();
        let store = ColdStarts::new(|_| {});
        let tracker = Tracker::new("tiny".into(), store.clone());
        let stop = CancellationToken::new();
        let running = tokio::spawn(journal.run(store.clone(), stop.clone()));
        tokio::task::yield_now().await;
        tracker.begin(tokio::time::Instant::now(), 2);
        tracker.ready(None);
        tracker.abandoned();
        while lines().is_empty() {
            tokio::task::yield_now().await;
        }
        tracker.record_leave(LeaveReason::Left);
        stop.cancel();
        running.await.unwrap();
        assert_eq!(lines().lines().count(), 2, "{}", lines());
        let (_, found) = Journal::open(dir.path(), 1 << 20, 8).unwrap();
        let restored = ColdStarts::new(|_| {});
        restored.restore(found);
        assert_eq!(restored.recent(None, 9), store.recent(None, 9));
        let tracker = Tracker::new("tiny".into(), restored.clone());
        assert!(tracker.estimates().is_some(), "estimates survive a restart");
        tracker.begin(tokio::time::Instant::now(), 0);
        tracker.abandoned();
        assert_eq!(ids(&restored.recent(None, 9)), [2, 1], "ids continue");
    }
}
