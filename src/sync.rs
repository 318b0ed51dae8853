//! Atomics and the mutex of types that `tests/models.rs` compiles a second time, with loom's in their place.

pub(crate) use std::sync::atomic;

pub(crate) use parking_lot::Mutex;
