//! Anteroom: a waiting room in front of LLM serving that scales to zero without losing a request.

pub mod admin;
pub mod admission;
pub mod coldstart;
pub mod config;
pub mod demand;
pub mod domain;
pub mod error;
pub mod hold;
pub mod openai;
pub mod pick;
pub mod proxy;
pub mod sim;
pub mod state;
pub mod telemetry;
pub mod upstream;
