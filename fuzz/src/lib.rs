//! Properties that must hold for any input. The fuzz targets run them on generated inputs, and
//! `cargo test --test corpus` on every file of `fuzz/corpus`.

pub mod client_bytes;
pub mod config;
pub mod cuts;
pub mod external_scaler;
pub mod h2_unread;
pub mod model_scan;
pub mod multipart;
pub mod route_match;
pub mod sse_framing;
pub mod vllm_log;

/// A check that panics if the property does not hold for an input.
pub type Property = fn(&[u8]);

/// All properties with their names, which are also those of the fuzz target and the corpus folder.
pub const PROPERTIES: &[(&str, Property)] = &[
    ("client_bytes", client_bytes::holds),
    ("config", config::holds),
    ("external_scaler", external_scaler::holds),
    ("h2_unread", h2_unread::holds),
    ("model_scan", model_scan::holds),
    ("multipart", multipart::holds),
    ("route_match", route_match::holds),
    ("sse_framing", sse_framing::holds),
    ("vllm_log", vllm_log::holds),
];
