//! A queue between the threads that log and standard error, bounded in lines and in bytes.

use std::{
    borrow::Cow,
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::Duration,
};

use serde_json::Value;

/// Maximum number of queued lines; further ones are dropped and counted.
const MAX_QUEUED_LINES: usize = 1024;

/// Maximum number of queued bytes.
const MAX_QUEUED_BYTES: usize = 2 << 20;

/// Maximum length of a line, including its end. Values in longer lines are truncated.
const MAX_LOG_LINE_BYTES: usize = 16 << 10;

/// Maximum lengths of a value in a JSON line that is too long, tried in order.
const MAX_VALUE_CHARS: [usize; 2] = [1024, 64];

/// Time that the end of the process waits for queued lines to be written.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Queue of log lines for the writing thread. Never blocks.
pub(super) struct LogQueue {
    lines: SyncSender<Vec<u8>>,
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
    is_closing: AtomicBool,
}

/// Flushes the queue when dropped, for at most a second.
#[must_use = "dropping the guard ends logging"]
pub struct LogGuard {
    queue: Arc<LogQueue>,
    /// Disconnected when the thread ends.
    written: Receiver<()>,
}

// === impl LogQueue ===

impl LogQueue {
    /// Starts the writing thread.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<(Arc<Self>, LogGuard)> {
        let (lines, queued) = mpsc::sync_channel(MAX_QUEUED_LINES);
        let (ends, written) = mpsc::channel();
        let queue = Arc::new(Self {
            lines,
            queued_bytes: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            is_closing: AtomicBool::new(false),
        });
        let writing = queue.clone();
        thread::Builder::new().name("anteroom-log".into()).spawn(move || {
            writing.write_queued(&queued, out);
            drop::<mpsc::Sender<()>>(ends);
        })?;
        Ok((queue.clone(), LogGuard { queue, written }))
    }

    /// Returns the number of lines that found no room or could not be written.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn enqueue(&self, line: &[u8]) {
        let line = if line.len() > MAX_LOG_LINE_BYTES { shorten(line) } else { Cow::Borrowed(line) };
        let bytes = line.len();
        // Count before queueing, so that concurrent threads cannot exceed the limit.
        let has_room = self.queued_bytes.fetch_add(bytes, Ordering::SeqCst) + bytes <= MAX_QUEUED_BYTES;
        if !(has_room && self.lines.try_send(line.into_owned()).is_ok()) {
            self.queued_bytes.fetch_sub(bytes, Ordering::SeqCst);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write_queued(&self, queued: &Receiver<Vec<u8>>, mut out: impl Write) {
        while let Ok(line) = queued.recv() {
            if out.write_all(&line).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            self.queued_bytes.fetch_sub(line.len(), Ordering::SeqCst);
            if self.is_closing.load(Ordering::SeqCst) && self.queued_bytes.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }
}

impl Write for &LogQueue {
    /// Takes a whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.enqueue(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Truncates a line to [`MAX_LOG_LINE_BYTES`], keeping JSON valid.
fn shorten(line: &[u8]) -> Cow<'_, [u8]> {
    if let Ok(Value::Object(mut fields)) = serde_json::from_slice(line) {
        for max_chars in MAX_VALUE_CHARS {
            for value in fields.values_mut() {
                if let Value::String(text) = value
                    && let Some((end, _)) = text.char_indices().nth(max_chars)
                {
                    text.truncate(end);
                    text.push('…');
                }
            }
            match serde_json::to_vec(&fields) {
                Ok(mut line) if line.len() < MAX_LOG_LINE_BYTES => {
                    line.push(b'\n');
                    return line.into();
                }
                _ => {}
            }
        }
    }
    const TRUNCATED_END: &str = "…\n";
    let mut end = MAX_LOG_LINE_BYTES - TRUNCATED_END.len();
    // Do not split a character.
    while line[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    [&line[..end], TRUNCATED_END.as_bytes()].concat().into()
}

// === impl LogGuard ===

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.queue.is_closing.store(true, Ordering::SeqCst);
        // Wakes the thread if it waits for a line; a full queue means it does not.
        let _ = self.queue.lines.try_send(Vec::new());
        let _ = self.written.recv_timeout(LOG_FLUSH_TIMEOUT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer that blocks until its channel is read.
    struct BlockingWriter(SyncSender<Vec<u8>>);

    impl Write for BlockingWriter {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.send(line.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(queue: &LogQueue, line: impl AsRef<[u8]>) {
        let mut queue = queue;
        queue.write_all(line.as_ref()).unwrap();
    }

    #[test]
    fn queue_is_bounded_in_lines_and_bytes() {
        for (line, most) in
            [(vec![b'x'; 10], MAX_QUEUED_LINES), (vec![b'x'; 8 << 10], MAX_QUEUED_BYTES >> 13)]
        {
            let (out, read) = mpsc::sync_channel(0);
            let (queue, guard) = LogQueue::start(BlockingWriter(out)).unwrap();
            for _ in 0..2 * most {
                log(&queue, &line);
            }
            // One line may have left the queue and be in the writer.
            let kept = 2 * most - usize::try_from(queue.dropped()).unwrap();
            assert!((most..=most + 1).contains(&kept), "{kept} of {most}");
            assert!(queue.queued_bytes.load(Ordering::SeqCst) <= MAX_QUEUED_BYTES);
            let reading = thread::spawn(move || read.iter().count());
            drop(guard);
            // The thread has ended, and the other end of the channel with it.
            assert_eq!(reading.join().unwrap(), kept);
        }
    }

    #[test]
    fn guard_ends_with_a_reader_that_does_not_read() {
        let (out, _unread) = mpsc::sync_channel(0);
        let (queue, guard) = LogQueue::start(BlockingWriter(out)).unwrap();
        for _ in 0..2 * MAX_QUEUED_LINES {
            log(&queue, "x");
        }
        // Returns although the thread is still blocked.
        drop(guard);
        assert!(queue.dropped() >= MAX_QUEUED_LINES as u64 - 1);
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let (out, read) = mpsc::sync_channel(1);
        let (queue, guard) = LogQueue::start(BlockingWriter(out)).unwrap();
        drop(read);
        log(&queue, "nobody reads it");
        drop(guard);
        assert_eq!(queue.dropped(), 1);
    }

    #[test]
    fn long_lines_are_cut_and_json_stays_json() {
        let text = shorten("ä".repeat(MAX_LOG_LINE_BYTES).as_bytes()).into_owned();
        assert!((MAX_LOG_LINE_BYTES - 1..=MAX_LOG_LINE_BYTES).contains(&text.len()));
        assert!(String::from_utf8(text).unwrap().ends_with("ä…\n"));

        let fields = [("level", "WARN"), ("name", &"n".repeat(20_000)), ("message", "short")];
        for path in ["p".repeat(100), "\u{1}".repeat(10_000)] {
            let mut line: serde_json::Map<_, _> =
                fields.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
            line.insert("path".into(), path.into());
            let short = shorten(&serde_json::to_vec(&line).unwrap()).into_owned();
            assert!(short.len() <= MAX_LOG_LINE_BYTES && short.ends_with(b"}\n"), "{}", short.len());
            let short: Value = serde_json::from_slice(&short).unwrap();
            assert_eq!((&short["level"], &short["message"]), (&"WARN".into(), &"short".into()));
            assert!(short["name"].as_str().unwrap().ends_with("n…"));
        }
    }
}
