//! Anteroom: a waiting room in front of LLM serving that scales to zero without losing a request.

// Commands print with `terminal::print`, which survives a closed pipe.
#![deny(clippy::print_stdout)]

pub mod admin;
pub mod admission;
pub mod app;
pub mod bench;
pub mod cli;
pub mod coldstart;
pub mod config;
pub mod demand;
pub mod demo;
pub mod domain;
pub mod drain;
pub mod error;
pub mod grpc;
pub mod guardian;
mod h2_frames;
pub mod history;
pub mod hold;
pub mod kube;
pub mod openai;
mod output;
pub mod peer;
pub mod pick;
pub mod places;
pub mod probe;
pub mod proxy;
pub mod scaler;
pub mod sim;
pub mod state;
mod sync;
pub mod telemetry;
mod terminal;
mod text_table;
pub mod upstream;
