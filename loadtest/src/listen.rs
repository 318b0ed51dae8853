//! Accepting connections to the rig's servers.

use std::io;

use mio::net::{TcpListener, TcpStream};

/// Accepts the next pending connection, with `TCP_NODELAY`; returns `None` if the queue is empty.
pub(crate) fn next(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nodelay(true)?;
            Ok(Some(stream))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
