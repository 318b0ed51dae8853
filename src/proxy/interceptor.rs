//! Routes that proxy any HTTP application, as the KEDA HTTP Add-on's interceptor does.

mod handler;
mod request;
mod route;

pub(super) use request::InterceptedRequest;
pub use route::Interceptor;
