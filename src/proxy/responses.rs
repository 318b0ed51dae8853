//! Endpoints of stored responses (`/v1/responses`).
//!
//! An endpoint is recorded when a response that it created passes through. The endpoints of other responses (created
//! through another replica, or evicted here) are found by querying all ready endpoints.

mod affinity;
mod background;
mod lookup;
mod owners;
mod query;
pub(super) mod watch;

pub(super) use affinity::ResponseAffinity;
pub(super) use owners::ResponseOwners;
