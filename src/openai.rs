//! What we know of the OpenAI API and of its clients: paths, the model in a body, error bodies, SSE framing, patience.

mod api;
mod patience;
mod scan;
mod wire;

pub use api::{Api, Shape};
pub use patience::{InvalidMaxWait, MAX_WAIT, Patience};
pub use scan::{Scan, ScanError, boundary, scan_json, scan_multipart};
pub use wire::{
    DONE, empty_chunk, error_body, error_event, model, model_list, says_no_endpoint, sse_comment, sse_data,
    upstream_error_event,
};
