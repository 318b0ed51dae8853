//! The request path: listener, route, admission, hold, pick, upstream, body, report.

mod client_io;
mod table;

pub use client_io::{ClientIo, ClientTimeouts, ConnectionState};
pub use table::{Match, Model, RouteTable};
