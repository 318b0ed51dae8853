use proptest::prelude::*;

use super::*;

/// Parses a log into parts with start and end in seconds; `None` starts with the load. Each line of the log is prefixed
/// with the second at which it was read.
fn parts(log: &str) -> Vec<(Part, Option<f64>, f64)> {
    let epoch = Instant::now() + Duration::from_secs(1000);
    let (mut vllm, mut reported) = (VllmLog::default(), BTreeMap::new());
    for line in log.lines() {
        let (at, line) = line.trim_start().split_once(' ').unwrap_or((line.trim_start(), ""));
        for part in vllm.line(line, epoch + Duration::from_secs_f64(at.parse().unwrap())) {
            reported.insert(part.part, part);
        }
    }
    assert_eq!(reported, vllm.known, "the last report of each part is kept");
    let since = |at: Instant| (at.duration_since(epoch).as_secs_f64() * 1e3).round() / 1e3;
    reported.into_values().map(|part| (part.part, part.start.map(since), since(part.end))).collect()
}

#[test]
fn real_start_on_a_cpu_with_random_weights() {
    // Loading starts at 34.108. The engine took 3.25 s until 38.379, so the weights were loaded at 35.129.
    let log = include_str!("../../../tests/vllm/logs/0.32-cpu-dummy.log");
    assert_eq!(
        parts(log),
        [
            (Part::EngineStart, None, 34.108),
            (Part::Weights, Some(34.108), 35.129),
            (Part::Warmup, Some(35.129), 38.379),
            (Part::ServerStart, Some(38.379), 39.468),
        ]
    );
}

#[test]
fn real_start_on_a_cpu_that_compiles() {
    let log = include_str!("../../../tests/vllm/logs/0.32-cpu-compiled.log");
    assert_eq!(
        parts(log),
        [
            (Part::EngineStart, None, 28.34),
            (Part::Weights, Some(28.34), 28.469),
            (Part::Compile, Some(29.367), 54.486),
            (Part::Warmup, Some(54.486), 56.144),
            (Part::ServerStart, Some(56.144), 57.212),
        ]
    );
}

/// Format strings of 0.10, with a download, on two ranks.
#[test]
fn gpu_start_with_compilation_logged_late() {
    let log = "\
        20 (VllmWorker TP0 pid=9) INFO 09-01 10:00:20 [gpu_model_runner.py:1875] Starting to load model org/name...\n\
        20.5 (VllmWorker TP1 pid=10) INFO 09-01 10:00:20 [gpu_model_runner.py:1875] Starting to load model org/name...\n\
        52 (VllmWorker TP0 pid=9) INFO 09-01 10:00:52 [weight_utils.py:312] Time spent downloading weights for org/name: 30.500000 seconds\n\
        60 (VllmWorker TP0 pid=9) INFO 09-01 10:01:00 [default_loader.py:262] Loading weights took 7.50 seconds\n\
        61 (VllmWorker TP0 pid=9) INFO 09-01 10:01:01 [gpu_model_runner.py:1892] Model loading took 7.6400 GiB and 41.000000 seconds\n\
        63 (VllmWorker TP1 pid=10) INFO 09-01 10:01:03 [gpu_model_runner.py:1892] Model loading took 7.6400 GiB and 42.500000 seconds\n\
        71 (VllmWorker TP0 pid=9) INFO 09-01 10:01:11 [backends.py:541] Dynamo bytecode transform time: 7.00 s\n\
        72 (VllmWorker TP1 pid=10) INFO 09-01 10:01:12 [backends.py:541] Dynamo bytecode transform time: 7.50 s\n\
        84 (VllmWorker TP0 pid=9) INFO 09-01 10:01:24 [backends.py:215] Compiling a graph for dynamic shape takes 12.00 s\n\
        95 (VllmWorker TP0 pid=9) INFO 09-01 10:01:35 [monitor.py:34] torch.compile takes 19.00 s in total\n\
        96 (VllmWorker TP1 pid=10) INFO 09-01 10:01:36 [monitor.py:34] torch.compile takes 20.00 s in total\n\
        130 (VllmWorker TP0 pid=9) INFO 09-01 10:02:10 [gpu_model_runner.py:2485] Graph capturing finished in 22 secs, took 0.48 GiB\n\
        131 (EngineCore_0 pid=8) INFO 09-01 10:02:11 [core.py:193] init engine (profile, create kv cache, warmup model) took 67.50 seconds\n\
        133 (APIServer pid=7) INFO 09-01 10:02:13 [api_server.py:1818] Starting vLLM API server 0 on http://0.0.0.0:8000\n\
        134 INFO:     Application startup complete.";
    assert_eq!(
        parts(log),
        [
            (Part::EngineStart, None, 20.0),
            (Part::WeightsDownload, Some(21.5), 52.0),
            (Part::Weights, Some(52.0), 63.0),
            // The compilations began at 71 - 7 and at 72 - 7.5, and took 19 and 20 s.
            (Part::Compile, Some(64.0), 84.5),
            (Part::Warmup, Some(84.5), 131.0),
            (Part::ServerStart, Some(131.0), 134.0),
        ]
    );
}

