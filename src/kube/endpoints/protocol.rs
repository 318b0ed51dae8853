//! The application protocol of Service and InferencePool ports.

use crate::state::Protocol;

/// Maps the `appProtocol` of a port; values other than `kubernetes.io/h2c` mean HTTP/1.1.
pub(super) fn protocol(app_protocol: Option<&str>) -> Protocol {
    if app_protocol == Some("kubernetes.io/h2c") { Protocol::H2c } else { Protocol::Http1 }
}
