//! Output of a model server: its last lines, the line that names a cause, and the parts of its start.

use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    coldstart::VllmLog,
    domain::{RouteKey, mask_secrets},
    guardian,
    state::PartObservation,
};

/// Output of a process, read continuously, so that the process never blocks on its pipe.
pub(super) struct ProcessOutput {
    tail: Arc<Mutex<VecDeque<String>>>,
    loaded: Arc<AtomicBool>,
    reader: JoinHandle<()>,
}

/// Parses the log of a start. Ignores lines once the server serves.
struct StartLog<F> {
    log: VllmLog,
    loaded: Arc<AtomicBool>,
    /// Lines still parsed after the server is ready, as earlier ones may be in the pipe.
    late_lines: u32,
    on_part: F,
}

/// Splits bytes into lines of bounded length. A carriage return ends a line, too: progress bars use it.
#[derive(Default)]
struct OutputSplitter {
    partial: Vec<u8>,
}

// === impl ProcessOutput ===

impl ProcessOutput {
    /// Maximum number of lines kept.
    const MAX_LAST_LINES: usize = 50;
    /// Time for reading the remaining output of a process that has exited.
    const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

    /// Reads until every writer has closed the pipe. Calls `on_part` with the parts of the start.
    pub(super) fn read(
        mut source: impl AsyncRead + Send + Unpin + 'static,
        route: RouteKey,
        on_part: impl Fn(PartObservation) + Send + 'static,
    ) -> Self {
        let tail = Arc::new(Mutex::new(VecDeque::with_capacity(Self::MAX_LAST_LINES)));
        let loaded = Arc::new(AtomicBool::new(false));
        let mut start =
            StartLog { log: VllmLog::default(), loaded: loaded.clone(), late_lines: 100, on_part };
        let kept = tail.clone();
        let mut keep = move |line: String| {
            // The guardian's own lines are few, and name what delays the start.
            if line.starts_with(guardian::LOG_PREFIX) {
                tracing::info!(%route, "{line}");
            } else {
                tracing::debug!(%route, "{line}");
            }
            start.line(&line);
            let mut kept = kept.lock();
            if kept.len() == Self::MAX_LAST_LINES {
                kept.pop_front();
            }
            kept.push_back(line);
        };
        let reader = tokio::spawn(async move {
            let mut lines = OutputSplitter::default();
            let mut buffer = vec![0; 8 << 10];
            while let Ok(count @ 1..) = source.read(&mut buffer).await {
                lines.push(&buffer[..count], &mut keep);
            }
            lines.end(&mut keep);
        });
        Self { tail, loaded, reader }
    }

    /// Ends the parsing of the start.
    pub(super) fn set_loaded(&self) {
        self.loaded.store(true, Ordering::Relaxed);
    }

    /// Reads the remaining output of a process that has exited, and returns the last lines.
    pub(super) async fn finish(&mut self) -> Vec<String> {
        if !self.reader.is_finished() {
            let _ = timeout(Self::FINISH_TIMEOUT, &mut self.reader).await;
        }
        self.last_lines()
    }

    /// Returns the last lines so far.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.tail.lock().iter().cloned().collect()
    }
}

impl Drop for ProcessOutput {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

// === impl StartLog ===

impl<F: Fn(PartObservation)> StartLog<F> {
    fn line(&mut self, line: &str) {
        if self.late_lines > 0 {
            self.late_lines -= u32::from(self.loaded.load(Ordering::Relaxed));
            self.log.line(line, Instant::now()).into_iter().for_each(&self.on_part);
        }
    }
}

/// Finds the line that names the cause of an exit: the last one that is neither part of a traceback nor a reference to a
/// cause above. For pydantic's count of errors, the next line with the first error is appended.
pub(super) fn cause_line(lines: &[String]) -> Option<Cow<'_, str>> {
    let names_cause = |line: &String| {
        !line.starts_with(char::is_whitespace)
            && !line.starts_with("Traceback (most recent call last)")
            && !line.contains("See root cause above")
    };
    let index = lines.iter().rposition(names_cause).or_else(|| lines.len().checked_sub(1))?;
    let line = &lines[index];
    match lines.get(index + 1) {
        Some(which) if line.contains("validation error") => Some(format!("{line}: {}", which.trim()).into()),
        _ => Some(line.into()),
    }
}

// === impl OutputSplitter ===

impl OutputSplitter {
    /// Maximum length of a line, in bytes; the rest is dropped.
    const MAX_OUTPUT_LINE_BYTES: usize = 2 << 10;

    fn push(&mut self, bytes: &[u8], mut line: impl FnMut(String)) {
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (ended, text) = match piece {
                [text @ .., b'\n' | b'\r'] => (true, text),
                text => (false, text),
            };
            let room = Self::MAX_OUTPUT_LINE_BYTES - self.partial.len();
            self.partial.extend_from_slice(&text[..room.min(text.len())]);
            if ended {
                self.end(&mut line);
            }
        }
    }

    fn end(&mut self, mut line: impl FnMut(String)) {
        let text = strip_control_sequences(&String::from_utf8_lossy(&self.partial));
        self.partial.clear();
        if !text.is_empty() {
            line(mask_secrets(&text).into_owned());
        }
    }
}

