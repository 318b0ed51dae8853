//! Hostile clients and model servers over raw sockets; their bytes are hand-made.
//!
//! `docs/security.md` has the threat model, and a table of limits that names these tests.

// Clippy's exemption for tests covers functions marked as tests, not the helpers of a test file.
#![allow(clippy::unwrap_used)]

mod bodies;
mod documented;
mod downgrade;
mod frames;
mod grpc_calls;
mod h2_floods;
mod h2_resets;
mod heads;
mod idle;
mod limited;
mod listeners;
mod memory;
mod partial_heads;
mod recorder;
mod relays;
mod served;
mod slow;
mod smuggling;
mod unread;
mod upstreams;
mod wake;

#[allow(dead_code, reason = "what end-to-end tests share, of which these need less")]
#[path = "../support/mod.rs"]
mod support;
