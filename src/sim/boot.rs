//! Simulated load: log lines of vLLM over the load time, and injected failures.

use super::{SimArgs, SimError};
use std::{collections::VecDeque, future, io::Write as _, net::SocketAddr, process, time::Duration};
use tokio::time::{Instant, sleep_until};

/// A load in progress.
pub(super) struct LoadSequence {
    log: LogSink,
    started: Instant,
    /// Time with a closed port.
    pub(super) closed: Duration,
    /// Time from the start until ready.
    pub(super) total: Duration,
    hang: bool,
    fail: Option<u8>,
    /// Due time, source location in vLLM, and message of each log line.
    milestones: VecDeque<(Duration, &'static str, String)>,
}

/// Destination of log lines: standard error for the command, none for the library.
#[derive(Clone, Copy)]
pub(super) enum LogSink {
    Silent,
    Stderr,
}

// === impl LogSink ===

impl LogSink {
    pub(super) fn listening(self, address: SocketAddr) {
        self.engine("entry.py:140", &format!("Starting vLLM server on http://{address}"));
    }

    pub(super) fn ready(self) {
        self.line(&format!("INFO:     Started server process [{}]", process::id()));
        self.line("INFO:     Waiting for application startup.");
        self.line("INFO:     Application startup complete.");
    }

    /// Logs the output of vLLM when GPU memory is insufficient.
    fn traceback(self) {
        let engine = format!("(EngineCore pid={}) ERROR [core.py:1510]", process::id());
        for line in [
            "EngineCore failed to start.",
            "Traceback (most recent call last):",
            "  File \"vllm/v1/engine/core.py\", line 1484, in run_engine_core",
            "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of \
             23.64 GiB of which 1.12 GiB is free.",
        ] {
            self.line(&format!("{engine} {line}"));
        }
        self.line("Traceback (most recent call last):");
        self.line("  File \"vllm/v1/engine/utils.py\", line 1431, in wait_for_engine_startup");
        self.line(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        );
    }

    pub(super) fn engine(self, place: &str, message: &str) {
        let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        let (date, time) = (&now[5..10], &now[11..19]);
        self.line(&format!("(EngineCore pid={}) INFO {date} {time} [{place}] {message}", process::id()));
    }

    /// Ignores a closed pipe, on which `eprintln!` would panic.
    fn line(self, line: &str) {
        if let Self::Stderr = self {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }
}

// === impl LoadSequence ===

impl LoadSequence {
    pub(super) fn start(args: &SimArgs, log: LogSink) -> Self {
        let (closed, unready) = args.load_phases();
        let total = closed.saturating_add(unready);
        let seconds = total.as_secs_f64();
        let model = args.first_model();
        let mut milestones = VecDeque::new();
        // Proportions of a load from a local disk with a cold compile cache: about a third for reading weights, most of the
        // rest for compilation and graph capture.
        for (share, place, message) in [
            (0.00, "core.py:116", format!("Initializing a stand-in for the V1 LLM engine, model={model}")),
            (0.05, "gpu_model_runner.py:5040", format!("Starting to load model {model}...")),
            (0.40, "default_loader.py:502", format!("Loading weights took {:.2} seconds", 0.35 * seconds)),
            (
                0.42,
                "gpu_model_runner.py:5150",
                format!("Model loading took 14.25 GiB memory and {:.6} seconds", 0.37 * seconds),
            ),
            (0.65, "monitor.py:20", format!("torch.compile took {:.2} s in total", 0.23 * seconds)),
            (
                0.92,
                "gpu_model_runner.py:6582",
                format!("Graph capturing finished in {:.0} secs, took 0.60 GiB", 0.25 * seconds),
            ),
            (
                0.95,
                "core.py:403",
                format!(
                    "init engine (profile, create kv cache, warmup model) took {:.2} s (compilation: {:.2} s)",
                    0.53 * seconds,
                    0.23 * seconds
                ),
            ),
        ] {
            if args.fail_load.is_none() || share < 0.5 {
                milestones.push_back((total.mul_f64(share), place, message));
            }
        }
        Self {
            log,
            started: Instant::now(),
            closed,
            total,
            hang: args.hang_load,
            fail: args.fail_load,
            milestones,
        }
    }

    /// Continues the load until this time after its start. Returns immediately if that time has passed, so that a port
    /// opened at the end of the load never returns 503.
    pub(super) async fn advance(&mut self, until: Duration) -> Result<(), SimError> {
        while let Some((due, place, message)) = self.milestones.pop_front_if(|(due, ..)| *due <= until) {
            self.sleep_until(due).await;
            self.log.engine(place, &message);
        }
        if let Some(code) = self.fail
            && self.total / 2 <= until
        {
            self.sleep_until(self.total / 2).await;
            self.log.traceback();
            return Err(SimError::LoadFailed { code });
        }
        if self.hang && self.total <= until {
            future::pending::<()>().await;
        }
        self.sleep_until(until).await;
        Ok(())
    }

    async fn sleep_until(&self, point: Duration) {
        if self.started.elapsed() < point {
            sleep_until(self.started + point).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(args: SimArgs) -> LoadSequence {
        LoadSequence::start(&args, LogSink::Silent)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn phases_add_up_to_the_load_time() {
        for (closed_time, unready_time, closed, total) in [
            (None, None, 90, 90),
            (Some(20), None, 20, 90),
            (None, Some(20), 70, 90),
            (Some(20), Some(30), 20, 50),
            (Some(100), None, 100, 100),
        ] {
            let mut load = load(SimArgs {
                load_time: seconds(90),
                closed_time: closed_time.map(seconds),
                unready_time: unready_time.map(seconds),
                ..SimArgs::default()
            });
            let start = Instant::now();
            load.advance(load.closed).await.unwrap();
            assert_eq!(start.elapsed(), seconds(closed));
            load.advance(load.total).await.unwrap();
            assert_eq!(start.elapsed(), seconds(total));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn load_failure_occurs_halfway() {
        let args = SimArgs { load_time: seconds(90), fail_load: Some(3), ..SimArgs::default() };
        let start = Instant::now();
        let mut load = load(args);
        let error = load.advance(load.closed).await.unwrap_err();
        assert_eq!((error.exit_code(), start.elapsed()), (3, seconds(45)));
    }
}
