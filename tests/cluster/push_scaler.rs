//! Minimal external-push scaler, controlled by the scenario. It shows that the cluster works without Anteroom's scaler.

use std::{net::SocketAddr, pin::Pin};

use futures_util::{Stream, StreamExt as _};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

pub(crate) use ::anteroom::scaler::keda::proto as wire;
use wire::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
    external_scaler_server::{ExternalScaler, ExternalScalerServer},
};

const METRIC: &str = "demand";
const METRIC_TARGET: i64 = 5;

/// Running scaler. Dropping it stops it.
pub(crate) struct PushScaler {
    demand: watch::Sender<i64>,
    _task: AbortOnDropHandle<()>,
}

struct PushScalerService(watch::Receiver<i64>);

// === impl PushScaler ===

impl PushScaler {
    /// Starts without demand. A demand of five makes one replica.
    pub(crate) async fn start(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let (demand, demands) = watch::channel(0);
        let server = tonic::transport::Server::builder()
            .add_service(ExternalScalerServer::new(PushScalerService(demands)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async {
            server.await.unwrap();
        });
        Self { demand, _task: AbortOnDropHandle::new(task) }
    }

    /// Sets the demand and pushes it.
    pub(crate) fn push(&self, demand: i64) {
        self.demand.send_replace(demand);
    }

    /// Returns the number of streams that KEDA has open.
    pub(crate) fn streams(&self) -> usize {
        // One receiver belongs to the server.
        self.demand.receiver_count() - 1
    }
}

// === impl PushScalerService ===

#[tonic::async_trait]
impl ExternalScaler for PushScalerService {
    async fn is_active(&self, _: Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        Ok(Response::new(IsActiveResponse { result: *self.0.borrow() > 0 }))
    }

    type StreamIsActiveStream = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

    async fn stream_is_active(
        &self,
        _: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let demands = WatchStream::new(self.0.clone());
        Ok(Response::new(Box::pin(demands.map(|demand| Ok(IsActiveResponse { result: demand > 0 })))))
    }

    async fn get_metric_spec(
        &self,
        _: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        Ok(Response::new(spec()))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let demand = *self.0.borrow();
        let value = MetricValue {
            metric_name: request.into_inner().metric_name,
            metric_value: demand,
            metric_value_float: demand as f64,
        };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }

    type StreamMetricSpecStream = Pin<Box<dyn Stream<Item = Result<GetMetricSpecResponse, Status>> + Send>>;

    async fn stream_metric_spec(
        &self,
        _: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamMetricSpecStream>, Status> {
        let stream = futures_util::stream::iter([Ok(spec())]).chain(futures_util::stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }
}

fn spec() -> GetMetricSpecResponse {
    let spec = MetricSpec {
        metric_name: METRIC.into(),
        target_size: METRIC_TARGET,
        target_size_float: METRIC_TARGET as f64,
    };
    GetMetricSpecResponse { metric_specs: vec![spec] }
}
