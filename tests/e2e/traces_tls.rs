//! Traces over TLS from the binary, which takes its trusted roots from the environment.

use std::{fs, net::SocketAddr, process::Stdio, sync::Arc};

use rcgen::ExtendedKeyUsagePurpose;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        version::{TLS12, TLS13},
    },
};

use super::scaler_tls::ScalerAuthority;
use crate::support::{TestUpstream, Wire, collector::Collector, route, routes, soon, wire::chat};

/// Starts a TLS terminator with this ALPN protocol in front of a collector, and returns its address.
async fn ends_tls(collector: SocketAddr, authority: &ScalerAuthority, protocol: &str) -> SocketAddr {
    let (cert, key) = authority.issue("localhost", ExtendedKeyUsagePurpose::ServerAuth);
    let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13, &TLS12]).unwrap().with_no_client_auth();
    let mut config = builder.with_single_cert(vec![cert], key).unwrap();
    config.alpn_protocols = vec![protocol.into()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the test's runtime.
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut outside = acceptor.accept(stream).await.ok()?;
                let mut inside = TcpStream::connect(collector).await.ok()?;
                tokio::io::copy_bidirectional(&mut outside, &mut inside).await.ok()
            });
        }
    });
    address
}

async fn exports_over_tls(collector: Collector, protocol: &str, alpn: &str) {
    let authority = ScalerAuthority::new("collectors");
    let address = ends_tls(collector.address, &authority, alpn).await;
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let folder = tempfile::tempdir().unwrap();
    let (file, roots) = (folder.path().join("anteroom.yaml"), folder.path().join("roots.pem"));
    let traces =
        format!("traces: {{ endpoint: \"https://localhost:{}\", protocol: {protocol} }}\n", address.port());
    fs::write(&file, traces + "log: json\n" + &routes(&[route("tiny", &upstream.url(), "")])).unwrap();
    fs::write(&roots, authority.pem()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_anteroom"))
        .args(["serve", "--config"])
        .arg(&file)
        .env("SSL_CERT_FILE", &roots)
        .env("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a")
        .env("OTEL_SERVICE_NAME", "not read")
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = loop {
        let line = soon("where it listens", log.next_line()).await.unwrap().expect("a line");
        let line: Value = serde_json::from_str(&line).unwrap();
        if let Some(address) = line["address"].as_str() {
            break address.parse().unwrap();
        }
    };
    assert_eq!(Wire::connect(address).await.ask(chat("x")).await.status(), 200);
    kill_process(Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap(), Signal::INT).unwrap();
    soon("it to stop", child.wait()).await.unwrap();
    let mut said = Vec::new();
    while let Some(line) = log.next_line().await.unwrap() {
        said.push(line);
    }
    assert!(!collector.spans().is_empty(), "{said:#?}");
    assert_eq!(collector.services(), ["anteroom"]);
    assert_eq!(collector.headers()[0]["x-tenant"], "a");
}

#[tokio::test]
async fn over_grpc() {
    exports_over_tls(Collector::grpc().await, "grpc", "h2").await;
}

#[tokio::test]
async fn over_http() {
    exports_over_tls(Collector::http().await, "http", "http/1.1").await;
}
