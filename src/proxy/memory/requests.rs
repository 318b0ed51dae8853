//! Memory of requests besides their bodies: while a body is awaited, and from admission to the end.

use std::sync::{Arc, atomic::Ordering};

use http::{Version, request};

use super::totals::{Memory, take};
use crate::config::budget::{STREAM_COST_BYTES, UNCOUNTED_HEAD_BYTES, max_request_bytes};

/// Memory of an admitted request besides its body, released on drop.
#[derive(Debug)]
pub struct RequestShare {
    memory: Arc<Memory>,
    bytes: usize,
}

/// Memory of a field in a `HeaderMap` besides its text, in bytes.
const FIELD_COST_BYTES: usize = 112;

// === impl Memory ===

impl Memory {
    /// Counts an admitted request. Returns `Ok(None)` if the cost of its connection covers it.
    ///
    /// # Errors
    /// There is no room. Returns the bound of all request bodies in bytes, from which that of requests is derived.
    pub(in crate::proxy) fn request(
        self: &Arc<Self>,
        head: &request::Parts,
    ) -> Result<Option<RequestShare>, usize> {
        let bytes = request_bytes(head);
        if bytes == 0 {
            return Ok(None);
        }
        if !take(&self.request_states, bytes, max_request_bytes(self.max())) {
            return Err(self.max());
        }
        Ok(Some(RequestShare { memory: self.clone(), bytes }))
    }
}

/// Returns the bytes of a request besides its body, beyond those covered by the cost of its connection.
pub(in crate::proxy) fn request_bytes(head: &request::Parts) -> usize {
    match head.version {
        Version::HTTP_2 => STREAM_COST_BYTES + head_bytes(head),
        _ => head_bytes(head).saturating_sub(UNCOUNTED_HEAD_BYTES),
    }
}

fn head_bytes(head: &request::Parts) -> usize {
    let texts: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let path = head.uri.path_and_query().map_or(0, |path| path.as_str().len());
    texts + path + head.headers.capacity() * FIELD_COST_BYTES
}

// === impl RequestShare ===

impl Drop for RequestShare {
    fn drop(&mut self) {
        self.memory.request_states.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(version: Version, bytes: usize) -> request::Parts {
        let request = Request::get("/").version(version).header("x", "x".repeat(bytes));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn requests_count_up_to_a_bound() {
        let memory = Memory::new(64 << 20);
        let used = || memory.request_states.load(Ordering::Relaxed);
        let request = |version, bytes| memory.request(&head(version, bytes));
        assert!(matches!(request(Version::HTTP_11, 1000), Ok(None)));
        let large = request(Version::HTTP_11, 60_000).unwrap().unwrap();
        assert!((52_000..54_000).contains(&used()), "{}", used());
        drop(large);
        let stream = request(Version::HTTP_2, 1000).unwrap().unwrap();
        assert!((9_000..10_500).contains(&used()), "{}", used());
        // The bound is a quarter of 64 MiB.
        let mut all = vec![stream];
        while let Ok(Some(more)) = request(Version::HTTP_2, 60_000) {
            all.push(more);
        }
        assert_eq!(all.len(), 1 + (16 << 20) / 69_000);
        assert!(used() <= 16 << 20);
        drop(all);
        assert_eq!(used(), 0);
    }
}
