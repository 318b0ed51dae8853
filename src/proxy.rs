//! The request path: listener, route, admission, hold, pick, upstream, body, report.

mod answering;
mod answers;
mod body;
mod client_io;
mod closer;
mod connection_state;
mod connections;
mod dispatch;
mod exchange;
mod find;
mod first_token;
mod forward;
mod h2_frames;
mod intake;
mod intercept;
mod keepalive;
mod listener;
mod models;
mod pace;
mod pipeline;
mod rule;
mod stream_stall;
mod table;
mod traced;
mod tries;
mod tunnel;
mod wait;

pub use answering::Answering;
pub use client_io::{ClientIo, ClientLimits};
pub use connection_state::ConnectionState;
pub use connections::{Connected, Connections};
pub use intercept::Interceptor;
pub use listener::{bind, serve_connection, serve_listener};
pub use pace::Allowed;
pub use pipeline::{Client, Proxy, Shared};
pub use table::{Match, Model, RouteTable};
