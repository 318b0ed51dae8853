//! Clients and model servers that mean harm, over raw sockets: what they send is made by hand, byte by byte.
//!
//! `docs/security.md` has the threat model, and a table of limits that names these tests.

// The exemption for tests knows functions marked as such, not the helpers of a test file.
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
