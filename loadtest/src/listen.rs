//! Connections to the rig's servers.

use std::io;

use mio::net::{TcpListener, TcpStream};

/// The next of those that wait, without the kernel's delay for small writes; `None` if there is none now.
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
