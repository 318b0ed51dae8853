//! Replicas of workloads, for scaling without KEDA.

use std::{future::Future, pin::Pin, sync::Arc};

use thiserror::Error;

use crate::domain::Workload;

/// Future of a scale operation.
pub type ScaleFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, ScaleError>> + Send + 'a>>;

/// Reads and writes the number of replicas of workloads.
pub trait Scale: Send + Sync {
    /// Reads the desired number of replicas. Fails permanently if another scaler owns the workload or a permission is
    /// missing.
    fn replicas<'a>(&'a self, namespace: &'a str, workload: &'a Workload) -> ScaleFuture<'a, Replicas>;

    /// Sets `replicas`, if the number has not changed since `seen`.
    fn set<'a>(
        &'a self,
        namespace: &'a str,
        workload: &'a Workload,
        seen: &'a Replicas,
        replicas: u32,
    ) -> ScaleFuture<'a, ()>;
}

/// Desired number of replicas at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// Desired number of replicas.
    pub wanted: u32,
    /// Resource version, which changes with the workload.
    pub version: Option<String>,
}

/// Error of a scale operation.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ScaleError {
    #[error("the workload was changed concurrently")]
    Conflict,
    #[error("{0}")]
    Refused(Arc<str>),
    #[error("the API server does not answer: {0}")]
    Unavailable(Arc<str>),
}

/// Scale without a cluster: every operation is refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoScale;

impl Scale for NoScale {
    fn replicas<'a>(&'a self, _: &'a str, _: &'a Workload) -> ScaleFuture<'a, Replicas> {
        Box::pin(async { Err(ScaleError::Refused("no Kubernetes cluster is configured".into())) })
    }

    fn set<'a>(&'a self, _: &'a str, _: &'a Workload, _: &'a Replicas, _: u32) -> ScaleFuture<'a, ()> {
        Box::pin(async { Err(ScaleError::Refused("no Kubernetes cluster is configured".into())) })
    }
}
