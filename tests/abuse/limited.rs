//! A process with the memory that the chart gives it, under all attacks that make it keep bytes: it stays below that, and serves
//! others meanwhile.

use std::{fs, io::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use anteroom::domain::ByteCount;
use tokio::{io::AsyncWriteExt, task::JoinSet, time::timeout};

use crate::{
    frames::{DATA, END_HEADERS, HEADERS, PREFACE, block, field, frame, get, post_fields, settings},
    served::{Served, connect_from, files, source},
    support::{
        Upstream, Wire, soon,
        wire::{CHAT, chat, post_with},
    },
};

/// What a client of an attack sends. It reads nothing.
type Attack = fn(usize) -> Vec<u8>;

/// How long a client of an attack goes on whose bytes are not taken.
const PAUSE: Duration = Duration::from_secs(2);

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
const INITIAL_WINDOW_SIZE: u16 = 4;

/// Each with the clients that it takes to fill half of the memory, where nothing bounds it.
const ATTACKS: [(&str, usize, Attack); 5] = [
    ("partial heads", 10_000, |_| format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(60_000)).into()),
    ("open header blocks", 6_000, |_| {
        let begins = [block(&post_fields(CHAT)), field("x", "x".repeat(15_000))].concat();
        [PREFACE, &settings(&[]), &frame(HEADERS, 0, 1, &begins)].concat()
    }),
    ("unread answers", 100, |_| {
        let path = format!("/{}", "a".repeat(4000));
        let asked: Vec<u8> = (0..1000).flat_map(|number| get(2 * number + 1, &path)).collect();
        [PREFACE, &settings(&[(INITIAL_WINDOW_SIZE, 0)]), &asked[..]].concat()
    }),
    ("streams without bodies", 100, |_| {
        let head = [block(&post_fields(CHAT)), field("x", "x".repeat(10_000))].concat();
        let asked: Vec<u8> =
            (0..1000).flat_map(|number| frame(HEADERS, END_HEADERS, 2 * number + 1, &head)).collect();
        let part = frame(DATA, 0, 1, b"{");
        [PREFACE, &settings(&[]), &asked[..], &part].concat()
    }),
    ("bodies short of their end", 200, |_| {
        let mut body = post_with(CHAT, &[], &"x".repeat(8 << 20)).into_bytes();
        body.truncate(body.len() - 300);
        body
    }),
];

/// A memory cgroup of this test, below that of this process.
struct Cgroup(PathBuf);

// === impl Cgroup ===

impl Cgroup {
    /// Where no group can be made, as in a container without rights to that: why.
    fn new(bytes: usize) -> Result<Self, String> {
        let groups = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let version_1 = groups.lines().find_map(|line| line.split_once(":memory:"));
        let version_2 = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let mut tried = Vec::new();
        for (mount, path, file) in [
            ("/sys/fs/cgroup/memory", version_1.map(|(_, path)| path), "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", version_2, "memory.max"),
        ] {
            let Some(path) = path else { continue };
            let folder = PathBuf::from(format!("{mount}{path}/anteroom-test-{}", std::process::id()));
            let made = fs::create_dir(&folder);
            let group = Self(folder);
            let limited = made.and_then(|()| fs::write(group.0.join(file), bytes.to_string()));
            match limited {
                Ok(()) => return Ok(group),
                Err(error) => tried.push(format!("{}: {error}", group.0.display())),
            }
        }
        Err(tried.join("; "))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The process may take a moment to go; an empty group that stays is of no matter.
        let _ = fs::remove_dir(&self.0);
    }
}

/// `resources.limits.memory` of the chart, which is written as Kubernetes does.
fn memory_of_chart() -> usize {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/chart/anteroom/values.yaml");
    let values: serde_json::Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let memory = values.pointer("/resources/limits/memory").unwrap().as_str().unwrap();
    format!("{memory}B").parse::<ByteCount>().unwrap().get()
}

/// Connects so many clients, each of which sends its bytes as far as they are taken, and stays.
async fn attack(count: usize, to: SocketAddr, bytes: Attack) -> Vec<Wire> {
    let mut open = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for number in 0..count {
        opening.spawn(async move {
            let mut stream = connect_from(source(number), to).await;
            // One that is refused, or not read from, has done what it can.
            let _ = timeout(PAUSE, stream.write_all(&bytes(number))).await;
            Wire { stream, buf: Vec::new() }
        });
        if opening.len() >= 100 {
            open.push(opening.join_next().await.unwrap().unwrap());
        }
    }
    while let Some(client) = opening.join_next().await {
        open.push(client.unwrap());
    }
    open
}

#[tokio::test]
#[ignore = "run by `.ci/run abuse`: a minute, and 10,000 files in each of two processes"]
async fn attacks_stay_within_the_memory_of_the_chart() {
    anteroom::app::raise_file_limit();
    let memory = memory_of_chart();
    let say = |text: String| {
        let _ = writeln!(std::io::stderr(), "{text}");
    };
    let upstream = Upstream::warm().await.automatic(|call| call.echo());
    let group = Cgroup::new(memory);
    let (prelude, limits) = match &group {
        Ok(group) => {
            say(format!("limited by the cgroup {}", group.0.display()));
            (format!("echo $$ > {}/cgroup.procs || exit 1", group.0.display()), "")
        }
        // As they follow from the limit, which a test of the configuration holds.
        Err(error) => {
            say(format!("no cgroup can be made, so only the peak is measured: {error}"));
            (String::new(), "maxBufferedBytes: 256MiB, maxConnections: 6553")
        }
    };
    let mut served = Served::start(&prelude, limits, &upstream.url()).await;
    let said = served.listens().await;
    assert!(!said.contains("clients can make this process take"), "{said}");
    for (name, count, bytes) in ATTACKS {
        // The process keeps up to 4,096 files for other things.
        let count = count.min(files().saturating_sub(4096 + 500));
        let open = attack(count, served.address, bytes).await;
        let mut client = soon("a place", connect_from(source(30_000), served.address)).await;
        client.set_nodelay(true).unwrap();
        client.write_all(chat("honest").as_bytes()).await.unwrap();
        let mut client = Wire { stream: client, buf: Vec::new() };
        assert_eq!(client.response().await.status(), 200, "beside {name}");
        let (now, peak) = (served.memory("VmRSS:"), served.memory("VmHWM:"));
        say(format!("{count} × {name}: {} MiB, at most {} MiB so far", now >> 20, peak >> 20));
        assert!(peak < memory, "{name}: {peak} of {memory} bytes");
        drop(open);
    }
    assert!(served.child.try_wait().unwrap().is_none(), "it lives");
}
