//! A single request, used to detect when a change takes effect. Never blocks; the caller polls it on every turn.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::clients::request;
use crate::http;

/// A request in flight.
#[derive(Debug)]
pub(super) struct Probe {
    stream: TcpStream,
    answer: Vec<u8>,
}

// === impl Probe ===

impl Probe {
    /// Sends a request for this model.
    pub(super) fn send(proxy: SocketAddr, model: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect(proxy)?;
        stream.set_nodelay(true)?;
        stream.write_all(&request(model))?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, answer: Vec::new() })
    }

    /// Returns the status once the response head has arrived.
    pub(super) fn poll_status(&mut self) -> io::Result<Option<u16>> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => self.answer.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let head = http::head(&self.answer).map_err(io::Error::other)?;
        Ok(head.and_then(|head| http::status(head.start)))
    }
}
