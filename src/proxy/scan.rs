//! Scanning request bodies for the model and `stream`, large ones on blocking threads.

use std::{num::NonZeroUsize, panic::resume_unwind, sync::Arc};

use bytes::Bytes;
use http::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};
use tokio::{runtime::Handle, sync::Semaphore, task::spawn_blocking};

use crate::{
    error::ProxyError,
    openai::{self, ApiFormat, RoutingFields, ScanError},
};

/// Largest body scanned on the serving thread. As JSON this takes a fraction of a millisecond, as a form a few.
const MAX_INLINE_SCAN_BYTES: usize = 256 << 10;

/// Scans request bodies. Concurrent scans of large ones are bounded to half of the cores, in FIFO order.
#[derive(Debug)]
pub struct BodyScanner {
    permits: Arc<Semaphore>,
}

/// Returns the content encoding of a request body, unless it is `identity`.
pub(super) fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?;
    (!encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
        .then(|| String::from_utf8_lossy(encoding.as_bytes()).into_owned())
}

// === impl BodyScanner ===

impl BodyScanner {
    /// Extracts the model and `stream` from a body.
    pub(super) async fn scan(
        &self,
        shape: ApiFormat,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<RoutingFields, ScanError> {
        let content_type = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let boundary = match shape {
            ApiFormat::Form => Some(openai::boundary(content_type).ok_or(ScanError::NoForm)?),
            _ => None,
        };
        // The rare cases are boxed to keep the future of small JSON bodies small.
        let scan = match boundary {
            boundary if body.len() > MAX_INLINE_SCAN_BYTES => {
                Box::pin(self.scan_on_blocking_thread(body.clone(), boundary)).await
            }
            Some(boundary) => Box::pin(openai::scan_multipart(body.clone(), &boundary)).await,
            None => openai::scan_json(body),
        }?;
        match &scan.model {
            Some(model) if model.len() > openai::MAX_MODEL_BYTES => Err(ScanError::ModelTooLong(model.len())),
            _ => Ok(scan),
        }
    }

    /// Scans a body on a blocking thread, so that it does not delay the other requests of this thread.
    async fn scan_on_blocking_thread(
        &self,
        body: Bytes,
        boundary: Option<String>,
    ) -> Result<RoutingFields, ScanError> {
        let stopping = || ScanError::Malformed("it was not read to its end, as the proxy is stopping".into());
        // The semaphore is never closed.
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| stopping())?;
        let runtime = Handle::current();
        let scanning = spawn_blocking(move || {
            // Held until the scan ends, even if the client disconnects.
            let _permit = permit;
            match boundary {
                Some(boundary) => runtime.block_on(openai::scan_multipart(body, &boundary)),
                None => openai::scan_json(&body),
            }
        });
        scanning.await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => Err(stopping()),
        })
    }
}

impl Default for BodyScanner {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { permits: Arc::new(Semaphore::new(cores.div_ceil(2))) }
    }
}

impl From<ScanError> for ProxyError {
    fn from(error: ScanError) -> Self {
        Self::InvalidRequest(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use http::HeaderValue;

    use super::*;

    fn form(parts: usize) -> Bytes {
        let other = "--b\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n\r\n".repeat(parts);
        let model = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ntiny\r\n--b--\r\n";
        Bytes::from(other + model)
    }

    fn json(bytes: usize) -> Bytes {
        Bytes::from(format!(r#"{{"model":"tiny","input":"{}"}}"#, "x".repeat(bytes)))
    }

    #[tokio::test]
    async fn large_body_is_scanned_on_another_thread() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=b"));
        let scan = Ok(RoutingFields { model: Some("tiny".into()), stream: false });
        let scanner = BodyScanner::default();
        for (shape, small, large) in [
            (ApiFormat::Form, form(1), form(10_000)),
            (ApiFormat::Chat, json(1), json(MAX_INLINE_SCAN_BYTES)),
        ] {
            let places = u32::try_from(scanner.permits.available_permits()).unwrap();
            let all = scanner.permits.acquire_many(places).await.unwrap();
            assert_eq!(scanner.scan(shape, &headers, &small).now_or_never(), Some(scan.clone()));
            let mut scanning = Box::pin(scanner.scan(shape, &headers, &large));
            assert_eq!(
                scanning.as_mut().now_or_never(),
                None,
                "waits for a permit without blocking the thread"
            );
            drop(all);
            assert_eq!(scanning.await, scan);
        }
    }
}
