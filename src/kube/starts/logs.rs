//! The log of a container while it starts: lines, and when they were written.

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

use crate::kube::{Cluster, watch::chain};

/// Reads logs of pods that start, where that is wanted.
pub(super) struct PodLogs {
    cluster: Cluster,
    is_wanted: bool,
    at_once: Arc<Semaphore>,
    /// Whether it has been said that there is no right to it.
    is_denied: Arc<AtomicBool>,
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) text: String,
    /// When it was written, by our clock, as far as was known with the first line.
    pub(super) at: Instant,
    /// By how much that was too late, as far as is known now: it goes for all lines of the log, also those before.
    pub(super) late: Duration,
}

/// A container whose log is read.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) container: String,
}

/// Cuts a log into lines with their stamps.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    clock: LineClock,
    /// The stamp of the last line.
    last: Option<Timestamp>,
    /// That of the last one before it was asked for again: what is read again is not told again.
    told: Option<Timestamp>,
}

/// From the stamps of a node to our clock. The line that was under way for the shortest time says how far the two are
/// apart, so that what had been written before we began to read does not seem to be written at once. That of those lines
/// which came first may have been under way for long, and others come that were not.
#[derive(Default)]
struct LineClock {
    /// The shortest time among the first ones.
    first: Option<i128>,
    least: Option<i128>,
}

/// How many logs are read at once, over all targets.
const AT_ONCE: usize = 16;
/// How long one is read at the most: longer than anything is held for.
const LONGEST: Duration = Duration::from_secs(3600);
/// How much of one is read at the most. A start of vLLM writes a hundredth of it.
const MOST: usize = 16 << 20;
/// How many bytes of a line are kept.
const LENGTH: usize = 2 << 10;
/// How many lines may wait to be looked at.
const WAITING: usize = 256;
/// How often a log that ended is asked for again, and how long before.
const AGAIN: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

// === impl PodLogs ===

impl PodLogs {
    pub(super) fn new(cluster: Cluster) -> Self {
        let is_wanted = cluster.reads_logs();
        Self { cluster, is_wanted, at_once: Arc::new(Semaphore::new(AT_ONCE)), is_denied: Arc::default() }
    }

    /// The lines of a container that runs, from its first one on, until the receiver is dropped. `None`: they are not
    /// wanted, or too many are read already.
    pub(super) fn follow(&self, source: Source) -> Option<mpsc::Receiver<Line>> {
        let turn = self.at_once.clone().try_acquire_owned().ok().filter(|_| self.is_wanted)?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let (cluster, is_denied) = (self.cluster.clone(), self.is_denied.clone());
        self.cluster.spawn(async move {
            let _turn = turn;
            let gone = sender.clone();
            tokio::select! {
                biased; // nobody reads it any more
                () = gone.closed() => {}
                () = read(&cluster, &source, &sender, &is_denied) => {}
            }
        });
        Some(receiver)
    }
}

/// Reads until the container has ended, or one of the bounds is reached.
async fn read(cluster: &Cluster, source: &Source, lines: &mpsc::Sender<Line>, is_denied: &AtomicBool) {
    let Source { namespace, pod, container } = source;
    let api: Api<Pod> = cluster.api(namespace);
    // One clock, so that a step of the other does not tear the lines apart.
    let (began, wall) = (Instant::now(), SystemTime::now());
    let until = began + LONGEST;
    let mut cut = Lines::default();
    let mut left = MOST;
    for _ in 0..AGAIN {
        cut.again();
        let params = LogParams {
            container: Some(container.clone()),
            follow: true,
            timestamps: true,
            since_time: cut.last,
            ..LogParams::default()
        };
        let reading = async {
            let mut log = pin!(api.log_stream(pod, &params).await?);
            while left > 0 {
                // A stream that breaks is one that ends: what is left of it is asked for again.
                let Ok(bytes @ [_, ..]) = log.fill_buf().await else { break };
                let count = bytes.len();
                left = left.saturating_sub(count);
                let now = Instant::now();
                for line in cut.push(bytes, (now, wall + (now - began))) {
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
                        "logs of pods cannot be read; grant `get` on pods/log, or leave out kubernetes.podLogs"
                    );
                }
                return;
            }
            Ok(Err(error)) => tracing::debug!(%pod, error = chain(&error), "its log cannot be read"),
            Err(_) => return,
        }
        if left == 0 {
            return;
        }
        sleep(PAUSE).await;
    }
}

