//! How many replicas there are, for who scales without KEDA.

use std::{future::Future, pin::Pin, sync::Arc};

use thiserror::Error;

use crate::domain::Workload;

/// What an operation on a scale comes to.
pub type Scaling<'a, T> = Pin<Box<dyn Future<Output = Result<T, ScaleError>> + Send + 'a>>;

/// Reads and writes the number of replicas of workloads.
pub trait Scale: Send + Sync {
    /// How many replicas are asked for. It fails for good where they are not ours to change: another scaler owns the
    /// workload, or a right is missing.
    fn replicas<'a>(&'a self, namespace: &'a str, workload: &'a Workload) -> Scaling<'a, Replicas>;

    /// Asks for `replicas`, if nobody has changed the number since `seen`.
    fn set<'a>(
        &'a self,
        namespace: &'a str,
        workload: &'a Workload,
        seen: &'a Replicas,
        replicas: u32,
    ) -> Scaling<'a, ()>;
}

/// How many replicas were asked for at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// The number.
    pub wanted: u32,
    /// Changes with the workload.
    pub version: Option<String>,
}

/// Why a number of replicas could not be read or changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ScaleError {
    #[error("somebody else has changed the workload meanwhile")]
    Conflict,
    #[error("{0}")]
    Refused(Arc<str>),
    #[error("the API server does not answer: {0}")]
    Unavailable(Arc<str>),
}

/// Where there is no cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoScale;

impl Scale for NoScale {
    fn replicas<'a>(&'a self, _: &'a str, _: &'a Workload) -> Scaling<'a, Replicas> {
        Box::pin(async { Err(ScaleError::Refused("this proxy knows no cluster".into())) })
    }

    fn set<'a>(&'a self, _: &'a str, _: &'a Workload, _: &'a Replicas, _: u32) -> Scaling<'a, ()> {
        Box::pin(async { Err(ScaleError::Refused("this proxy knows no cluster".into())) })
    }
}
