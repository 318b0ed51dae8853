//! Reads the log of a starting container as lines with their time of writing.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::AsyncBufReadExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::LogParams};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, sleep, timeout_at},
};

use crate::kube::{Cluster, error_chain::error_chain};

/// Reads logs of starting pods if enabled.
pub(super) struct PodLogs {
    cluster: Cluster,
    is_wanted: bool,
    permits: Arc<Semaphore>,
    /// Set once missing permission has been logged.
    is_denied: Arc<AtomicBool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodLogLine {
    pub(super) text: String,
    /// Time of writing by the local clock, as estimated from the first chunk.
    pub(super) at: Instant,
    /// Current correction to subtract from `at`. It applies to all lines of the log, including earlier ones.
    pub(super) correction: Duration,
}

/// Reference to a container.
#[derive(Clone, Debug)]
pub(super) struct ContainerRef {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) container: String,
}

/// Splits a log into timestamped lines.
#[derive(Default)]
struct PodLogSplitter {
    partial: Vec<u8>,
    clock: LineClock,
    /// Timestamp of the last line.
    last: Option<Timestamp>,
    /// Timestamp of the last line before the log was reopened; lines up to it are duplicates.
    resume_after: Option<Timestamp>,
}

/// Maps timestamps of a node to the local clock. The offset is that of the line with the shortest delay, so that a
/// backlog read at once keeps its spacing. Later lines may have a shorter delay, which yields a correction.
#[derive(Default)]
struct LineClock {
    /// Shortest delay in the first chunk, and over all lines, in nanoseconds.
    first_delay: Option<i128>,
    min_delay: Option<i128>,
}

/// Maximum number of logs read concurrently over all targets.
const MAX_CONCURRENT_LOGS: usize = 16;
/// Upper bound of reading one log; exceeds any hold timeout.
const MAX_READ_DURATION: Duration = Duration::from_secs(3600);
/// Upper bound of bytes read from one log, about 100 times what a start of vLLM writes.
const MAX_LOG_BYTES: usize = 16 << 20;
/// Maximum length of a line, in bytes; the rest is dropped.
const MAX_POD_LOG_LINE_BYTES: usize = 2 << 10;
/// Maximum number of lines buffered for the reader.
const LINE_BUFFER: usize = 256;
/// Maximum number of times a log is opened, and the pause before reopening it.
const MAX_OPENS: u32 = 5;
const REOPEN_DELAY: Duration = Duration::from_secs(1);

// === impl PodLogs ===

impl PodLogs {
    pub(super) fn new(cluster: Cluster) -> Self {
        let is_wanted = cluster.reads_logs();
        Self {
            cluster,
            is_wanted,
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT_LOGS)),
            is_denied: Arc::default(),
        }
    }

    /// Follows the log of a running container from its first line until the receiver is dropped. Returns `None` if log
    /// reading is disabled or at its limit.
    pub(super) fn follow(&self, container_ref: ContainerRef) -> Option<mpsc::Receiver<PodLogLine>> {
        let permit = self.permits.clone().try_acquire_owned().ok().filter(|_| self.is_wanted)?;
        let (sender, receiver) = mpsc::channel(LINE_BUFFER);
        let (cluster, is_denied) = (self.cluster.clone(), self.is_denied.clone());
        self.cluster.spawn(async move {
            let _permit = permit;
            let gone = sender.clone();
            tokio::select! {
                biased; // stop first: no reader is left
                () = gone.closed() => {}
                () = read(&cluster, &container_ref, &sender, &is_denied) => {}
            }
        });
        Some(receiver)
    }
}

/// Reads until the log ends or a limit is reached.
async fn read(
    cluster: &Cluster,
    container_ref: &ContainerRef,
    lines: &mpsc::Sender<PodLogLine>,
    is_denied: &AtomicBool,
) {
    let ContainerRef { namespace, pod, container } = container_ref;
    let api: Api<Pod> = cluster.api(namespace);
    // Wall time advances with `Instant`, so that a clock step does not distort the spacing of lines.
    let (began, wall) = (Instant::now(), SystemTime::now());
    let until = began + MAX_READ_DURATION;
    let mut splitter = PodLogSplitter::default();
    let mut bytes_left = MAX_LOG_BYTES;
    for _ in 0..MAX_OPENS {
        splitter.reopen();
        let params = LogParams {
            container: Some(container.clone()),
            follow: true,
            timestamps: true,
            since_time: splitter.last,
            ..LogParams::default()
        };
        let reading = async {
            let mut log = pin!(api.log_stream(pod, &params).await?);
            while bytes_left > 0 {
                // A broken stream is treated as ended; the rest is read after reopening.
                let Ok(bytes @ [_, ..]) = log.fill_buf().await else { break };
                let count = bytes.len();
                bytes_left = bytes_left.saturating_sub(count);
                let now = Instant::now();
                for line in splitter.push(bytes, (now, wall + (now - began))) {
                    if lines.send(line).await.is_err() {
                        return Ok(());
                    }
                }
                log.consume_unpin(count);
            }
            Ok::<_, kube::Error>(())
        };
        match timeout_at(until, reading).await {
            Ok(Ok(())) => {}
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                if !is_denied.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        reason = status.message,
                        "pod logs cannot be read; grant `get` on pods/log, or remove kubernetes.podLogs"
                    );
                }
                return;
            }
            Ok(Err(error)) => {
                tracing::debug!(%pod, error = error_chain(&error), "failed to read the log of a pod")
            }
            Err(_) => return,
        }
        if bytes_left == 0 {
            return;
        }
        sleep(REOPEN_DELAY).await;
    }
}

