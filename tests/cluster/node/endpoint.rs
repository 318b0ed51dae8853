//! The node's endpoint for the apiserver's log requests, as served by the kubelet: TLS on port 10250.

use std::{collections::HashMap, convert::Infallible, net::Ipv4Addr, sync::Arc, time::SystemTime};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Frame, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

use super::{
    Agent,
    logs::{ContainerLogLine, ContainerLogs, RunLog},
};
use crate::plane::pki::CertificateAuthority;

pub(super) const PORT: u16 = 10250;

type KubeletBody = UnsyncBoxBody<Bytes, Infallible>;

/// Listener of the endpoint; bound before the node is registered with its address.
pub(super) struct KubeletListener {
    listener: TcpListener,
    tls: TlsAcceptor,
}

/// Options of a log request, as in `PodLogOptions`.
struct LogOptions {
    follow: bool,
    previous: bool,
    timestamps: bool,
    tail: Option<usize>,
    since: Option<SystemTime>,
    limit: Option<usize>,
}

// === impl KubeletListener ===

impl KubeletListener {
    /// Binds with a self-made certificate, which the apiserver does not verify by default.
    pub(super) async fn bind(name: &str, address: Ipv4Addr) -> Self {
        let identity = CertificateAuthority::new(name).server(name, &[address.into()], &[]);
        let certificate = CertificateDer::from_pem_slice(identity.cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(
            tokio_rustls::rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
        let listener = TcpListener::bind((address, PORT)).await.unwrap();
        Self { listener, tls: TlsAcceptor::from(Arc::new(config)) }
    }

    /// Serves connections, which end with this future.
    pub(super) async fn serve(self, agent: Arc<Agent>) {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = self.listener.accept().await {
            while connections.try_join_next().is_some() {}
            let (tls, agent) = (self.tls.clone(), agent.clone());
            connections.spawn(async move {
                let Ok(stream) = tls.accept(stream).await else { return };
                let answer = service_fn(|request| {
                    let answer = answer(&agent, &request);
                    async { Ok::<_, Infallible>(answer) }
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    }
}

fn answer<B>(agent: &Agent, request: &Request<B>) -> Response<KubeletBody> {
    let path: Vec<_> = request.uri().path().split('/').skip(1).collect();
    let ["containerLogs", namespace, pod, container] = path.as_slice() else {
        return says(StatusCode::NOT_FOUND, "404 page not found");
    };
    let key = ((*namespace).to_owned(), (*pod).to_owned(), (*container).to_owned());
    let Some(kept) = agent.logs.find(&key) else {
        return says(StatusCode::NOT_FOUND, &format!("pod {pod:?} does not exist"));
    };
    let wanted = match LogOptions::read(request.uri().query().unwrap_or_default(), agent.clock.now()) {
        Ok(wanted) => wanted,
        Err(message) => return says(StatusCode::BAD_REQUEST, &message),
    };
    match wanted.of(&kept) {
        Ok(log) => Response::new(UnsyncBoxBody::new(StreamBody::new(wanted.text(log)))),
        Err(message) => says(
            StatusCode::BAD_REQUEST,
            &message.replace("{}", &format!("container {container:?} in pod {pod:?}")),
        ),
    }
}

fn says(status: StatusCode, words: &str) -> Response<KubeletBody> {
    let body = Full::from(words.to_owned()).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

// === impl LogOptions ===

impl LogOptions {
    fn read(query: &str, now: SystemTime) -> Result<Self, String> {
        let pairs: HashMap<_, _> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let is = |name: &str| pairs.get(name) == Some(&"true");
        let number = |name: &str| match pairs.get(name) {
            Some(text) => text.parse().map(Some).map_err(|_| format!("{name}: not a number: {text}")),
            None => Ok(None),
        };
        let ago = number("sinceSeconds")?.map(|seconds| now - std::time::Duration::from_secs(seconds));
        let time = match pairs.get("sinceTime") {
            Some(text) => Some(
                humantime::parse_rfc3339(&text.replace("%3A", ":"))
                    .map_err(|error| format!("sinceTime: {error}"))?,
            ),
            None => None,
        };
        let size = |name: &str| {
            number(name).map(|number| number.map(|number| usize::try_from(number).unwrap_or(usize::MAX)))
        };
        Ok(Self {
            follow: is("follow"),
            previous: is("previous"),
            timestamps: is("timestamps"),
            tail: size("tailLines")?,
            since: ago.or(time),
            limit: size("limitBytes")?,
        })
    }

    /// Returns the log of the requested run of the container. Errors use the kubelet's words, with `{}` for the
    /// container.
    fn of(&self, kept: &ContainerLogs) -> Result<Arc<RunLog>, String> {
        if self.previous {
            return kept.previous.clone().ok_or_else(|| "previous terminated {} not found".into());
        }
        kept.last.clone().ok_or_else(|| {
            let why = match kept.waits.as_str() {
                "ErrImagePull" => "image can't be pulled",
                "ImagePullBackOff" => "trying and failing to pull image",
                other => other,
            };
            format!("{{}} is waiting to start: {why}")
        })
    }

    /// Streams the lines of a log; with `follow`, until the log ends.
    fn text(self, log: Arc<RunLog>) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
        let (progress, mut left) = (log.progress(), self.limit.unwrap_or(usize::MAX));
        let first = self.tail.map_or(0, |tail| progress.borrow().lines.saturating_sub(tail));
        let (since, timestamps, follow) = (self.since, self.timestamps, self.follow);
        let chunks = stream::unfold(
            (log, progress, first, false),
            move |(log, mut progress, next, over)| async move {
                if over {
                    return None;
                }
                if follow {
                    // Never fails: this state holds the log, which owns the sender.
                    let _ = progress.wait_for(|now| now.lines > next || now.ended).await;
                }
                let over = !follow || progress.borrow().ended;
                let (lines, count) = log.from(next);
                Some((lines, (log, progress, count, over)))
            },
        );
        chunks.map(move |lines| {
            let lines = lines.iter().filter(|line| since.is_none_or(|since| line.at >= since));
            let mut text: Vec<u8> = lines.flat_map(|line| line.text(timestamps).into_bytes()).collect();
            text.truncate(left);
            left -= text.len();
            Ok(Frame::data(text.into()))
        })
    }
}

// === impl ContainerLogLine ===

impl ContainerLogLine {
    fn text(&self, timestamps: bool) -> String {
        let text = &self.text;
        if timestamps {
            format!("{} {text}\n", humantime::format_rfc3339_nanos(self.at))
        } else {
            format!("{text}\n")
        }
    }
}
