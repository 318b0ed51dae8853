//! Queries for stored responses, as sent to model servers.

use http::{
    HeaderName, HeaderValue, Request,
    header::{AUTHORIZATION, HOST},
    request,
};

/// Forwarded with each query: the server decides on access.
const CREDENTIALS: [HeaderName; 2] = [AUTHORIZATION, HeaderName::from_static("x-api-key")];

/// Creates a GET of a response with the credentials of a request.
pub(super) fn query(path: &str, of: &request::Parts) -> Option<request::Parts> {
    let (mut query, ()) = Request::get(path).body(()).ok()?.into_parts();
    for name in CREDENTIALS {
        if let Some(value) = of.headers.get(&name) {
            query.headers.insert(name, value.clone());
        }
    }
    let host = of.headers.get(HOST).cloned().or_else(|| {
        let authority = of.uri.authority()?;
        HeaderValue::from_str(authority.as_str()).ok()
    });
    query.headers.insert(HOST, host?);
    Some(query)
}
