//! Faults, and what must hold whatever fails: every admitted request has one outcome, nothing waits beyond its deadline,
//! no process, descriptor or thread stays behind, and nobody spins.
//!
//! Where a process matters, the processes are real: `anteroom serve` and `anteroom sim`, killed by their ids. Where timing
//! matters, everything is in memory on a paused clock. Each test says in its comment what must hold.

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
