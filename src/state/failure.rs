//! Detection of starts that fail again for the same reason.

use parking_lot::Mutex;

/// Cause of a failed start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Persists until it is fixed: a bad argument, too little memory, a missing image.
    Lasting,
    /// May resolve itself: a timeout, a full node.
    Passing,
}

/// Reason of the last start, if it failed for a lasting cause.
#[derive(Debug, Default)]
pub(super) struct LastFailure(Mutex<Option<Box<str>>>);

// === impl LastFailure ===

impl LastFailure {
    /// Records a failed start. Returns whether the one before failed for the same reason.
    pub(super) fn record(&self, reason: &str, cause: Cause) -> bool {
        let reason = (cause == Cause::Lasting).then(|| without_variables(reason).into_boxed_str());
        let repeats = reason.is_some() && *self.0.lock() == reason;
        *self.0.lock() = reason;
        repeats
    }

    /// Clears the reason after a successful start.
    pub(super) fn forget(&self) {
        *self.0.lock() = None;
    }
}

/// Removes the words that differ between starts: times, addresses, process ids, sizes, pod names, restart counts. Exit
/// codes stay.
fn without_variables(reason: &str) -> String {
    let mut kept = String::with_capacity(reason.len());
    let mut before = "";
    for word in reason.split_whitespace() {
        let word = word.trim_matches(|char: char| !char.is_alphanumeric());
        let of_restarts = matches!(word, "restarted" | "once" | "times");
        let varies = word.contains(|char: char| char.is_ascii_digit()) && before != "code";
        if !(word.is_empty() || of_restarts || varies || before.eq_ignore_ascii_case("pod")) {
            kept.push_str(word);
            kept.push(' ');
        }
        before = word;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_repeats_only_for_the_same_lasting_reason() {
        let last = LastFailure::default();
        let oom = |pid: u32, free: &str| {
            format!(
                "the command exited with code 1 while loading; its last line: (EngineCore pid={pid}) ERROR 11-29 20:0{pid} \
                 torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB; {free} GiB is free at 0x7f{pid}a."
            )
        };
        assert!(!last.record(&oom(7, "3.5"), Cause::Lasting), "the first one");
        assert!(last.record(&oom(8, "3.25"), Cause::Lasting));
        assert!(last.record(&oom(9, "4"), Cause::Lasting), "and every one after it");
        assert!(!last.record(&oom(9, "4").replace("code 1", "code 2"), Cause::Lasting), "another exit code");
        assert!(!last.record(&oom(9, "4"), Cause::Lasting), "not in a row");
        last.forget();
        assert!(!last.record(&oom(9, "4"), Cause::Lasting), "it was up meanwhile");
        assert!(!last.record(&oom(9, "4"), Cause::Passing));
        assert!(!last.record(&oom(9, "4"), Cause::Passing));
        assert!(!last.record(&oom(9, "4"), Cause::Lasting), "time ran out in between");
    }

    #[test]
    fn cluster_failure_reason_ignores_the_pod_name() {
        for (one, other, same) in [
            (
                "Pod `m-7f9c-abcde`: container `vllm` was ended for want of memory (OOMKilled, restarted once): raise it",
                "Pod `m-7f9c-xkzqw`: container `vllm` was ended for want of memory (OOMKilled, restarted 3 times): raise it",
                true,
            ),
            (
                "Pod `m-abcde`: container `vllm` ended after 12 s with exit code 2 (Error): no such option: --modell",
                "Pod `m-xkzqw`: container `vllm` ended after 9 s with exit code 2 (Error, restarted once): no such option: --modell",
                true,
            ),
            (
                "Pod `m-abcde`: container `vllm` ended after 12 s with exit code 2 (Error): no such option: --modell",
                "Pod `m-abcde`: container `vllm` ended after 12 s with exit code 2 (Error): no such option: --dtyp",
                false,
            ),
        ] {
            let last = LastFailure::default();
            last.record(one, Cause::Lasting);
            assert_eq!(last.record(other, Cause::Lasting), same, "{one} / {other}");
        }
    }
}
