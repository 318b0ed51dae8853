//! Incomplete bodies sent to exhaust the memory for the bodies of others.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    memory::MemoryTest,
    recorder::TINY_BODY,
    served::connect_from,
    support::{
        TestProxy, TestUpstream, Wire, route, routes, until,
        wire::{CHAT, post},
    },
};

const KIB: usize = 1024;

/// POST with a JSON body of `bytes` bytes.
fn large(bytes: usize) -> String {
    let padding = bytes - r#"{"model":"tiny","p":""}"#.len();
    post(CHAT, &format!(r#"{{"model":"tiny","p":"{}"}}"#, "x".repeat(padding)))
}

/// Fills the memory for incomplete bodies with 33 bodies that lack 300 bytes each and send a few more bytes now and
/// then. One of them is evicted for a body from another source, which is served at once; the others stay.
#[tokio::test]
async fn dripping_bodies_keep_no_other_source_out() {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let route = route("tiny", &upstream.url(), "hold: { maxBytes: 44MiB }");
    let limits = "maxBodyBytes: 1MiB, maxBufferedBytes: 44MiB, bodyTimeout: 10m, minRate: 0";
    let proxy = TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route]))).await;
    let request = large(KIB * KIB);
    let (begun, rest) = request.split_at(request.len() - 300);
    let head = request.len() - KIB * KIB;
    let mut attackers = Vec::new();
    for _ in 0..33 {
        let stream = connect_from(SocketAddr::from(([127, 0, 0, 2], 0)), proxy.address).await;
        let mut attacker = Wire { stream, buf: Vec::new() };
        attacker.send(begun).await;
        attackers.push(attacker);
    }
    let used = async |each: usize| {
        let used = 33 * (each - head);
        until("all to have come", async || proxy.shared.memory.bodies() == used).await;
    };
    used(begun.len()).await;
    for attacker in &mut attackers {
        attacker.send(&rest[..100]).await;
    }
    used(begun.len() + 100).await;
    assert_eq!(proxy.ask(&request).await.status(), 200);
    let mut evicted = 0;
    for mut attacker in attackers {
        let _ = attacker.stream.write_all(&rest.as_bytes()[100..]).await;
        let response = attacker.response().await;
        if response.status() != 200 {
            response.is_error(503, "hold_queue_full");
            evicted += 1;
        }
    }
    assert_eq!(evicted, 1, "no more than it takes");
    until("all memory to be given back", async || proxy.shared.memory.bodies() == 0).await;
    proxy.stop(&[("completed", 33)]).await;
}

/// Sends `begin`, then 16 KiB every 4 s until the connection ends.
fn drip(mut client: DuplexStream, begin: String) -> JoinHandle<String> {
    tokio::spawn(async move {
        client.write_all(begin.as_bytes()).await.unwrap();
        let mut answer = String::new();
        loop {
            tokio::select! {
                _ = client.read_to_string(&mut answer) => return answer,
                () = sleep(Duration::from_secs(4)) => {
                    let _ = client.write_all(&[b'x'; 16 * KIB]).await;
                }
            }
        }
    })
}

/// Behind a load balancer all clients share one source address. Of the 6 MiB for incomplete bodies, 7 bodies of 800 KiB
/// leave 544 KiB for others and for the bytes that these trickle.
#[tokio::test(start_paused = true)]
async fn dripping_bodies_are_evicted_behind_one_address() {
    let memory = MemoryTest::new(
        "maxBodyBytes: 1MiB, maxBufferedBytes: 8MiB",
        "match: { models: [tiny] }, hold: { maxBytes: 8MiB }",
    );
    memory.ready();
    let request = large(KIB * KIB);
    let dripping: Vec<_> = (0..7).map(|_| drip(memory.client(KIB), request[..800 * KIB].into())).collect();
    let ask = async |request: String| {
        let mut client = memory.client(KIB);
        let (mut read, mut write) = tokio::io::split(&mut client);
        let mut answer = [0; 12];
        let asks = async {
            let _ = write.write_all(request.as_bytes()).await;
        };
        tokio::join!(asks, read.read_exact(&mut answer)).1.unwrap();
        String::from_utf8_lossy(&answer[9..]).into_owned()
    };
    sleep(Duration::from_secs(1)).await;
    assert_eq!(ask(request.clone()).await, "503", "all have just begun");
    assert_eq!(ask(post(CHAT, TINY_BODY)).await, "200", "a small one finds room");
    sleep(Duration::from_secs(8)).await;
    let began = Instant::now();
    assert_eq!(ask(request).await, "200");
    assert_eq!(began.elapsed(), Duration::ZERO);
    let over = dripping.iter().filter(|client| client.is_finished()).count();
    assert_eq!(over, 1, "no more than it takes");
}
