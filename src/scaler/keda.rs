//! KEDA's external scaler with push, over gRPC.

mod metrics;
#[allow(missing_docs, reason = "generated")]
pub mod proto;
mod server;
mod streams;
mod trigger;

use std::{pin::Pin, sync::Arc};

use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    admission::{Directory, Gate},
    grpc::{Caller, StreamPlace},
    places::Places,
};
use metrics::{TriggerMetrics, no_values};
use proto::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, ScaledObjectRef,
    external_scaler_server::ExternalScaler,
};
pub use server::{MAX_SCALER_STREAMS, serve, service};
use streams::{Activity, Specs};
use trigger::Trigger;

/// Implements the external scaler for the routes of a directory, with the demand of all replicas.
#[derive(Clone)]
struct KedaScaler {
    routes: Arc<Directory>,
    /// Places for streams.
    streams: Arc<Places>,
    /// Ends all streams cleanly.
    ending: CancellationToken,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

// === impl KedaScaler ===

impl KedaScaler {
    /// Finds the route that a ScaledObject names. An unknown route is answered like an idle one: after an error KEDA creates
    /// neither HPA nor stream, and backs off.
    fn find(&self, object: &ScaledObjectRef) -> Result<(Trigger, Option<Arc<Gate>>), Status> {
        let trigger = Trigger::of(object)?;
        let gate = trigger.find(&self.routes.gates());
        Ok((trigger, gate))
    }

    /// Takes a place for a stream, and returns it with the token that ends the stream.
    fn stream<T>(&self, request: &Request<T>) -> Result<(StreamPlace, CancellationToken), Status> {
        let (caller, ending) = (Caller::of(request.extensions()), self.ending.child_token());
        let place = self.streams.try_enter(caller.source(), ending.clone()).ok_or_else(|| {
            Status::resource_exhausted(format!(
                "{MAX_SCALER_STREAMS} streams are open already, two for each ScaledObject; run another deployment of anteroom"
            ))
        })?;
        Ok((StreamPlace::new(place, &caller), ending))
    }
}

#[tonic::async_trait]
impl ExternalScaler for KedaScaler {
    type StreamIsActiveStream = ResponseStream<IsActiveResponse>;
    type StreamMetricSpecStream = ResponseStream<GetMetricSpecResponse>;

    async fn is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<IsActiveResponse>, Status> {
        let (_, gate) = self.find(request.get_ref())?;
        let gate = gate.filter(|gate| gate.counts_everywhere().is_active());
        if let Some(gate) = &gate {
            // KEDA scales by a poll as well as by a push.
            gate.record_scaler_notified();
        }
        let result = gate.is_some();
        Ok(Response::new(IsActiveResponse { result }))
    }

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let trigger = Trigger::of(request.get_ref())?;
        let (place, ending) = self.stream(&request)?;
        let activity =
            Activity::new(trigger, self.routes.clone(), ending, Caller::of(request.extensions()).source());
        Ok(Response::new(Box::pin(activity.stream(place))))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let (trigger, gate) = self.find(request.get_ref())?;
        Ok(Response::new(TriggerMetrics::of(&trigger, gate.as_deref()).specs()))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let object = request.scaled_object_ref.unwrap_or_default();
        let (trigger, gate) = self.find(&object)?;
        let metrics = TriggerMetrics::of(&trigger, gate.as_deref());
        let Some(gate) = gate else {
            return Ok(Response::new(no_values(&request.metric_name, &metrics)));
        };
        metrics.values(&request.metric_name, &gate.counts_everywhere()).map(Response::new).ok_or_else(|| {
            Status::not_found(format!(
                "{trigger}: there is no metric \"{}\"; there is {}",
                trigger::shortened(&request.metric_name),
                metrics.names().join(", ")
            ))
        })
    }

    async fn stream_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamMetricSpecStream>, Status> {
        let trigger = Trigger::of(request.get_ref())?;
        let (place, ending) = self.stream(&request)?;
        let specs = Specs::new(trigger, self.routes.clone(), ending);
        Ok(Response::new(Box::pin(specs.stream(place))))
    }
}
