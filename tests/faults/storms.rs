//! Configurations that change faster than they are loaded.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use rustix::process::Signal;

use crate::{
    served::ProxyProcess,
    support::{TestUpstream, Wire, route, routes, until, wire::chat},
};

const STEPS: usize = 300;

/// Clients that send one request after the other on kept-alive connections.
struct KeepAliveLoad {
    over: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

// === impl KeepAliveLoad ===

impl KeepAliveLoad {
    fn start(proxy: &ProxyProcess, clients: usize) -> Self {
        let (over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |number: usize| {
            let (over, answered, address) = (over.clone(), answered.clone(), proxy.address);
            tokio::spawn(async move {
                let mut wire = Wire::connect(address).await;
                while !over.load(SeqCst) {
                    let text = format!("client {number}");
                    let response = wire.ask(chat(&text)).await;
                    assert_eq!(response.status(), 200, "{}", response.text());
                    assert_eq!(response.json()["text"], text);
                    answered.fetch_add(1, SeqCst);
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { over, answered, clients }
    }

    /// Waits for one more response.
    async fn await_next_response(&self) {
        let before = self.answered.load(SeqCst);
        until("an answer", async || self.answered.load(SeqCst) > before).await;
    }

    /// Stops the clients and returns the number of responses; panics if a request failed.
    async fn end(self) -> u64 {
        self.over.store(true, SeqCst);
        for client in self.clients {
            client.await.unwrap();
        }
        self.answered.load(SeqCst)
    }
}

/// Replaces the file as a kubelet does: a new folder, and one atomic replacement of the symlink to it.
fn swap(folder: &Path, number: usize, config: &str) {
    let version = format!("..version-{number}");
    fs::create_dir(folder.join(&version)).unwrap();
    fs::write(folder.join(&version).join("anteroom.yaml"), config).unwrap();
    let before = fs::read_link(folder.join("..data")).ok();
    symlink(&version, folder.join("..new")).unwrap();
    fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    if let Some(before) = before {
        fs::remove_dir_all(folder.join(before)).unwrap();
    }
}

/// Hundreds of changes under load: good ones with other limits and other routes, some of them unused, bad ones,
/// truncated ones, empty ones, swapped symlinks, and SIGHUP in between. No request is lost; the last good configuration
/// is in force; removed routes leave no threads or descriptors.
#[tokio::test]
async fn reload_storm_loses_and_leaves_nothing() {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let tiny = |more: &str| route("tiny", &upstream.url(), more);
    let others = |number: usize| -> Vec<String> {
        (0..number).map(|other| route(&format!("other-{other}"), &upstream.url(), "")).collect()
    };
    let config = |more: &str, number: usize| routes(&[vec![tiny(more)], others(number)].concat());
    let proxy = ProxyProcess::start(&config("", 0)).await;
    let load = KeepAliveLoad::start(&proxy, 4);
    load.await_next_response().await;
    let before = proxy.resources();
    // From here on the file is a mounted ConfigMap.
    let folder = proxy.path().parent().unwrap().to_owned();
    swap(&folder, STEPS, &config("", 0));
    symlink("..data/anteroom.yaml", folder.join("link")).unwrap();
    fs::rename(folder.join("link"), proxy.path()).unwrap();
    let good = config("concurrency: { max: 3 }", 7);
    for step in 0..STEPS {
        let limits =
            format!("concurrency: {{ max: {} }}, hold: {{ maxRequests: {} }}", step % 7 + 1, step + 10);
        match step % 6 {
            // Writes in place, through the symlink: closing the file triggers the reload.
            0 => fs::write(proxy.path(), config(&limits, step % 20)).unwrap(),
            1 => fs::write(proxy.path(), &good[..good.find("target").unwrap()]).unwrap(),
            2 => fs::write(proxy.path(), "").unwrap(),
            3 => fs::write(proxy.path(), good.replace("tiny", "\u{0}")).unwrap(),
            4 => swap(&folder, step, &config(&limits, step % 10)),
            _ => proxy.signal(Signal::HUP),
        }
        load.await_next_response().await;
    }
    // A good configuration, then a bad one.
    swap(&folder, STEPS + 1, &config("concurrency: { max: 5 }", 2));
    let max = async || proxy.tiny().await["limits"]["concurrency_max"].as_u64();
    until("the last good one", async || max().await == Some(5)).await;
    let (good_ones, bad_ones) =
        (proxy.count_log_lines("configuration reloaded"), proxy.count_log_lines("keeping the previous one"));
    // Only the last of several changes between two checks is loaded.
    assert!(good_ones > 0 && bad_ones > 0, "{good_ones} good ones, {bad_ones} bad ones");
    swap(&folder, STEPS + 2, "routes: [");
    until("the bad one", async || proxy.count_log_lines("keeping the previous one") > bad_ones).await;
    load.await_next_response().await;
    assert_eq!(max().await, Some(5));
    swap(&folder, STEPS + 3, &config("", 0));
    until("one route", async || proxy.admin("/api/v1/routes").await["routes"].as_array().unwrap().len() == 1)
        .await;
    proxy.await_released_resources(before).await;
    let answered = load.end().await;
    assert!(answered > STEPS as u64);
    proxy.stop().await.assert_outcomes(&[("completed", answered)]);
}
