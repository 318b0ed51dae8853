//! Errors during startup.

use std::{io, net::SocketAddr};

use thiserror::Error;

use crate::{coldstart::JournalError, grpc::TlsError, kube::ClusterError, telemetry::traces::TracesError};

/// Error during startup.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum StartError {
    #[error("cannot listen on {address} (`{key}`): {source}{}", hint(.source))]
    Listen { key: &'static str, address: SocketAddr, source: io::Error },
    #[error("cannot start threads for the cluster: {0}")]
    Background(#[source] io::Error),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Report(#[from] JournalError),
    #[error(transparent)]
    Traces(#[from] TracesError),
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program has it: stop that program, or set another address in the file or with a flag"
        }
        io::ErrorKind::PermissionDenied => "; ports below 1024 need extra privileges: use a higher one",
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        _ => "",
    }
}