/// Strips terminal control sequences and trailing white space.
fn strip_control_sequences(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        match next {
            '\x1b' => {
                // `ESC [ … letter`, or a single character after ESC.
                if rest.next() == Some('[') {
                    rest.by_ref().find(|end| ('\x40'..='\x7e').contains(end));
                }
            }
            '\t' => plain.push(next),
            _ if next.is_control() => {}
            _ => plain.push(next),
        }
    }
    plain.truncate(plain.trim_end().len());
    plain
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tokio::time::advance;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let found = RefCell::new(Vec::new());
        let mut lines = OutputSplitter::default();
        for chunk in chunks {
            lines.push(chunk, |line| found.borrow_mut().push(line));
            assert!(lines.partial.len() <= OutputSplitter::MAX_OUTPUT_LINE_BYTES);
        }
        lines.end(|line| found.borrow_mut().push(line));
        found.into_inner()
    }

    #[test]
    fn chunks_are_split_into_plain_lines() {
        assert_eq!(lines(&[b"one\ntw", b"o\r\n\n", b"three"]), ["one", "two", "three"]);
        assert_eq!(lines(&[b"shards: 10%\rshards: 20%\r"]), ["shards: 10%", "shards: 20%"]);
        assert_eq!(
            lines(&[b"\x1b[0;36m(EngineCore pid=7)\x1b[0;0m\tERROR \x07 \n"]),
            ["(EngineCore pid=7)\tERROR"]
        );
        assert_eq!(lines(&[b"\xff\n"]), ["\u{fffd}"]);
    }

    #[test]
    fn endless_line_is_bounded() {
        let chunk = [b'x'; 3000];
        assert_eq!(lines(&[&chunk, &chunk, b"\nnext\n"]), ["x".repeat(2048), "next".into()]);
    }

    #[tokio::test]
    async fn last_fifty_lines_are_kept() {
        let text: String = (0..60).map(|number| format!("{number}\n")).collect();
        let mut output = ProcessOutput::read(std::io::Cursor::new(text), "tiny".into(), |_| {});
        let kept = output.finish().await;
        assert_eq!((kept.len(), kept[0].as_str(), kept[49].as_str()), (50, "10", "59"));
    }

    #[tokio::test(start_paused = true)]
    async fn start_is_parsed_for_100_lines_after_ready() {
        for (others, parts) in [(98, 4), (99, 3), (100, 1)] {
            let (loaded, parsed) = (Arc::new(AtomicBool::new(false)), RefCell::new(Vec::new()));
            let on_part = |part: PartObservation| parsed.borrow_mut().push(part.part);
            let mut start =
                StartLog { log: VllmLog::default(), loaded: loaded.clone(), late_lines: 100, on_part };
            for _ in 0..1000 {
                start.line("(EngineCore pid=7) DEBUG waiting");
            }
            start.line("Starting to load model a...");
            loaded.store(true, Ordering::Relaxed);
            for _ in 0..others {
                start.line("INFO:     127.0.0.1 - GET /health");
            }
            advance(Duration::from_secs(5)).await;
            start.line("init engine (profile, create kv cache, warmup model) took 1.00 s");
            advance(Duration::from_secs(1)).await;
            start.line("Application startup complete.");
            assert_eq!(parsed.borrow().len(), parts, "{others}: {:?}", parsed.borrow());
        }
    }

    #[test]
    fn cause_line_skips_tracebacks_and_references() {
        let said = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>();
        let vllm = said(&[
            "ERROR [core.py:1510] torch.OutOfMemoryError: CUDA out of memory.",
            "Traceback (most recent call last):",
            "  File \"vllm/v1/engine/utils.py\", line 1431, in wait_for_engine_startup",
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        ]);
        let cause = |lines: &[String]| cause_line(lines).map(Cow::into_owned);
        let expected = "ERROR [core.py:1510] torch.OutOfMemoryError: CUDA out of memory.";
        assert_eq!(cause(&vllm).as_deref(), Some(expected));
        assert_eq!(cause(&said(&["ValueError: no", "  indented"])).as_deref(), Some("ValueError: no"));
        let pydantic =
            ["ValidationError: 1 validation error for ModelConfig", "  Value error, no", "    See there"];
        let expected = "ValidationError: 1 validation error for ModelConfig: Value error, no";
        assert_eq!(cause(&said(&pydantic)).as_deref(), Some(expected));
        assert_eq!(cause(&said(&["  a", "  b"])).as_deref(), Some("  b"), "the last line as a fallback");
        assert_eq!(cause(&[]), None);
    }
}
