//! Errors of the demo.

use std::io;

use thiserror::Error;

use crate::{app::StartError, config::ConfigError, output::OutputError};

#[derive(Debug, Error)]
pub(super) enum DemoError {
    #[error(transparent)]
    Json(#[from] OutputError),
    #[error("cannot determine the path of this executable, which is the stand-in for the model server: {0}")]
    Program(io::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the proxy has stopped")]
    Stopped,
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
    #[error("cannot connect to the proxy: {0}")]
    Connect(io::Error),
    #[error("HTTP handshake with the proxy failed: {0}")]
    Handshake(hyper::Error),
}
