//! Routes that proxy any HTTP application, as the KEDA HTTP Add-on's interceptor does.

mod handler;
pub(super) mod request;
pub(super) mod route;
