//! Validation of the trace export.

use http::{HeaderName, HeaderValue, Uri};

use super::ConfigChecker;
use crate::config::{TracesProtocol, source::KeyPath};

impl ConfigChecker<'_> {
    pub(super) fn traces(&mut self) {
        let Some(traces) = &self.config.traces else { return };
        let path = KeyPath::default().key("traces");
        if let Err(problem) = collector(&traces.endpoint, traces.protocol) {
            self.misfit(&path.key("endpoint"), &path.key("protocol"), problem);
        }
        for (name, value) in &traces.headers {
            let path = path.key("headers").key(name);
            self.shell_reference(&path);
            if name.parse::<HeaderName>().is_err() {
                self.error(&path, "is not the name of a header");
            } else if HeaderValue::from_str(value).is_err() {
                // The message omits the value, which may be a secret.
                self.error(
                    &path,
                    "has a value that no header can have: letters, digits and signs of ASCII only",
                );
            }
        }
        if traces.service_name.trim().is_empty() {
            self.error(&path.key("serviceName"), "is empty; without the key it is `anteroom`");
        }
    }
}

fn collector(endpoint: &str, protocol: TracesProtocol) -> Result<(), String> {
    let example = match protocol {
        TracesProtocol::Grpc => "write it as in http://collector:4317",
        TracesProtocol::Http => "write it as in http://collector:4318",
    };
    if endpoint.contains('@') {
        // The message omits the value, which may contain a password.
        return Err(format!("has a user in it; credentials belong into `headers`; {example}"));
    }
    let uri = endpoint
        .parse::<Uri>()
        .map_err(|error| format!("\"{endpoint}\" is not a URL ({error}); {example}"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return Err(format!("\"{endpoint}\" is not a whole URL; {example}"));
    }
    if protocol == TracesProtocol::Grpc && uri.path_and_query().is_some_and(|path| path != "/") {
        return Err(format!(
            "\"{endpoint}\" has a path, which gRPC does not know; {example}, or choose `protocol: http`"
        ));
    }
    Ok(())
}
