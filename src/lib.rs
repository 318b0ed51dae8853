//! Anteroom: a waiting room in front of LLM serving that scales to zero without losing a request.

pub mod sim;
