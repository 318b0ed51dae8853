//! Records in files, as JSON lines: written as cold starts end, and read when the process starts.
//!
//! A record whose counts have gone on since it was written is written again; of lines with the same id the last one
//! counts.

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

/// The files of a folder, which this process alone writes.
pub struct Journal {
    dir: PathBuf,
    max_bytes: u64,
    files: usize,
    file: File,
    size: u64,
    /// What the files say of the newest ones.
    written: BTreeMap<u64, ColdStart>,
    /// Held for as long as this lives.
    #[expect(dead_code, reason = "its lock goes when it is closed")]
    lock: File,
}

/// Why a folder cannot be used.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum JournalError {
    #[error("cannot use report.dir `{}`: {source}; give a folder that this process may write to", dir.display())]
    Unusable { dir: PathBuf, source: io::Error },
    #[error("report.dir `{}` is in use by another process; give each its own folder", .0.display())]
    Taken(PathBuf),
}

/// How often it is looked whether counts have gone on.
const LOOK: Duration = Duration::from_secs(60);

/// How long a line may be: far more than a record with its last lines takes.
const LONGEST: u64 = 1 << 20;

// === impl Journal ===

impl Journal {
    /// Opens the folder, and reads the newest records that are in it, oldest first.
    ///
    /// # Errors
    /// When the folder cannot be made, read or written, or when another process has it. A line that is no record is no
    /// error: it is logged and left out.
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
            while records.len() > ColdStarts::KEPT {
                records.pop_first();
            }
        }
        let (file, size) = open(&path(dir, 0)).map_err(unusable)?;
        let found = records.values().cloned().collect();
        let max_bytes = max_bytes as u64;
        let journal = Self { dir: dir.into(), max_bytes, files, file, size, written: records, lock };
        Ok((journal, found))
    }

    /// Writes what ends up in `store` from now on, until it is told to stop; what there is then is still written.
    pub async fn run(self, store: Arc<ColdStarts>, stop: CancellationToken) {
        let mut changed = store.changed();
        let mut ticks = interval(LOOK);
        let mut journal = self;
        let mut is_failing = false;
        loop {
            let is_last = tokio::select! {
                biased; // the end last: it waits for what there is, too
                Ok(()) = changed.changed() => false,
                _ = ticks.tick() => false,
                () = stop.cancelled() => true,
            };
            let mut news = store.recent(None, ColdStarts::KEPT);
            news.retain(|record| journal.written.get(&record.id) != Some(record));
            if !news.is_empty() {
                news.reverse();
                let done = tokio::task::spawn_blocking(move || {
                    let result = news.into_iter().try_for_each(|record| journal.keep(record));
                    (journal, result)
                });
                // Without a panic there is no error here.
                let Ok((ours, result)) = done.await else { return };
                journal = ours;
                let dir = journal.dir.display();
                match result {
                    Ok(()) if std::mem::take(&mut is_failing) => {
                        tracing::info!(%dir, "records of cold starts are written again");
                    }
                    Err(error) if !std::mem::replace(&mut is_failing, true) => {
                        tracing::warn!(%dir, %error, again_in = ?LOOK, "records of cold starts cannot be written");
                    }
                    _ => {}
                }
            }
            if is_last {
                return;
            }
        }
    }

    /// Writes a record, and remembers that it did.
    fn keep(&mut self, record: ColdStart) -> io::Result<()> {
        self.write(&record)?;
        self.written.insert(record.id, record);
        while self.written.len() > 2 * ColdStarts::KEPT {
            self.written.pop_first();
        }
        Ok(())
    }

    /// Adds a line, in a new file if this one is full.
    fn write(&mut self, record: &ColdStart) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if self.size > 0 && self.size + line.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        let written = self.file.write_all(&line);
        match written {
            Ok(()) => self.size += line.len() as u64,
            // Half a line would spoil the next one.
            Err(_) => self.file.set_len(self.size)?,
        }
        written
    }

    /// Moves every file one further; the oldest goes.
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

/// Where the file is that so many have followed.
fn path(dir: &Path, number: usize) -> PathBuf {
    match number {
        0 => dir.join("cold-starts.jsonl"),
        number => dir.join(format!("cold-starts.{number}.jsonl")),
    }
}

/// Opens a file to add to it. A last line that was cut off in the middle is ended.
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
        if reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        match serde_json::from_slice::<ColdStart>(&line) {
            Ok(record) => {
                records.insert(record.id, record);
            }
            Err(_) if line.trim_ascii().is_empty() => {}
            Err(error) => {
                tracing::warn!(file = %path.display(), line = number, %error, "no record of a cold start: left out");
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
    fn what_is_written_is_read_again_and_the_oldest_goes() {
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
    fn a_line_that_is_no_record_costs_itself_alone() {
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
    fn a_folder_that_cannot_be_had_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Journal::open(&file.join("sub"), 1 << 20, 8).err().unwrap().to_string();
        assert!(error.starts_with("cannot use report.dir `") && error.contains("file/sub"), "{error}");
    }

    #[tokio::test]
    async fn records_are_written_as_they_end_and_again_when_their_counts_have_gone_on() {
        use super::super::{Leave, Tracker};
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
        tracker.leave(Leave::Left);
        stop.cancel();
        running.await.unwrap();
        assert_eq!(lines().lines().count(), 2, "{}", lines());
        let (_, found) = Journal::open(dir.path(), 1 << 20, 8).unwrap();
        let restored = ColdStarts::new(|_| {});
        restored.restore(found);
        assert_eq!(restored.recent(None, 9), store.recent(None, 9));
        let tracker = Tracker::new("tiny".into(), restored.clone());
        assert!(tracker.estimates().is_some(), "a restart forgets nothing");
        tracker.begin(tokio::time::Instant::now(), 0);
        tracker.abandoned();
        assert_eq!(ids(&restored.recent(None, 9)), [2, 1], "numbers go on");
    }
}
