//! Knowledge of the OpenAI API and its clients: paths, the model in a body, error formats, SSE framing, the first
//! token, client timeouts.

mod api;
mod dialect;
mod empty;
mod open_event;
mod origin;
mod patience;
mod response;
mod scan;
mod token;
mod wire;

pub use api::{Api, ApiFormat};
pub use dialect::Dialect;
pub use empty::{empty_event, empty_event_before, has_empty_event};
pub use open_event::OpenEvent;
pub use origin::{is_model_error, may_have_run, reports_no_endpoint};
pub use patience::{ClientTimeouts, InvalidMaxWait, MAX_WAIT};
pub use response::{ResponseRequest, creates_stored_response, is_response_id, is_running, response_id};
pub use scan::{MAX_MODEL_BYTES, RoutingFields, ScanError, boundary, scan_json, scan_multipart};
pub use token::{FirstToken, is_event_stream, is_json};
pub use wire::{DONE, MADE_UP_OWNER, model_entry, model_list, sse_comment, sse_data};
