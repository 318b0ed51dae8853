//! Anteroom: a waiting room in front of LLM serving that scales to zero without losing a request.

pub mod admin;
pub mod admission;
pub mod app;
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
pub mod history;
pub mod hold;
pub mod kube;
pub mod openai;
pub mod peer;
pub mod pick;
pub mod probe;
pub mod proxy;
pub mod scaler;
pub mod sim;
pub mod state;
pub mod telemetry;
pub mod upstream;
