//! The request path: listener, route, admission, hold, pick, upstream, body, report.

mod answers;
mod body;
mod client_io;
mod dispatch;
mod exchange;
mod find;
mod first_token;
mod forward;
mod intake;
mod intercept;
mod keepalive;
mod listener;
mod pipeline;
mod rule;
mod stream_stall;
mod table;
mod traced;
mod tunnel;
mod wait;

pub use client_io::{ClientIo, ClientTimeouts, ConnectionState};
pub use intercept::Interceptor;
pub use listener::{bind, serve_connection, serve_listener};
pub use pipeline::{Answering, Client, Proxy, Shared};
pub use table::{Match, Model, RouteTable};