/// Format strings of 0.32 with its newest model runner, which does not log the start of loading.
#[test]
fn gpu_start_without_its_first_line() {
    let log = "\
        40 (EngineCore pid=8) INFO 11-25 10:00:40 [default_loader.py:501] Loading weights took 15.00 seconds\n\
        42 (EngineCore pid=8) INFO 11-25 10:00:42 [model_runner.py:424] Model loading took 7.64 GiB memory and 20.000000 seconds\n\
        90 (EngineCore pid=8) INFO 11-25 10:01:30 [monitor.py:78] [backbone] torch.compile took 40.55 s in total\n\
        92 (EngineCore pid=8) INFO 11-25 10:01:32 [monitor.py:91] [backbone] Initial profiling/warmup run took 1.10 s\n\
        110 (EngineCore pid=8) INFO 11-25 10:01:50 [core.py:402] init engine (profile, create kv cache, warmup model) took 67.50 s (compilation: 40.55 s)\n\
        111 (APIServer pid=7) INFO 11-25 10:01:51 [entry.py:140] Starting vLLM server on http://0.0.0.0:8000\n\
        112 INFO:     Application startup complete.";
    assert_eq!(
        parts(log),
        [
            (Part::EngineStart, None, 22.0),
            (Part::Weights, Some(22.0), 42.0),
            (Part::Compile, Some(49.45), 90.0),
            (Part::Warmup, Some(90.0), 110.0),
            (Part::ServerStart, Some(110.0), 112.0),
        ]
    );
}

#[test]
fn longest_of_separate_compilations_counts() {
    let log = "\
        10 [encoder] torch.compile took 2.00 s in total\n\
        60 [backbone] torch.compile took 40.00 s in total\n\
        70 [eagle_head] torch.compile took 3.00 s in total";
    assert_eq!(parts(log), [(Part::Compile, Some(20.0), 60.0)]);
}

#[test]
fn other_logs_have_no_parts() {
    let log = "\
        1 Loading weights took forever\n\
        2 Loading weights took -3.00 seconds\n\
        3 Loading weights took inf seconds\n\
        4 Loading weights took 1e300 seconds\n\
        5 Model loading took 14.25 GiB\n\
        6 torch.compile took 3.00 s\n\
        7 init engine took 3 seconds\n\
        8 Time spent downloading weights for a: b: c seconds\n\
        9 Loading weights took 3.00 minutes\n\
        10 Warming up done.\n\
        11 INFO:     Application startup complete.";
    assert_eq!(parts(log), []);
}

#[test]
fn weights_reloaded_while_serving_are_ignored() {
    let log = "\
        20 Starting to load model a...\n\
        30 Model loading took 1.00 GiB memory and 10.000000 seconds\n\
        40 init engine (profile, create kv cache, warmup model) took 9.00 s\n\
        41 INFO:     Application startup complete.";
    let again = format!("{log}\n90 Loading weights took 5.00 seconds\n91 Starting to load model a...\n");
    assert_eq!(parts(&again), parts(log));
}

fn any_line() -> impl Strategy<Value = String> {
    let seconds = prop_oneof![Just(0.0), 0.0..100.0, Just(1e9)];
    let phrase = proptest::sample::select(vec![
        "Starting to load model a...",
        "Time spent downloading weights for a: N seconds",
        "Loading weights took N seconds",
        "Model loading took 1.00 GiB memory and N seconds",
        "Dynamo bytecode transform time: N s",
        "[backbone] torch.compile took N s in total",
        "Warming up model for the compilation...",
        "Warming up done.",
        "init engine (profile, create kv cache, warmup model) took N s (compilation: 1.00 s)",
        "INFO:     Application startup complete.",
    ]);
    prop_oneof![
        4 => (phrase, seconds).prop_map(|(phrase, seconds)| phrase.replace('N', &format!("{seconds:.2}"))),
        1 => ".{0,80}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parts_never_overlap_nor_end_before_they_begin(
        lines in proptest::collection::vec((any_line(), 0_u64..30_000), 0..40),
        back in any::<bool>(),
    ) {
        let epoch = Instant::now();
        let (mut vllm, mut now) = (VllmLog::default(), 0);
        for (line, wait) in lines {
            // Includes a clock that goes backwards, which `Instant` never does.
            now = if back { wait } else { now + wait };
            let at = epoch + Duration::from_millis(now);
            for seen in vllm.line(&line, at) {
                prop_assert!(back || seen.end <= at, "{seen:?} ends after the line that reported it");
            }
            let mut before: Option<Instant> = None;
            for part in vllm.known.values() {
                let start = part.start.or(before).unwrap_or(part.end);
                prop_assert!(before.is_none_or(|before| before <= start) && start <= part.end, "{:?}", vllm.known);
                before = Some(part.end);
            }
            prop_assert!(vllm.compiling.len() <= VllmLog::MAX_COMPILING);
        }
    }
}
