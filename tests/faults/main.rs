//! Faults, and the invariants under any of them: every admitted request has exactly one outcome, nothing waits beyond
//! its deadline, no process, descriptor or thread is left behind, and nothing spins.
//!
//! Where processes matter, they are real: `anteroom serve` and `anteroom sim`, killed by pid. Where timing matters,
//! everything runs in memory on a paused clock. The comment of each test states its invariants.

#![allow(clippy::unwrap_used, reason = "the helpers are test code too")]

#[expect(dead_code, reason = "other suites use the rest of it")]
#[path = "../support/marked.rs"]
mod marked;
#[expect(dead_code, reason = "other suites use the rest of it")]
#[path = "../support/mod.rs"]
mod support;

mod budget;
mod chaos;
mod clients;
mod clock;
mod descriptors;
mod flaps;
mod garbage;
mod killed;
mod law;
mod logs;
mod memory;
mod panics;
mod poison;
mod rolling;
mod served;
mod silent;
mod sim;
mod storms;
