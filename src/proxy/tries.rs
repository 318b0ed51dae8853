//! The failed dispatches of one request: whether it may be written again, and what is to blame.

use std::time::Duration;

use crate::{state::Endpoint, upstream::Reuse};

/// Counts the failed dispatches of a request.
///
/// - A dispatch that wrote nothing (refused, no answer to a SYN, a gateway without an endpoint) uses nothing up: it is
///   repeated until the deadline. Neither does a stale pooled connection, which [`crate::upstream`] replaces itself.
/// - A write that an endpoint broke off uses up one of [`MAX_TRIES`]. But a process or pod uses up only one, however often
///   the request is written to it while it dies.
/// - So does a write to a pod that the cluster says is gone: it uses up nothing but the write.
/// - Once the endpoint has answered its probe or another request, it lives, and the request is to blame: from then on its
///   writes count as those to another process. Those to an address behind which anything may stand always count so.
/// - [`MAX_WRITES`] bounds all of them.
#[derive(Debug, Default)]
pub(super) struct Tries {
    /// The request may be written only once, since its application may do twice what it is asked twice.
    is_once: bool,
    /// On the heap: most requests have none, and held ones would keep room for it.
    failed: Option<Box<Failed>>,
}

#[derive(Debug)]
struct Failed {
    dispatches: u32,
    writes: u8,
    tries: u8,
    /// The endpoint of the last write that was broken off, and how often it had answered after failures by then.
    broken_by: Option<(u64, u32)>,
    /// It had answered in between.
    is_to_blame: bool,
    last: String,
}

/// How many processes or pods may break a request off.
const MAX_TRIES: u8 = 2;

/// How many times a request may be written in all.
const MAX_WRITES: u8 = 4;

/// The longest rest between two writes; the shortest is [`Endpoint::BACKOFF`], doubled with each.
const MAX_REST: Duration = Duration::from_secs(1);

// === impl Tries ===

impl Tries {
    /// A request that has not been sent.
    pub(super) const fn new(is_once: bool) -> Self {
        Self { is_once, failed: None }
    }

    /// Which connection it may take next.
    pub(super) const fn reuse(&self) -> Reuse {
        match &self.failed {
            _ if self.is_once => Reuse::Once,
            Some(_) => Reuse::Never,
            None => Reuse::Pooled,
        }
    }

    /// Counts a dispatch that wrote nothing. Another one is always allowed.
    pub(super) fn missed(&mut self, reason: &str) -> bool {
        self.failed(reason);
        true
    }

    /// Counts a write that the endpoint broke off. Returns whether another one is allowed.
    pub(super) fn broken_off(&mut self, endpoint: &Endpoint, reason: &str) -> bool {
        let is_once = self.is_once;
        let failed = self.failed(reason);
        failed.writes += 1;
        let answers = endpoint.answers();
        let before = failed.broken_by.replace((endpoint.id(), answers));
        failed.is_to_blame = before.is_some_and(|before| before.0 == endpoint.id() && before.1 != answers);
        let is_counted = before.is_some_and(|before| before == (endpoint.id(), answers));
        if !(is_counted && endpoint.is_single()) {
            failed.tries += 1;
        }
        !is_once && failed.tries < MAX_TRIES && failed.writes < MAX_WRITES
    }

    /// Counts a write to an endpoint that is gone, which says nothing of the request. Returns whether another one is
    /// allowed.
    pub(super) fn lost(&mut self, reason: &str) -> bool {
        let is_once = self.is_once;
        let failed = self.failed(reason);
        failed.writes += 1;
        !is_once && failed.writes < MAX_WRITES
    }

    /// How long it rests before it may meet the endpoint again that broke it off.
    pub(super) fn rest(&self) -> Duration {
        let writes = self.failed.as_ref().map_or(0, |failed| failed.writes);
        MAX_REST.min(Endpoint::BACKOFF * 2_u32.saturating_pow(u32::from(writes.saturating_sub(1))))
    }

