use super::*;

/// 2026-11-02T08:15:00Z.
const AT: i64 = 1_793_607_300_000;

fn requests(text: &str) -> Vec<(i64, Option<u64>)> {
    parse("log", text).unwrap().requests.iter().map(|request| (request.at - AT, request.service)).collect()
}

#[test]
fn first_line_determines_the_format() {
    for text in [
        "time,duration_ms\n2026-11-02T08:15:00Z,1500\n2026-11-02T09:15:00.250+01:00,\n",
        "# comment\n\nid,timestamp,duration_s\n1,1793607300,1.5\n2,1793607300.25,\n",
        "1793607300000,1500\n1793607300250\n",
        "\"2026-11-02T08:15:00Z\", \"1500\"\n\"2026-11-02 08:15:00.25Z\"\n",
        "{\"ts\": 1793607300, \"duration_ms\": 1500}\n{\"timestamp\": \"2026-11-02T08:15:00.25Z\"}\n",
        "{\"time_iso8601\":\"2026-11-02T08:15:00+00:00\",\"request_time\":\"1.500\"}\n{\"ts\":1793607300250000000}\n",
    ] {
        assert_eq!(requests(text), [(0, Some(1500)), (250, None)], "{text}");
    }
}

#[test]
fn access_logs_are_parsed_and_filtered() {
    let envoy = "[2026-11-02T08:15:00.250Z] \"POST /v1/chat/completions?x=1 HTTP/1.1\" 200 - 154 9021 1500 1498 \"-\" \
                 \"openai-python\" \"id\" \"llm\" \"10.0.0.1:8000\"\n\
                 [2026-11-02T08:15:01.000Z] \"GET /health HTTP/1.1\" 200 - 0 0 1 0 \"-\"\n";
    let parsed = parse("envoy", envoy).unwrap();
    assert_eq!(parsed.requests, [LoggedRequest { at: AT + 250, service: Some(1500) }]);
    assert_eq!((parsed.without_work, parsed.skipped), (1, 0));
    // nginx logs the end of a request.
    let nginx = "10.0.0.1 - - [02/Nov/2026:09:15:03 +0100] \"POST /v1/completions HTTP/1.1\" 200 15 \"-\" \"curl/8\" 1.500\n\
                 10.0.0.1 - ann [02/Nov/2026:09:15:03 +0100] \"POST /v1/completions HTTP/1.1\" 200 15 \"-\" \"curl/8\"\n\
                 10.0.0.1 - - [02/Nov/2026:09:15:03 +0100] \"GET /v1/models HTTP/1.1\" 200 15 \"-\" \"curl/8\"\n";
    assert_eq!(requests(nginx), [(1500, Some(1500)), (3000, None)]);
}

#[test]
fn invalid_lines_are_counted_up_to_half() {
    let parsed = parse("log", "time\n2026-11-02T08:15:00Z\nyesterday\n2026-11-02T08:16:00Z\n").unwrap();
    assert_eq!((parsed.requests.len(), parsed.skipped), (2, 1));
    let (line, reason) = parsed.first_skipped.unwrap();
    assert!(line == 3 && reason.contains("yesterday"), "{line}: {reason}");
    for (text, expected) in [
        ("", "empty"),
        ("hello world\n", "neither a request nor a header"),
        ("time\nyesterday\n", "line 2"),
        ("time,duration_ms\n2026-11-02T08:15:00Z,-1\n", "not a duration"),
        ("{\"a\": 1}\n", "no time"),
        ("[2026-11-02T08:15:00Z] \"GET / HTTP/1.1\" 200 - 0 0 1 0\n", "none of its 1 requests needs"),
        ("time\n2026-11-02T08:15:00\n", "with an offset"),
    ] {
        let error = parse("log", text).unwrap_err().to_string();
        assert!(error.starts_with("log: ") && error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn window_spans_requests_or_whole_days() {
    let hour = 3_600_000;
    let at = |hours: i64| LoggedRequest { at: AT + hours * hour, service: Some(60_000) };
    let trace = RequestLog::new(vec![at(2), at(0)], None, None).unwrap();
    assert_eq!((trace.from, trace.to, trace.requests[0]), (AT, AT + 2 * hour + 60_000, at(0)));
    let trace = RequestLog::new(vec![at(0), at(30)], None, None).unwrap();
    assert_eq!(
        (stamp(trace.from), stamp(trace.to)),
        ("2026-11-02T00:00:00Z".into(), "2026-11-04T00:00:00Z".into())
    );
    assert_eq!(trace.window_ms(), 2 * 24 * 3_600_000);
    let trace = RequestLog::new(vec![at(0), at(30)], Some(AT + 1), Some(AT + 31 * hour)).unwrap();
    assert_eq!((trace.requests.len(), trace.window_ms()), (1, 31 * 3_600_000 - 1));
    assert!(RequestLog::new(vec![at(0)], Some(AT + 1), None).unwrap_err().contains("no requests between"));
    assert!(RequestLog::new(vec![at(0)], None, Some(AT)).unwrap_err().contains("before it starts"));
    assert_eq!(parse("csv", &trace.to_csv()).unwrap().requests, trace.requests);
}
