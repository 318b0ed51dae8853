//! Client of vLLM's sleep mode.
//!
//! `/sleep`, `/wake_up` and `/is_sleeping` need `VLLM_SERVER_DEV_MODE=1`, and free memory only with `--enable-sleep-mode`.
//! A sleeping server answers 200 at `/health` and accepts requests without answering them, so neither shows its state.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::time::{sleep, timeout};

use crate::probe::{ProbeRequest, ProbeResult, call};

/// A failed call of the sleep mode.
#[derive(Debug, thiserror::Error)]
pub(super) enum SleepError {
    /// 404: sleep mode is not enabled.
    #[error(
        "it does not know {0}: start vLLM with the flag --enable-sleep-mode, and with VLLM_SERVER_DEV_MODE: \"1\" in \
         target.process.env"
    )]
    Unknown(&'static str),
    /// The server answered with an error status.
    #[error("{0} was answered with status {1}")]
    Refused(&'static str, u16),
    /// The server gave no answer.
    #[error("{0} saw: {1}")]
    Silent(&'static str, ProbeResult),
    /// `/is_sleeping` returned a body of an unknown format.
    #[error("/is_sleeping was answered with an unknown body")]
    Unclear,
}

/// Time limit of `/sleep`: the server copies its weights to RAM at some GB a second.
const SLEEP_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Puts the server to sleep. It must have no requests, as vLLM aborts them.
pub(super) async fn fall_asleep(address: &str, level: u8) -> Result<(), SleepError> {
    let path = if level == 2 { "/sleep?level=2" } else { "/sleep?level=1" };
    match timeout(SLEEP_TIMEOUT, request(address, ProbeRequest::post(path, ""), "/sleep")).await {
        Ok(done) => done.map(drop),
        Err(_) => Err(SleepError::Silent("/sleep", ProbeResult::TimedOut(SLEEP_TIMEOUT.into()))),
    }
}

/// Wakes the server, and polls it every `interval` until it is awake. Has no time limit of its own.
pub(super) async fn wake_up(address: &str, level: u8, interval: Duration) -> Result<(), SleepError> {
    if level == 2 {
        // Weights before the KV cache, as in vLLM's documentation: loading them needs memory.
        request(address, ProbeRequest::post("/wake_up?tags=weights", ""), "/wake_up").await?;
        let reload = ProbeRequest::post("/collective_rpc", r#"{"method":"reload_weights"}"#);
        request(address, reload, "/collective_rpc").await?;
        request(address, ProbeRequest::post("/wake_up?tags=kv_cache", ""), "/wake_up").await?;
    } else {
        request(address, ProbeRequest::post("/wake_up", ""), "/wake_up").await?;
    }
    while is_sleeping(address).await? {
        sleep(interval).await;
    }
    Ok(())
}

async fn is_sleeping(address: &str) -> Result<bool, SleepError> {
    #[derive(serde::Deserialize)]
    struct IsSleeping {
        is_sleeping: bool,
    }
    let body = request(address, ProbeRequest::get("/is_sleeping"), "/is_sleeping").await?;
    let answer: IsSleeping = serde_json::from_slice(&body).map_err(|_| SleepError::Unclear)?;
    Ok(answer.is_sleeping)
}

async fn request(address: &str, question: ProbeRequest<'_>, name: &'static str) -> Result<Bytes, SleepError> {
    match call(address, question).await {
        Ok((status, body)) if status.is_success() => Ok(body),
        Ok((StatusCode::NOT_FOUND, _)) => Err(SleepError::Unknown(name)),
        Ok((status, _)) => Err(SleepError::Refused(name, status.as_u16())),
        Err(answer) => Err(SleepError::Silent(name, answer)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
        net::TcpListener,
    };

    use super::*;

    /// Serves these answers in order while `work` runs, and returns the requests.
    async fn server<T>(says: &[&str], work: impl AsyncFnOnce(String) -> T) -> (T, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = async {
            let mut asked = Vec::new();
            for says in says {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let (mut head, mut length) = (String::new(), 0);
                while !head.ends_with("\r\n\r\n") {
                    let from = head.len();
                    stream.read_line(&mut head).await.unwrap();
                    if let Some(said) = head[from..].strip_prefix("content-length: ") {
                        length = said.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).await.unwrap();
                let line = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1");
                asked.push(format!("{line} {}", String::from_utf8(body).unwrap()).trim().to_owned());
                let (status, body) = says.split_once(' ').unwrap_or((says, ""));
                let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        };
        tokio::join!(work(address), serve)
    }

    #[tokio::test]
    async fn wake_up_polls_until_awake() {
        let wake = async |address: String| wake_up(&address, 1, Duration::ZERO).await;
        let asleep = "200 {\"is_sleeping\":true}";
        let (woken, asked) = server(&["200", asleep, asleep, "200 {\"is_sleeping\":false}"], wake).await;
        woken.unwrap();
        let ask = "GET /is_sleeping";
        assert_eq!(asked, ["POST /wake_up", ask, ask, ask]);
        let (woken, _) = server(&["200", "200 soon"], wake).await;
        assert!(matches!(woken, Err(SleepError::Unclear)), "{woken:?}");
    }

    #[tokio::test]
    async fn level_2_reloads_weights_before_the_kv_cache() {
        let (slept, asked) = server(&["200"], async |address| fall_asleep(&address, 2).await).await;
        slept.unwrap();
        assert_eq!(asked, ["POST /sleep?level=2"]);
        let wake = async |address: String| wake_up(&address, 2, Duration::ZERO).await;
        let (woken, asked) = server(&["200", "200", "200", "200 {\"is_sleeping\":false}"], wake).await;
        woken.unwrap();
        let expected = [
            "POST /wake_up?tags=weights",
            "POST /collective_rpc {\"method\":\"reload_weights\"}",
            "POST /wake_up?tags=kv_cache",
            "GET /is_sleeping",
        ];
        assert_eq!(asked, expected);
        let (woken, asked) = server(&["200", "500"], wake).await;
        assert_eq!(woken.unwrap_err().to_string(), "/collective_rpc was answered with status 500");
        assert_eq!(asked.len(), 2, "stops before the KV cache");
    }

    #[tokio::test]
    async fn missing_sleep_mode_names_the_remedy() {
        let (slept, _) = server(&["404"], async |address| fall_asleep(&address, 1).await).await;
        let error = slept.unwrap_err().to_string();
        assert!(
            error.starts_with("it does not know /sleep: start vLLM with the flag --enable-sleep-mode"),
            "{error}"
        );
        assert!(error.contains("VLLM_SERVER_DEV_MODE: \"1\""), "{error}");
    }

    #[tokio::test]
    async fn stopped_server_is_reported_as_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = fall_asleep(&address, 1).await.unwrap_err().to_string();
        assert_eq!(error, "/sleep saw: connection refused");
    }
}