    /// How often it was sent and why that is the end of it, to follow the last error; `is_left`: there is a body to send.
    pub(super) fn verdict(&self, is_left: bool) -> String {
        let Some(failed) = &self.failed else { return String::new() };
        let why = match failed.writes {
            0 => return String::new(),
            _ if self.is_once => ", and its method is not safe to repeat",
            _ if !is_left => ", and its body, which streamed, is gone",
            _ if failed.is_to_blame => {
                ", and the server answered a probe or others in between, so the request is probably at fault"
            }
            _ => "",
        };
        format!("; the request was sent {}{why}", times(failed.writes.into()))
    }

    /// What has become of it so far; `None` if nothing has failed.
    pub(super) fn so_far(&self) -> Option<String> {
        let Failed { dispatches, last, .. } = &**self.failed.as_ref()?;
        Some(format!("It was dispatched {} before; the last error: {last}.", times(*dispatches)))
    }

    fn failed(&mut self, reason: &str) -> &mut Failed {
        let failed = self.failed.get_or_insert_with(|| {
            Box::new(Failed {
                dispatches: 0,
                writes: 0,
                tries: 0,
                broken_by: None,
                is_to_blame: false,
                last: String::new(),
            })
        });
        failed.dispatches = failed.dispatches.saturating_add(1);
        failed.last.clear();
        failed.last.push_str(reason);
        failed
    }
}

fn times(number: u32) -> String {
    match number {
        1 => "once".into(),
        2 => "twice".into(),
        number => format!("{number} times"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::FrontKind;

    fn pod() -> std::sync::Arc<Endpoint> {
        Endpoint::new("10.0.0.1:8000", 1)
    }

    #[test]
    fn a_dying_pod_counts_once_and_the_next_is_the_last() {
        let (dying, next) = (pod(), pod());
        let mut tries = Tries::default();
        assert_eq!(tries.reuse(), Reuse::Pooled);
        assert!(tries.broken_off(&dying, "x") && tries.broken_off(&dying, "x"));
        assert_eq!((tries.reuse(), tries.rest().as_millis()), (Reuse::Never, 100), "50, 100");
        assert!(!tries.broken_off(&next, "x"));
        assert_eq!(tries.verdict(true), "; the request was sent 3 times");
    }

    #[test]
    fn no_request_is_written_more_than_four_times() {
        let dying = pod();
        let mut tries = Tries::default();
        for _ in 0..3 {
            assert!(tries.broken_off(&dying, "x"));
        }
        assert!(!tries.broken_off(&dying, "x"));
    }

    #[test]
    fn a_pod_that_answers_in_between_blames_the_request() {
        let healthy = pod();
        let mut tries = Tries::default();
        assert!(tries.broken_off(&healthy, "x"));
        healthy.vouch();
        assert!(!tries.broken_off(&healthy, "x"));
        assert!(tries.verdict(true).ends_with("so the request is probably at fault"));
    }

    #[test]
    fn an_address_of_anything_counts_each_time() {
        let url = Endpoint::fronting(FrontKind::Url, "10.0.0.1:8000", 1);
        let mut tries = Tries::default();
        assert!(tries.broken_off(&url, "x") && !tries.broken_off(&url, "x"));
    }

    #[test]
    fn a_dispatch_that_wrote_nothing_uses_nothing_up() {
        let (pod, mut tries) = (pod(), Tries::default());
        assert_eq!(tries.so_far(), None);
        assert!((0..100).all(|_| tries.missed("nobody listens")));
        assert_eq!(
            tries.so_far().unwrap(),
            "It was dispatched 100 times before; the last error: nobody listens."
        );
        assert_eq!(tries.verdict(true), "");
        assert!(tries.broken_off(&pod, "x"));
    }

    #[test]
    fn pods_that_are_gone_use_up_writes_and_no_tries() {
        let mut tries = Tries::default();
        assert!(tries.lost("gone") && tries.lost("gone") && tries.broken_off(&pod(), "x"));
        assert!(!tries.lost("gone"), "the fourth write");
        assert!(!Tries::new(true).lost("gone"), "it may have been done");
    }

    #[test]
    fn what_may_be_done_once_is_written_once() {
        let mut tries = Tries::new(true);
        assert_eq!(tries.reuse(), Reuse::Once);
        assert!(tries.missed("refused"));
        assert!(!tries.broken_off(&pod(), "x"));
        assert_eq!(tries.verdict(true), "; the request was sent once, and its method is not safe to repeat");
    }
}
