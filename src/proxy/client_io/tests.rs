use std::os::fd::AsFd as _;

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::TcpListener,
};

use super::*;
use crate::domain::Period;

fn limits() -> Arc<Limits> {
    Arc::new(Limits { idle_timeout: Period::from_secs(120), ..Limits::default() })
}

#[tokio::test(start_paused = true)]
async fn first_head_has_30_s_next_request_120_s() {
    let (mut client, server) = duplex(64);
    let state = Arc::new(ConnectionState::default());
    let mut server = ClientIo::new(server, state.clone(), limits(), Memory::new(1 << 20));
    let began = Instant::now();
    let mut buf = [0; 8];
    assert!(server.read(&mut buf).await.is_err());
    assert_eq!(began.elapsed().as_secs(), 30, "nothing came");

    let mut server = ClientIo::new(server.io, state.clone(), limits(), Memory::new(1 << 20));
    client.write_all(b"head").await.unwrap();
    assert_eq!(server.read(&mut buf).await.unwrap(), 4);
    let under_way = state.begin();
    let reading = tokio::time::timeout(Duration::from_secs(3600), server.read(&mut buf));
    assert!(reading.await.is_err(), "no limit while a request is under way");
    drop(under_way);
    let began = Instant::now();
    assert!(server.read(&mut buf).await.is_err());
    assert_eq!(began.elapsed().as_secs(), 120, "kept alive");
}

#[tokio::test(start_paused = true)]
async fn trickling_head_times_out_after_30_s() {
    let (mut client, server) = duplex(64);
    let state = Arc::new(ConnectionState::default());
    let mut server = ClientIo::new(server, state.clone(), limits(), Memory::new(1 << 20));
    server.quiet.in_head = false;
    let began = Instant::now();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(100)).await;
        loop {
            client.write_all(b"x").await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let mut buf = [0; 1];
    while server.read(&mut buf).await.is_ok() {}
    assert_eq!(began.elapsed().as_secs(), 130, "100 s idle, 30 s of head");
}

#[tokio::test(start_paused = true)]
async fn client_that_stops_reading_times_out() {
    let (client, server) = duplex(4);
    let state = Arc::new(ConnectionState::default());
    let mut server = ClientIo::new(server, state.clone(), limits(), Memory::new(1 << 20));
    let began = Instant::now();
    assert!(server.write_all(b"more than fits").await.is_err());
    assert_eq!(began.elapsed().as_secs(), 60);
    assert!(state.begin().is_stalled());
    drop(client);
}

/// 20,000 bytes of a body arrive that hyper does not read: 16 KiB are read ahead, the rest stays in the kernel.
#[tokio::test]
async fn disconnect_behind_unread_body_is_detected() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket: SocketOf<TcpStream> = |io| Some(io.as_fd());
    for resets in [true, false] {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        let state = Arc::new(ConnectionState::default());
        let mut server =
            ClientIo::new(server, state.clone(), limits(), Memory::new(1 << 20)).with_socket(Some(socket));
        client.write_all(b"POST / HTTP/1.1\r\nContent-Length: 30000\r\n\r\n").await.unwrap();
        assert!(server.read(&mut [0; 100]).await.unwrap() > 0);
        let _under_way = state.begin();
        client.write_all(&[b'x'; 20_000]).await.unwrap();
        let mut hang_up = Box::pin(std::future::poll_fn(|cx| match Pin::new(&mut server).poll_flush(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(error),
            _ => Poll::Pending,
        }));
        assert!(futures_util::poll!(&mut hang_up).is_pending(), "it may go on");
        if resets {
            SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
        } else {
            client.shutdown().await.unwrap();
        }
        let error = tokio::time::timeout(Duration::from_secs(30), hang_up).await.expect("it is noticed");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "resets: {resets}");
        assert_eq!(server.read_ahead.len(), MAX_AHEAD_BYTES, "the rest was not read");
    }
}
