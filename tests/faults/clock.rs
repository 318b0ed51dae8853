//! The wall clock jumps. Deadlines, backoffs and durations use the monotonic clock, which does not jump; only
//! timestamps use the wall clock. No Linux namespace shifts the wall clock, and setting it affects the whole machine,
//! so a preloaded library shifts it in one process. `.ci/run` installs the library and runs these tests.
//!
//! Suspension: Linux's monotonic clock (`CLOCK_MONOTONIC`) stops while the machine is suspended, so deadlines move by
//! that time. Servers are not suspended with requests in them; on a laptop the request simply stays held.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{
    served::{ANTEROOM, ProxyProcess, arguments},
    support::{
        TestUpstream, route, routes, until,
        wire::{CHAT, chat, post_with},
    },
};

/// Wall clock of a proxy process.
struct FakeWallClock {
    file: tempfile::NamedTempFile,
    library: PathBuf,
}

// === impl FakeWallClock ===

impl FakeWallClock {
    fn new() -> Self {
        let library =
            std::env::var_os("ANTEROOM_FAKETIME").expect("ANTEROOM_FAKETIME names libfaketimeMT.so.1");
        let clock = Self { file: tempfile::NamedTempFile::new().unwrap(), library: library.into() };
        clock.set_wall_clock("+0");
        clock
    }

    /// Sets the clock to this offset from real time, or (`@…`) to this time.
    fn set_wall_clock(&self, to: &str) {
        let next = self.file.path().with_extension("next");
        fs::write(&next, format!("{to}\n")).unwrap();
        fs::rename(next, self.file.path()).unwrap();
    }

    async fn serve(&self, config: &str) -> ProxyProcess {
        ProxyProcess::spawn(config, |folder| {
            let mut command = Command::new(ANTEROOM);
            command
                .args(arguments(folder))
                .env("LD_PRELOAD", &self.library)
                .env("FAKETIME_TIMESTAMP_FILE", self.file.path())
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command
        })
        .await
    }
}

/// Asserts that a cold-start record is consistent: phases are not negative, do not overlap, and sum to a total that is
/// plausible for this test.
fn assert_consistent_record(record: &Value) {
    let ms = |value: &Value| value.as_f64().unwrap();
    let total = ms(&record["total_ms"]);
    assert!((0.0..600_000.0).contains(&total), "{record:#}");
    let mut end = 0.0;
    for phase in record["phases"].as_array().unwrap() {
        assert!(
            (ms(&phase["start_ms"]) - end).abs() < 1e-3 && ms(&phase["duration_ms"]) >= 0.0,
            "{record:#}"
        );
        end = ms(&phase["start_ms"]) + ms(&phase["duration_ms"]);
    }
    assert!((end - total).abs() < 1e-3, "{record:#}");
}

/// Jumps ten years ahead, ten back, and to the first second of 1970 while requests are held during a cold start. No
/// request fails before its deadline or waits beyond it, the admin API responds, and its values are sane. The next run
/// can read records from before and after the jumps.
#[tokio::test]
#[ignore = "needs libfaketime, as in .ci/run faults"]
async fn held_requests_survive_wall_clock_jumps() {
    let clock = FakeWallClock::new();
    let reports = tempfile::tempdir().unwrap();
    let mut upstream = TestUpstream::cold().await;
    let config = format!(
        "report: {{ dir: {:?} }}\n{}",
        reports.path(),
        routes(&[route("tiny", &upstream.url(), "hold: { timeout: 10m }, scaling: { linger: 0s }")])
    );
    let proxy = clock.serve(&config).await;
    let jumps = ["+3650d", "-3650d", "@1970-01-01 00:00:00", "+0"];
    for (number, jump) in jumps.into_iter().enumerate() {
        let mut held = proxy.sent(chat("held")).await;
        proxy.held(1).await;
        until("a cold start", async || proxy.tiny().await["state"] == "starting").await;
        clock.set_wall_clock(jump);
        // A deadline that starts after the jump; the held request has one that started before it.
        let mut impatient =
            proxy.sent(post_with(CHAT, &[("x-anteroom-max-wait", "1")], r#"{"model":"tiny"}"#)).await;
        impatient.response().await.is_error(504, "cold_start_timeout");
        let route = proxy.tiny().await;
        assert_eq!(route["held"], 1, "{jump}: {route:#}");
        let oldest = route["oldest_held_ms"].as_f64().unwrap();
        assert!((1000.0..600_000.0).contains(&oldest), "{jump}: {route:#}");
        for path in ["/api/v1/requests", "/api/v1/cold-starts"] {
            assert!(proxy.admin(path).await.is_object(), "{jump}: {path}");
        }
        upstream.wake();
        upstream.call().await.echo().await;
        assert_eq!(held.response().await.status(), 200, "{jump}");
        until("a record", async || {
            proxy.admin("/api/v1/cold-starts").await["cold_starts"].as_array().unwrap().len() == number + 1
        })
        .await;
        // Returns the target to zero: the request fails on a stale connection, which does not count as a try, and then
        // on two tries; the server is asleep by the time the last try fails.
        let gone = upstream.requests();
        let mut client = proxy.sent(chat("breaks")).await;
        for _ in 0..2 {
            upstream.call().await.reset();
        }
        let call = upstream.call().await;
        upstream.sleep();
        call.reset();
        client.response().await.is_error(502, "upstream_error");
        assert_eq!(upstream.requests(), gone + 3);
        until("nothing to be up", async || proxy.tiny().await["state"] != "ready").await;
    }
    let records = proxy.admin("/api/v1/cold-starts").await;
    let records_of = records["cold_starts"].as_array().unwrap();
    records_of.iter().for_each(assert_consistent_record);
    // Each record began before one jump and after the previous one, which proves that the clock jumped.
    let began = |record: &Value| record["started_at"].as_str().unwrap()[..4].parse::<i32>().unwrap();
    let years: Vec<_> = records_of.iter().map(|record| began(record) - began(&records_of[3])).collect();
    assert!(years[0] < -40 && (-11..=-9).contains(&years[1]) && (9..=11).contains(&years[2]), "{years:?}");
    let requests = proxy.admin("/api/v1/requests").await;
    assert!(!requests["requests"].as_array().unwrap().is_empty());
    assert_eq!(proxy.count_log_lines("panicked"), 0, "{}", proxy.log());
    let outcomes = proxy.stop().await;
    outcomes.assert_outcomes(&[("cold_start_timeout", 4), ("completed", 4), ("upstream_error", 4)]);

    let proxy = clock.serve(&config).await;
    let again = proxy.admin("/api/v1/cold-starts").await;
    assert_eq!(again["cold_starts"].as_array().unwrap().len(), records_of.len());
    proxy.stop().await.assert_outcomes(&[]);
}
