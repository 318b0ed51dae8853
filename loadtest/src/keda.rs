//! Minimal client of KEDA's `ExternalScaler.StreamIsActive`, directly on h2: no client library adds its own delay to
//! the measured times.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::clock::Instant;

/// A message on a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DemandMessage {
    /// Number given when the stream was opened.
    pub(crate) stream: usize,
    pub(crate) active: bool,
    pub(crate) at: Instant,
}

/// Channel for the messages of all streams and the reason when one ends.
pub(crate) type DemandSender = mpsc::UnboundedSender<Result<DemandMessage, String>>;

/// A gRPC connection to a scaler. KEDA's operator keeps one per scaler.
pub(crate) struct ScalerConnection(SendRequest<Bytes>);

const H2_READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control window in bytes, far more than any stream carries here, so it never fills up.
const FLOW_WINDOW_BYTES: u32 = 1 << 24;
/// Bytes of the flag and the length before each message.
const GRPC_PREFIX_BYTES: usize = 5;

// === impl ScalerConnection ===

impl ScalerConnection {
    /// Connects. The task that drives the connection ends with the runtime.
    pub(crate) async fn open(scaler: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(scaler).await?;
        stream.set_nodelay(true)?;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(FLOW_WINDOW_BYTES).initial_connection_window_size(FLOW_WINDOW_BYTES);
        let (send, connection) =
            timeout(H2_READY_TIMEOUT, builder.handshake(stream)).await?.map_err(io::Error::other)?;
        // If the connection ends, the streams on it end and report that.
        tokio::spawn(connection);
        Ok(Self(send))
    }

    /// Opens the stream of the route. It is established once its first message arrives.
    pub(crate) async fn follow(&self, route: &str, stream: usize, news: DemandSender) -> io::Result<()> {
        let request = http::Request::post("http://scaler/externalscaler.ExternalScaler/StreamIsActive")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(io::Error::other)?;
        let mut send = timeout(H2_READY_TIMEOUT, self.0.clone().ready()).await?.map_err(io::Error::other)?;
        let (response, mut body) = send.send_request(request, false).map_err(io::Error::other)?;
        body.send_data(encode_scaled_object_ref(route), true).map_err(io::Error::other)?;
        tokio::spawn(async move {
            let ended = listen(response, stream, &news).await;
            // The receiver may have been dropped.
            let _ = news.send(Err(format!("the stream of one route has ended: {ended}")));
        });
        Ok(())
    }
}

/// Forwards messages to `news` and returns the reason when the stream ends.
async fn listen(response: h2::client::ResponseFuture, stream: usize, news: &DemandSender) -> String {
    let mut body = match response.await {
        Ok(response) if response.status() == http::StatusCode::OK => response.into_body(),
        Ok(response) => return format!("the call returned {}", response.status()),
        Err(error) => return error.to_string(),
    };
    let mut buffer = BytesMut::new();
    loop {
        let data = match body.data().await {
            Some(Ok(data)) => data,
            Some(Err(error)) => return error.to_string(),
            None => return trailers(body.trailers().await),
        };
        let at = Instant::now();
        if let Err(error) = body.flow_control().release_capacity(data.len()) {
            return error.to_string();
        }
        buffer.extend_from_slice(&data);
        while let Some(active) = next(&mut buffer) {
            if news.send(Ok(DemandMessage { stream, active, at })).is_err() {
                return "nobody listens".into();
            }
        }
    }
}

fn trailers(trailers: Result<Option<http::HeaderMap>, h2::Error>) -> String {
    match trailers {
        Ok(trailers) => format!("{:?}", trailers.unwrap_or_default()),
        Err(error) => error.to_string(),
    }
}

/// Takes the next message, an `IsActiveResponse`, from the buffer, if it is complete.
fn next(buffer: &mut BytesMut) -> Option<bool> {
    let length = buffer.get(1..GRPC_PREFIX_BYTES)?;
    let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
    let message = buffer.get(GRPC_PREFIX_BYTES..GRPC_PREFIX_BYTES + length)?;
    // Field 1, a varint; `false` is omitted.
    let active = message == [0x08, 0x01];
    buffer.advance(GRPC_PREFIX_BYTES + length);
    Some(active)
}

/// Encodes a `ScaledObjectRef` whose metadata names the route, with the gRPC prefix.
fn encode_scaled_object_ref(route: &str) -> Bytes {
    let field = |number: u8, content: &[u8]| {
        // Everything here is shorter than 128 bytes, so a length takes one byte.
        [&[number << 3 | 2, content.len() as u8], content].concat()
    };
    let entry = [field(1, b"route"), field(2, route.as_bytes())].concat();
    let message = [field(1, route.as_bytes()), field(2, b"loadtest"), field(3, &entry)].concat();
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(&message);
    framed.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_object_ref_names_the_route() {
        let question = encode_scaled_object_ref("r7");
        assert_eq!(question[..5], [0, 0, 0, 0, question.len() as u8 - 5]);
        let metadata = b"\x1a\x0b\x0a\x05route\x12\x02r7";
        assert!(question.ends_with(metadata), "{question:?}");
        assert!(question[5..].starts_with(b"\x0a\x02r7\x12\x08loadtest"), "{question:?}");
    }

    #[test]
    fn messages_may_be_split_or_joined() {
        let words = [0, 0, 0, 0, 2, 8, 1, 0, 0, 0, 0, 0];
        let mut buffer = BytesMut::from(&words[..6]);
        assert_eq!(next(&mut buffer), None);
        buffer.extend_from_slice(&words[6..]);
        assert_eq!(
            (next(&mut buffer), next(&mut buffer), next(&mut buffer)),
            (Some(true), Some(false), None)
        );
    }
}
