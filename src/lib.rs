//! Anteroom: a waiting room in front of LLM serving that scales to zero without losing a request.

pub mod admission;
pub mod coldstart;
pub mod demand;
pub mod domain;
pub mod error;
pub mod guardian;
pub mod hold;
pub mod openai;
pub mod pick;
pub mod probe;
pub mod scaler;
pub mod sim;
pub mod state;
pub mod telemetry;