// === impl Lines ===

impl Lines {
    /// The log is asked for again, from about the last line on.
    fn again(&mut self) {
        self.told = self.last;
        self.partial.clear();
    }

    /// The lines that end with this chunk, which came `now`.
    fn push(&mut self, bytes: &[u8], now: (Instant, SystemTime)) -> Vec<Line> {
        let mut ended = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = LENGTH.saturating_sub(self.partial.len());
            self.partial.extend_from_slice(&piece[..room.min(piece.len())]);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                ended.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        }
        let stamped = ended.into_iter().filter_map(|line| {
            let (stamp, text) = line.split_once(' ')?;
            let stamp: Timestamp = stamp.parse().ok()?;
            // It is asked for again with whole seconds.
            let is_new = self.told.is_none_or(|told| stamp > told);
            self.last = self.last.max(Some(stamp));
            is_new.then(|| (stamp, text.to_owned()))
        });
        let stamped: Vec<_> = stamped.collect();
        for (stamp, _) in &stamped {
            self.clock.learn(*stamp, now.1);
        }
        let lines = stamped.into_iter().flat_map(|(stamp, text)| {
            let at = self.clock.at(stamp, now);
            // A progress bar writes over itself.
            let texts = text.split('\r').filter(|text| !text.trim().is_empty());
            let late = self.clock.late();
            texts.map(|text| Line { text: text.to_owned(), at, late }).collect::<Vec<_>>()
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

    fn learn(&mut self, stamp: Timestamp, wall: SystemTime) {
        let delay = Self::delay(stamp, wall);
        self.least = Some(self.least.map_or(delay, |least| least.min(delay)));
    }

    /// By the first lines alone, so that the distances of all lines are those of their stamps.
    fn at(&mut self, stamp: Timestamp, (now, wall): (Instant, SystemTime)) -> Instant {
        let delay = Self::delay(stamp, wall);
        let first = *self.first.get_or_insert(self.least.unwrap_or(delay));
        let part = |nanos: i128| Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        now.checked_sub(part(delay - first)).unwrap_or(now) + part(first - delay)
    }

    fn late(&self) -> Duration {
        let late = self.first.zip(self.least).map_or(0, |(first, least)| first - least);
        Duration::from_nanos(u64::try_from(late).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn lines_have_the_distances_in_which_they_were_written_though_they_come_at_once() {
        // The node is 100 s behind.
        let mut lines = Lines::default();
        let now = Instant::now() + Duration::from_secs(50);
        let chunk = "1970-01-01T00:00:01.000000000Z one\n1970-01-01T00:00:03.500000000Z two\n\
                     1970-01-01T00:00:04.000000000Z three\n1970-01-01T00:00:05.0000";
        let told = lines.push(chunk.as_bytes(), (now, at(104.2)));
        let told: Vec<_> = told.iter().map(|line| (&*line.text, (now - line.at).as_millis())).collect();
        assert_eq!(told, [("one", 3000), ("two", 500), ("three", 0)], "4 - 1, 4 - 3.5");
        // The next one is under way for 0.1 s less, so all before it were 0.1 s late.
        let (three, now) = (now, now + Duration::from_millis(900));
        let told = lines.push(b"00000Z four\n", (now, at(105.1)));
        let [four] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(
            (four.at, four.late),
            (three + Duration::from_secs(1), Duration::from_millis(100)),
            "5 - 4"
        );
        assert_eq!(four.at - four.late, now);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_read_again_is_not_told_again_and_no_line_is_endless() {
        let mut lines = Lines::default();
        let now = (Instant::now(), at(10.0));
        let long = "x".repeat(3 * LENGTH);
        let first = format!(
            "1970-01-01T00:00:01.5Z one\n1970-01-01T00:00:02Z 10%\r20%\r\n1970-01-01T00:00:03Z {long}\n"
        );
        let told = lines.push(first.as_bytes(), now);
        let texts: Vec<_> = told.iter().map(|line| &*line.text).collect();
        assert_eq!(texts[..3], ["one", "10%", "20%"]);
        assert!(texts[3].len() < LENGTH, "{}", texts[3].len());
        lines.again();
        assert!(lines.push(first.as_bytes(), now).is_empty());
        let new = b"1970-01-01T00:00:04Z new\n1970-01-01T00:00:04Z of the same moment\nno stamp\n";
        assert_eq!(lines.push(new, now).len(), 2);
    }
}
