//! gRPC server of the scaler, with health and reflection.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};

use super::{
    KedaScaler,
    proto::external_scaler_server::{ExternalScaler, ExternalScalerServer},
};
use crate::{
    admission::Directory,
    config::budget::{GRPC_MESSAGE_BYTES, SCALER_STREAMS},
    grpc::GrpcListener,
    places::Places,
};

/// Maximum number of open streams: KEDA has two for each ScaledObject.
pub const MAX_SCALER_STREAMS: usize = SCALER_STREAMS;

/// Maximum number of calls under way per connection. KEDA has one connection for all of its ScaledObjects, and silently
/// delays calls above the limit; so there is room for all streams and for polls.
const MAX_KEDA_CALLS_PER_CONNECTION: u32 = 10_000;

/// Time for connections to end gracefully.
const KEDA_SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Descriptors of the served protocols, for reflection.
const PROTOCOLS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/protocols.bin"));

type ScalerService = ExternalScalerServer<KedaScaler>;

/// Returns the service without a listener. Its streams end with `ending`.
pub fn service(
    routes: Arc<Directory>,
    ending: CancellationToken,
) -> ExternalScalerServer<impl ExternalScaler> {
    with_message_limits(KedaScaler {
        routes,
        streams: Places::new(MAX_SCALER_STREAMS, MAX_SCALER_STREAMS),
        ending,
    })
}

fn with_message_limits(keda: KedaScaler) -> ScalerService {
    ScalerService::new(keda).max_decoding_message_size(GRPC_MESSAGE_BYTES)
}

/// Serves until `stopping`, which cancels `draining` too.
///
/// On `draining`, every stream and connection ends cleanly, so that KEDA, which reconnects two seconds later, reaches
/// another replica. Calls that still arrive here are answered until the end: after an error KEDA would back off for
/// up to a minute without scaling.
pub async fn serve(
    listener: GrpcListener,
    routes: Arc<Directory>,
    draining: CancellationToken,
    stopping: CancellationToken,
) {
    let streams = Places::new(MAX_SCALER_STREAMS, MAX_SCALER_STREAMS);
    let stage = |is_serving, ending: &CancellationToken| {
        let keda = KedaScaler { routes: routes.clone(), streams: streams.clone(), ending: ending.clone() };
        let (listener, ending) = (listener.clone(), ending.clone());
        async move {
            listener.serve(services(keda, is_serving).await, MAX_KEDA_CALLS_PER_CONNECTION, ending).await
        }
    };
    let stages = async {
        let last = async {
            draining.cancelled().await;
            stage(false, &stopping).await;
        };
        tokio::join!(stage(true, &draining), last);
    };
    let cut = async {
        stopping.cancelled().await;
        sleep(KEDA_SHUTDOWN_GRACE).await;
    };
    tokio::select! {
        // If connections end gracefully in time, that result takes precedence over the timeout.
        biased;
        () = stages => {}
        () = cut => {}
    }
}

async fn services(keda: KedaScaler, is_serving: bool) -> Routes {
    let (health, health_service) = tonic_health::server::health_reporter();
    let status = if is_serving {
        tonic_health::ServingStatus::Serving
    } else {
        tonic_health::ServingStatus::NotServing
    };
    for service in ["", ScalerService::NAME] {
        health.set_service_status(service, status).await;
    }
    let services = Routes::new(with_message_limits(keda)).add_service(health_service);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(PROTOCOLS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(ScalerService::NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(current), Ok(older)) => services.add_service(current).add_service(older),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "the scaler is served without gRPC reflection");
            services
        }
    }
}
