//! Phases of a cold start, parsed from arbitrary output of a model server.

use std::{collections::BTreeMap, time::Duration};

use anteroom::coldstart::VllmLog;
use tokio::time::Instant;

/// Checks an input that is the output, with one second between lines.
pub fn holds(printed: &[u8]) {
    let text = String::from_utf8_lossy(printed);
    let mut log = VllmLog::default();
    let mut known = BTreeMap::new();
    // Late enough for any duration in the log to start in the past.
    let mut at = Instant::now() + Duration::from_secs(100 * 24 * 3600);
    for line in text.lines() {
        at += Duration::from_secs(1);
        for seen in log.line(line, at) {
            assert!(seen.end <= at, "{line:?} tells of the future: {seen:?}");
            assert!(seen.start.is_none_or(|start| start <= seen.end), "{line:?}: {seen:?}");
            known.insert(seen.part, seen);
        }
        for (one, next) in known.values().zip(known.values().skip(1)) {
            let begins = next.start.unwrap_or(next.end);
            assert!(one.end <= begins, "after {line:?} these overlap: {one:?}, {next:?}");
        }
    }
}
