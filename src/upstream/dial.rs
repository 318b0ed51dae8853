//! Opening of connections.

use std::{io, pin::Pin, sync::Arc, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep},
};

/// Transport of new connections.
#[derive(Clone, Default)]
pub enum Dialer {
    /// TCP.
    #[default]
    Tcp,
    /// Anything else, such as in-memory connections for tests on a paused clock.
    Other(Arc<dyn Dial>),
}

/// Opens connections.
pub trait Dial: Send + Sync {
    /// Connects to `address`.
    fn dial(&self, address: &str) -> Dialing;
}

/// A connection attempt.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn UpstreamIo>>> + Send>>;

/// A bidirectional connection.
pub trait UpstreamIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> UpstreamIo for T {}

/// An open connection.
pub(super) enum Dialed {
    Tcp(TcpStream),
    Other(Box<dyn UpstreamIo>),
}

/// TCP keepalive: probes after 15 s of silence, then three more every 5 s.
const UPSTREAM_KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

/// Maximum time that sent data may stay unacknowledged.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between connection attempts while this process is out of file descriptors, ports or memory.
const STARVED_RETRY_INTERVAL: Duration = Duration::from_millis(50);

// === impl Dialer ===

impl Dialer {
    /// Connects. Without file descriptors, ports or memory, retries until shortly before `limit`, after at least one
    /// pause so that callers cannot spin; `make_room` releases idle connections.
    pub(super) async fn dial(
        &self,
        address: &str,
        limit: Duration,
        make_room: impl Fn(),
    ) -> io::Result<Dialed> {
        let began = Instant::now();
        loop {
            match self.dial_once(address).await {
                Err(error) if is_starved(&error) => {
                    make_room();
                    sleep(STARVED_RETRY_INTERVAL).await;
                    if began.elapsed() + 2 * STARVED_RETRY_INTERVAL > limit {
                        return Err(error);
                    }
                }
                dialed => return dialed,
            }
        }
    }

    async fn dial_once(&self, address: &str) -> io::Result<Dialed> {
        match self {
            Self::Tcp => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                detect_dead_peer(&stream);
                Ok(Dialed::Tcp(stream))
            }
            Self::Other(dial) => dial.dial(address).await.map(Dialed::Other),
        }
    }
}

/// Makes the kernel detect a dead node within half a minute: a model server may be slow, but its kernel is not. If an
/// option cannot be set, the route's timeouts still apply.
fn detect_dead_peer(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_keepalive(&UPSTREAM_KEEPALIVE);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
}

/// Returns whether this process or machine is out of file descriptors, ports or memory, which says nothing about the
/// endpoint.
pub(super) fn is_starved(error: &io::Error) -> bool {
    use rustix::io::Errno;
    const LACK_OF_RESOURCES: [Errno; 5] =
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
    Errno::from_io_error(error).is_some_and(|errno| LACK_OF_RESOURCES.contains(&errno))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Checks the socket options only: a dying node cannot be simulated here.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn tcp_socket_detects_a_dead_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let Dialed::Tcp(stream) = Dialer::Tcp.dial_once(&address).await.unwrap() else { panic!("not TCP") };
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let times = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        assert_eq!(times, (Duration::from_secs(15), Duration::from_secs(5)));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(TCP_USER_TIMEOUT));
    }
}