// === impl PodLogSplitter ===

impl PodLogSplitter {
    /// Prepares for reopening the log at about the last line.
    fn reopen(&mut self) {
        self.resume_after = self.last;
        self.partial.clear();
    }

    /// Returns the lines completed by a chunk received at `now`.
    fn push(&mut self, bytes: &[u8], now: (Instant, SystemTime)) -> Vec<PodLogLine> {
        let mut ended = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_POD_LOG_LINE_BYTES.saturating_sub(self.partial.len());
            self.partial.extend_from_slice(&piece[..room.min(piece.len())]);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                ended.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        }
        let stamped = ended.into_iter().filter_map(|line| {
            let (stamp, text) = line.split_once(' ')?;
            let stamp: Timestamp = stamp.parse().ok()?;
            // `sinceTime` has whole seconds, so some lines are repeated.
            let is_new = self.resume_after.is_none_or(|last| stamp > last);
            self.last = self.last.max(Some(stamp));
            is_new.then(|| (stamp, text.to_owned()))
        });
        let stamped: Vec<_> = stamped.collect();
        for (stamp, _) in &stamped {
            self.clock.observe(*stamp, now.1);
        }
        let lines = stamped.into_iter().flat_map(|(stamp, text)| {
            let at = self.clock.at(stamp, now);
            // Progress bars overwrite themselves with carriage returns.
            let texts = text.split('\r').filter(|text| !text.trim().is_empty());
            let correction = self.clock.correction();
            texts.map(|text| PodLogLine { text: text.to_owned(), at, correction }).collect::<Vec<_>>()
        });
        lines.collect()
    }
}

// === impl LineClock ===

impl LineClock {
    fn delay(stamp: Timestamp, wall: SystemTime) -> i128 {
        let wall = Timestamp::try_from(wall).unwrap_or(Timestamp::UNIX_EPOCH);
        wall.as_nanosecond() - stamp.as_nanosecond()
    }

    fn observe(&mut self, stamp: Timestamp, wall: SystemTime) {
        let delay = Self::delay(stamp, wall);
        self.min_delay = Some(self.min_delay.map_or(delay, |min_delay| min_delay.min(delay)));
    }

    /// Maps with the offset of the first chunk only, so that all lines keep their spacing.
    fn at(&mut self, stamp: Timestamp, (now, wall): (Instant, SystemTime)) -> Instant {
        let delay = Self::delay(stamp, wall);
        let first_delay = *self.first_delay.get_or_insert(self.min_delay.unwrap_or(delay));
        let part = |nanos: i128| Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        now.checked_sub(part(delay - first_delay)).unwrap_or(now) + part(first_delay - delay)
    }

    fn correction(&self) -> Duration {
        let correction = self
            .first_delay
            .zip(self.min_delay)
            .map_or(0, |(first_delay, min_delay)| first_delay - min_delay);
        Duration::from_nanos(u64::try_from(correction).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn lines_read_at_once_keep_their_spacing() {
        // The node's clock is 100 s behind.
        let mut lines = PodLogSplitter::default();
        let now = Instant::now() + Duration::from_secs(50);
        let chunk = "1970-01-01T00:00:01.000000000Z one\n1970-01-01T00:00:03.500000000Z two\n\
                     1970-01-01T00:00:04.000000000Z three\n1970-01-01T00:00:05.0000";
        let read = lines.push(chunk.as_bytes(), (now, at(104.2)));
        let read: Vec<_> = read.iter().map(|line| (&*line.text, (now - line.at).as_millis())).collect();
        assert_eq!(read, [("one", 3000), ("two", 500), ("three", 0)], "4 - 1, 4 - 3.5");
        // The next line has a delay shorter by 0.1 s, so the times of all earlier lines are corrected by 0.1 s.
        let (three, now) = (now, now + Duration::from_millis(900));
        let read = lines.push(b"00000Z four\n", (now, at(105.1)));
        let [four] = read.as_slice() else { panic!("{read:?}") };
        assert_eq!(
            (four.at, four.correction),
            (three + Duration::from_secs(1), Duration::from_millis(100)),
            "5 - 4"
        );
        assert_eq!(four.at - four.correction, now);
    }

    #[tokio::test(start_paused = true)]
    async fn reopened_log_drops_duplicates_and_caps_lines() {
        let mut lines = PodLogSplitter::default();
        let now = (Instant::now(), at(10.0));
        let long = "x".repeat(3 * MAX_POD_LOG_LINE_BYTES);
        let chunk = format!(
            "1970-01-01T00:00:01.5Z one\n1970-01-01T00:00:02Z 10%\r20%\r\n1970-01-01T00:00:03Z {long}\n"
        );
        let read = lines.push(chunk.as_bytes(), now);
        let texts: Vec<_> = read.iter().map(|line| &*line.text).collect();
        assert_eq!(texts[..3], ["one", "10%", "20%"]);
        assert!(texts[3].len() < MAX_POD_LOG_LINE_BYTES, "{}", texts[3].len());
        lines.reopen();
        assert!(lines.push(chunk.as_bytes(), now).is_empty());
        let new = b"1970-01-01T00:00:04Z new\n1970-01-01T00:00:04Z of the same moment\nno stamp\n";
        assert_eq!(lines.push(new, now).len(), 2);
    }
}
